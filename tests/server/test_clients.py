"""The programs that people have run unchanged against the server.

`uv run --group clients pytest tests/server/test_clients.py` installs and runs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from api.tiny_models import write_tiny
from server.conftest import HI, Served, ready
from server.test_life import process

import phicore
from phicore import Model
from phicore.server import Settings


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs {', '.join(missing)}: uv sync --group clients"
    )


# What these libraries warn about is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS: dict[str, Any] = {"max_tokens": 8, "seed": 5, "temperature": 0.7}


@pytest.fixture(scope="module")
def expected(model: Model) -> str:
    return model.generate("Hi", **OPTIONS).text()


# ---- openai-python -------------------------------------------------------------------------

PRICES = {"apple": 3, "größe": 5}


def price(item: str, count: int, gift: bool) -> str:
    return f"{item}: {PRICES[item] * count + gift} crowns"


PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "item": {"enum": [*PRICES]},
        "count": {"type": "integer", "minimum": 1, "maximum": 12},
        "gift": {"type": "boolean"},
    },
    "required": ["item", "count", "gift"],
    "additionalProperties": False,
}
PRICE: Any = {"type": "function", "function": {"name": "price", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def openai_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Run `phicore serve` with a model that has room for conversations with tools."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    with process("-m", write_tiny(path, max_position_embeddings=3000)) as running:
        running.wait_until_ready()
        with running.client as client:
            yield client


def asked(client: openai.OpenAI, is_streamed: bool, **options: Any) -> Any:
    """Return the only choice of an answer."""
    options = {"model": "tiny", "tools": [PRICE], "seed": 4, **options}
    if not is_streamed:
        [choice] = client.chat.completions.create(**options).choices
        return choice
    with client.chat.completions.stream(**options) as stream:
        stream.until_done()
        [choice] = stream.current_completion_snapshot.choices  # it may have any finish reason
        return choice


def test_openai_calls_tools_and_answers_with_their_results(openai_client: openai.OpenAI):
    """The calls of a random model are valid, since a grammar forces them; whole and in a stream."""
    found = []
    for is_streamed in (False, True):
        messages: list[Any] = [*HI]
        first = asked(
            openai_client, is_streamed, messages=messages, tool_choice="required", max_tokens=900
        )
        assert first.finish_reason == "tool_calls"
        assert first.message.role == "assistant"
        assert not first.message.content
        messages.append(first.message)
        called = []
        for call in first.message.tool_calls:
            assert (call.type, call.function.name) == ("function", "price")
            arguments = json.loads(call.function.arguments)
            jsonschema.validate(arguments, PARAMETERS)
            result = price(**arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            called.append((call.function.arguments, result))
        assert len({call.id for call in first.message.tool_calls}) == len(called) >= 1
        body = {"messages": [*HI, first.message.model_dump(), *messages[2:]], "tools": [PRICE]}
        url = str(openai_client.base_url.join("/apply-template"))
        prompt: Any = openai_client.post(url, body=body, cast_to=object)
        assert all(text in prompt["prompt"] for pair in called for text in pair)
        last = asked(openai_client, is_streamed, messages=messages, max_tokens=20)
        assert last.finish_reason in ("stop", "length")
        assert last.message.role == "assistant"
        assert last.message.content
        assert not last.message.tool_calls
        found.append((called, last.message.content))
    assert found[0] == found[1]


# ---- llm -----------------------------------------------------------------------------------


@needs("llm")
@pytest.mark.parametrize("options", [[], ["--no-stream"]], ids=["stream", "whole"])
def test_llm_prompts_and_continues(
    served: Served, expected: str, tmp_path: Path, options: list[str]
):
    models = f"""
- model_id: phicore
  model_name: tiny
  api_base: {served.url}/v1
- model_id: phicore-text
  model_name: tiny
  api_base: {served.url}/v1
  completion: true
