"""Tests of `phicore generate --batch`: many requests from a file."""

from __future__ import annotations

import inspect
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api.tiny_models import write_tiny

import phicore as api
from phicore.cli.batch import OPTIONS
from phicore.prompting.requests import Requests

LINES: list[Any] = [
    {"prompt": "Hello", "seed": 1},
    {"id": "two", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "seed": 9},
    {"id": 7, "prompt": "Once", "raw": True, "max_tokens": 3, "seed": 2, "ignore_eos": True},
    {"prompt": "Hello", "seed": 1, "stop": "e", "processors": ["logit-bias=5:2"]},
]


def write(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def batch(phicore: Callable, tiny: Path, tmp_path: Path) -> Callable:
    """Return a function that answers the requests in `lines` on the tiny model."""

    def run(lines: list[Any], *args: object, out: Path | None = tmp_path / "out.jsonl") -> Any:
        source = write(tmp_path / "in.jsonl", lines)
        where = [] if out is None else ["--out", out]
        options = ["-m", tiny, "-b", "numpy", "-n", 8, "--batch", source, *where]
        return phicore("generate", *options, *args)

    return run


def alone(tiny: Path, line: dict[str, Any]) -> str:
    options = {"max_tokens": 8, **line}
    prompt = options.pop("prompt", None) or options.pop("messages")
    options.pop("id", None)
    with api.load(tiny, backend="numpy") as model:
        return model.generate(prompt, **options).text()


def test_answers_are_those_of_each_request_alone(batch: Callable, tiny: Path, tmp_path: Path):
    assert batch(LINES).code == 0
    answers = {answer["id"]: answer for answer in read(tmp_path / "out.jsonl")}
    assert sorted(answers, key=str) == [1, 4, 7, "two"]
    for number, line in enumerate(LINES, start=1):
        answer = answers[line.get("id", number)]
        assert answer["text"] == alone(tiny, line)
        assert answer["seed"] == line.get("seed", answer["seed"])
        assert answer["model"] == str(tiny)
    assert (answers[7]["finish_reason"], answers[7]["generated_tokens"]) == ("length", 3)


@pytest.mark.parametrize("parallel", [1, 3])
def test_answers_come_in_order_when_asked_and_on_standard_output(batch: Callable, parallel: int):
    result = batch(LINES, "--in-order", "--parallel", parallel, out=None)
    assert [json.loads(line)["id"] for line in result.out.splitlines()] == [1, "two", 7, 4]


def test_line_may_have_every_argument_of_generate():
    arguments = set(inspect.signature(Requests.request).parameters)
    arguments -= {"self", "defaults", "processor", "sampling"}
    assert arguments <= {"prompt", *OPTIONS}


def test_options_of_the_command_are_defaults(batch: Callable, tmp_path: Path):
    assert batch([{"prompt": "a"}, {"prompt": "a", "seed": 4}], "--seed", 3, "-n", 2).code == 0
    answers = sorted(read(tmp_path / "out.jsonl"), key=lambda answer: answer["id"])
    assert [answer["seed"] for answer in answers] == [3, 4]
    assert all(answer["generated_tokens"] <= 2 for answer in answers)


def test_log_probabilities_are_in_the_lines_that_ask_for_them(
    batch: Callable, tiny: Path, tmp_path: Path
):
    options = {"prompt": "Hello", "seed": 1, "max_tokens": 4}
    assert batch([{**options, "logprobs": 2}, options, {**options, "logprobs": 0}]).code == 0
    two, none, zero = sorted(read(tmp_path / "out.jsonl"), key=lambda answer: answer["id"])
    assert two["text"] == none["text"] == zero["text"]
    assert "logprobs" not in none
    with api.load(tiny, backend="numpy") as model:
        pieces = list(model.generate("Hello", seed=1, max_tokens=4, logprobs=2))

        def told(id: int, logprob: float) -> dict[str, Any]:
            figure = pytest.approx(logprob, abs=1e-5)  # rows computed together add differently
            return {"id": id, "piece": model.tokenizer.piece(id), "logprob": figure}

        known = [piece.logprobs[0] for piece in pieces]
        expected = [
            {**told(each.token, each.logprob), "top": [told(*pair) for pair in each.top]}
            for each in known
        ]
    assert [len(each["top"]) for each in two["logprobs"]] == [2] * len(pieces)
    assert two["logprobs"] == expected
    assert zero["logprobs"] == [{**each, "top": []} for each in expected]


BAD = {
    "not JSON": "not JSON",
    "[1]": "expected a JSON object",
    '{"prompt": "a", "temprature": 1}': "unknown key 'temprature'",
    '{"max_tokens": 1}': "expected 'prompt' or 'messages'",
    '{"prompt": "a", "messages": []}': "expected 'prompt' or 'messages'",
    '{"prompt": "a", "id": 1.5}': "id: expected text or a whole number",
    '{"prompt": "a", "id": "two"}': "id 'two' occurs twice",
    '{"prompt": "a", "temperature": "hot"}': "temperature: expected",
    '{"prompt": 5}': "prompt: expected",
    '{"prompt": "a", "logprobs": 21}': "logprobs: expected 0 to 20, got 21",
    '{"prompt": "a", "speculation": "no"}': "speculation: expected True or False, got 'no'",
    '{"messages": [{"role": 1}]}': "messages[0]: expected",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line_is_told_and_stops_no_other(batch: Callable, tmp_path: Path, line: str):
    result = batch([LINES[1], line, LINES[0]])
    assert result.code == 1
    assert f"line 2: {'tiny.gguf: ' if 'messages[0]' in BAD[line] else ''}{BAD[line]}" in result.err
    assert result.err.endswith("phicore: 1 of 3 requests have no answer\n")
    assert {answer["id"] for answer in read(tmp_path / "out.jsonl")} == {"two", 3}


def test_file_of_requests_is_never_a_file_of_answers(phicore: Callable, tiny: Path, tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "Hello"}', encoding="utf-8")  # without a newline at its end
    for out in (source, tmp_path / "notes.txt"):
        out.write_text('{"prompt": "Hello"}', encoding="utf-8")
        result = phicore("generate", "-m", tiny, "-b", "numpy", "--batch", source, "--out", out)
        assert result.code == 2
        assert out.read_text(encoding="utf-8") == '{"prompt": "Hello"}'


def test_odd_characters_in_ids_and_texts_are_kept(batch: Callable, tmp_path: Path):
    lines = [
        {"id": "a\u2028b\u0085", "prompt": "a\u2029", "seed": 1},
        '{"id": "\\ud800", "prompt": "a"}',
    ]
    result = batch(lines)
    assert result.code == 1
    assert "line 2: id: expected text or a whole number" in result.err
    assert [answer["id"] for answer in read_lines(tmp_path / "out.jsonl")] == ["a\u2028b\u0085"]
    assert "1 of 2 answers are there already" in batch(lines).err


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_requests_come_from_a_pipe(tiny: Path):
    command = [sys.executable, "-m", "phicore", "generate", "-m", str(tiny), "-b", "numpy"]
    if not Path("/dev/stdin").exists():
        pytest.skip("this system has no /dev/stdin")
    done = subprocess.run(
        [*command, "-n", "2", "--batch", "/dev/stdin"],
        input=b'{"prompt": "Hello"}\n{"prompt": "Hi"}\n',
        capture_output=True,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("content", [b"\xff\n", b'{"id": [1], "model": "x"}\n', b"[]\n", b'{"id"'])
def test_file_that_has_something_else_is_refused(batch: Callable, tmp_path: Path, content: bytes):
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    result = batch(LINES)
    if content == b'{"id"':  # the beginning of an answer
        assert result.code == 0
    else:
        assert (result.code, out.read_bytes()) == (2, content)
        assert result.err.count("\n") == 1


def test_request_that_does_not_fit_has_an_error_for_an_answer(batch: Callable, tmp_path: Path):
    long = {"id": "long", "prompt": "word " * 5000}
    result = batch([long, LINES[0]])
    assert result.code == 1
    assert "id 'long': the prompt has" in result.err
    answers = {answer["id"]: answer for answer in read(tmp_path / "out.jsonl")}
    assert answers["long"]["error"].startswith("the prompt has ")
    assert answers[2]["text"]


def test_command_that_is_repeated_computes_only_what_is_left(batch: Callable, tmp_path: Path):
    batch(LINES)
    out = tmp_path / "out.jsonl"
    first = out.read_text(encoding="utf-8")
    result = batch(LINES)
    assert "4 of 4 answers are there already" in result.err
    assert out.read_text(encoding="utf-8") == first
    whole = first.splitlines(keepends=True)
    error = json.dumps({"id": 1, "model": read(out)[0]["model"], "error": "x"}) + "\n"
    out.write_text("".join([*whole[:2], whole[2][:20]]), encoding="utf-8")
    batch(LINES)
    assert sorted(read(out), key=str) == sorted(map(json.loads, whole), key=str)
    kept = [line for line in whole if json.loads(line)["id"] != 1]
    out.write_text("".join([error, *kept]), encoding="utf-8")  # what failed is tried again
    batch(LINES)
    assert sorted(read(out), key=str) == sorted(map(json.loads, whole), key=str)


def test_command_that_was_killed_goes_on(tiny: Path, tmp_path: Path):
    lines = [{"prompt": f"Hello {i}", "seed": i, "max_tokens": 30} for i in range(60)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "phicore", "generate", "-m", str(tiny), "-b", "numpy"]
    command += ["--batch", str(source), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not out.exists() or out.stat().st_size < 500:
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    assert 0 < len(out.read_text(encoding="utf-8").splitlines()) < 60
    subprocess.run(command, check=True, capture_output=True)
    answers = read(out)
    assert sorted(answer["id"] for answer in answers) == list(range(1, 61))
    assert {answer["id"]: answer["seed"] for answer in answers} == {i + 1: i for i in range(60)}


def test_answers_of_another_model_or_another_file_are_not_touched(batch: Callable, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    for content, message in (
        ('{"id": 1, "model": "phi-3-mini", "text": ""}\n', "has answers of phi-3-mini"),
        ("my notes\n", "its lines are no answers"),
    ):
        out.write_text(content, encoding="utf-8")
        result = batch(LINES)
        assert result.code == 2
        assert f"phicore: --out: {out}" in result.err
        assert message in result.err
        assert out.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batch", "none.jsonl"], "--batch: none.jsonl: No such file or directory"),
        (["--batch", "none.jsonl", "Hello"], "--batch: not together with a prompt, --json or"),
        (["--batch", "none.jsonl", "--json"], "--batch: not together with a prompt, --json or"),
        (
            ["--batch", "none.jsonl", "--session", "s"],
            "--batch: not together with a prompt, --json",
        ),
        (["--out", "x", "Hello"], "--out: only together with --batch"),
        (["--in-order", "Hello"], "--in-order: only together with --batch"),
    ],
)
def test_options_that_do_not_go_together(phicore: Callable, args: list[str], message: str):
    result = phicore("generate", "-m", "not-looked-for", *args)
    assert result.code == 2
    assert result.err.startswith(f"phicore: {message}")
    assert result.err.count("\n") == 1


def test_line_with_tools_gets_a_message_with_calls(phicore: Callable, tmp_path: Path):
    model = write_tiny(tmp_path / "m.gguf", max_position_embeddings=2000)
    tools = [{"name": "flip", "parameters": {"properties": {"heads": {"type": "boolean"}}}}]
    line = {"prompt": "Hi", "seed": 1, "tools": tools, "max_tokens": 200}
    forced = {**line, "tool_choice": "required", "parallel_tool_calls": False}
    source, out = write(tmp_path / "in.jsonl", [line, forced]), tmp_path / "out.jsonl"
    found = phicore("generate", "-m", model, "-b", "numpy", "--batch", source, "--out", out)
    assert found.code == 0
    free, called = sorted(read(out), key=lambda answer: answer["id"])
    assert free["message"]["content"] == free["text"]
    [call] = called["message"]["tool_calls"]
    assert call["function"]["name"] == "flip"