"""
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    environment = {
        **os.environ,
        "LLM_USER_PATH": str(tmp_path),
        "LLM_LOAD_PLUGINS": "",  # the demo model's package is a plugin that needs llama.cpp
    }

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    given = [x for name, value in OPTIONS.items() for x in ("-o", name, str(value))]
    assert llm("-m", "phicore", *given, *options, "Hi").rstrip("\n") == expected.rstrip("\n")
    llm("-c", *options, "And then?")
    assert len(json.loads(llm("logs", "--json", "-n", "2"))) == 2
    assert llm("-m", "phicore-text", *given, *options, "The sea")


# ---- LangChain -----------------------------------------------------------------------------


@needs("langchain_openai")
def test_langchain_invokes_streams_and_batches(served: Served, expected: str):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        model="tiny", base_url=f"{served.url}/v1", api_key="any", stream_usage=True, **OPTIONS
    )
    answer = chat.invoke("Hi")
    assert answer.content == expected
    assert answer.usage_metadata["output_tokens"] > 0
    parts = list(chat.stream("Hi"))
    assert "".join(part.content for part in parts) == expected
    usage = [part.usage_metadata for part in parts if part.usage_metadata]
    assert sum(each["output_tokens"] for each in usage) == answer.usage_metadata["output_tokens"]
    assert [each.content for each in chat.batch(["Hi", "Hi", "Hi"])] == [expected] * 3
    messages = [("system", "Be brief."), ("human", "Hi"), ("ai", "Hello"), ("human", "Bye")]
    assert chat.invoke(messages).response_metadata["finish_reason"] in ("stop", "length")


@needs("langchain_openai")
def test_langchain_continues_text_and_reads_log_probabilities(served: Served, model: Model):
    from langchain_openai import ChatOpenAI, OpenAI

    where: dict[str, Any] = {"model": "tiny", "base_url": f"{served.url}/v1", "api_key": "any"}
    text = OpenAI(**where, **OPTIONS).invoke("The sea")
    assert text == model.generate("The sea", raw=True, **OPTIONS).text()
    told = ChatOpenAI(**where, **OPTIONS).bind(logprobs=True, top_logprobs=2).invoke("Hi")
    assert told.response_metadata["logprobs"]["content"]


@needs("langchain_openai")
def test_langchain_is_told_of_a_full_context(served: Served):
    from langchain_core.exceptions import ContextOverflowError
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    with pytest.raises((openai.BadRequestError, ContextOverflowError)):
        chat.invoke("word " * 1000)


@needs("langchain_openai")
def test_langchain_calls_a_tool_and_answers_with_its_result(tmp_path: Path):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def flip(heads: bool) -> str:
        """Flip a coin."""
        return "won" if heads else "lost"

    path = write_tiny(tmp_path / "tiny.gguf", max_position_embeddings=2000)
    with phicore.load(path, "numpy") as model, ready(model) as found:
        chat = ChatOpenAI(
            model="tiny", base_url=f"{found.url}/v1", api_key="any", max_tokens=300, seed=1
        )
        forced = chat.bind_tools([flip], tool_choice="flip")
        whole = forced.invoke("Hi")
        [call] = whole.tool_calls
        assert (call["name"], list(call["args"])) == ("flip", ["heads"])
        streamed = None
        for part in forced.stream("Hi"):
            streamed = part if streamed is None else streamed + part
        assert streamed.tool_calls[0]["args"] == call["args"]
        result = flip.invoke(call)
        assert isinstance(result, ToolMessage)
        last = chat.bind_tools([flip]).invoke([HumanMessage("Hi"), whole, result])
        assert last.content
        several = chat.bind_tools([flip], tool_choice="any", parallel_tool_calls=False)
        assert len(several.invoke("Hi").tool_calls) == 1
        structured = chat.with_structured_output(
            {
                "title": "Side",
                "type": "object",
                "properties": {"heads": {"type": "boolean"}},
                "required": ["heads"],
            },
            method="function_calling",
        )
        assert structured.invoke("Hi")["heads"] in (True, False)


# ---- litellm -------------------------------------------------------------------------------


@pytest.fixture
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it asks the network
    if importlib.util.find_spec("litellm") is None:
        return None
    import litellm

    litellm.telemetry = False
    return litellm


@needs("litellm")
def test_litellm_completes_and_streams(served: Served, expected: str, litellm: Any):
    where = {"model": "openai/tiny", "api_base": f"{served.url}/v1", "api_key": "any"}
    answer = litellm.completion(messages=HI, **where, **OPTIONS)
    assert answer.choices[0].message.content == expected
    parts = list(
        litellm.completion(
            messages=HI, stream=True, stream_options={"include_usage": True}, **where, **OPTIONS
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == expected
    assert parts[-1].usage.total_tokens == answer.usage.total_tokens
    several = litellm.batch_completion(messages=[HI] * 3, **where, **OPTIONS)
    assert [each.choices[0].message.content for each in several] == [expected] * 3


@needs("litellm")
def test_litellm_knows_the_errors(served: Served, litellm: Any):
    where = {"api_base": f"{served.url}/v1", "api_key": "any", "num_retries": 0}
    long = [{"role": "user", "content": "word " * 1000}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(model="openai/tiny", messages=long, **where)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model="openai/absent", messages=HI, **where)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(model="openai/tiny", messages=HI, seed=2**70, **where)


# ---- documents ---------------------------------------------------------------------------


DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"
EXAMPLES = re.findall(r"^```py\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split()[1])
def test_example_of_the_document_works(served: Served, model: Model, code: str, litellm: Any):
    for library in ("langchain_openai", "litellm"):
        if library in code:
            pytest.importorskip(library, reason="uv sync --group clients")
    code = code.replace("http://127.0.0.1:8080", served.url).replace("smollm2", "tiny")
    code = code.replace('phicore.load("tiny")', "MODEL")
    exec(code, {"MODEL": model})


@needs("llm")
def test_yaml_of_the_document_is_for_llm(tmp_path: Path):
    """The models are listed without asking the server."""
    [models] = re.findall(r"^```yaml\n(- model_id.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.M)
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}
    command = [sys.executable, "-m", "llm", "models"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "phicore" in done.stdout


# ---- schemathesis --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tiny_path: Path) -> Iterator[Served]:
    """Serve a model whose answers are short."""
    settings = Settings(max_answer=2, max_queue=200)
    with phicore.load(tiny_path, "numpy") as model, ready(model, settings=settings) as found:
        yield found


@needs("schemathesis")
@pytest.mark.parametrize("examples", [15, pytest.param(200, marks=pytest.mark.complete)])
def test_answers_are_as_the_description_says(quick: Served, tmp_path: Path, examples: int):
    """No request leads to a fault, and no answer is one that the description does not have."""
    checks = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "unsupported_method",
    )
    program = Path(sys.executable).parent / "schemathesis"
    command = [
        *(str(program), "run", f"{quick.url}/openapi.json"),
        *("--checks", ",".join(checks)),
        *("--max-examples", str(examples)),
        *("--seed", "1"),
        *("--phases", "examples,coverage,fuzzing"),
        "--generation-deterministic",
        "--no-color",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    quick.wait_until(lambda: quick.is_free, "the end")
