"""Tests that each failure gives one clear line on standard error and an exit code."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from api.tiny_models import spoilt, with_number, with_value, without, write_tiny

from phicore.__main__ import _as_option


@pytest.fixture
def fails(phicore: Callable, tiny: Path) -> Callable[..., str]:
    """Return a function that runs `phicore generate`, which must fail.

    The function returns the error message without "phicore: ".
    """

    def run(*args: object, code: int = 1, model: object = tiny, stdin: bytes = b"") -> str:
        options = ["-m", model, "-b", "numpy", "-n", 4]
        return checked(phicore("generate", *options, *args, stdin=stdin), code)

    return run


def checked(result, code: int) -> str:
    *before, last = result.err.splitlines()
    assert result.code == code
    assert result.out == ""
    assert last.startswith("phicore: ")
    # The lines before the message report the progress of loading.
    assert all(line.startswith(("loading: ", "model: ")) for line in before)
    return last.removeprefix("phicore: ")


# ---- options: exit code 2, before anything is loaded -----------------------------------------


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["-t", "-1"], "--temperature", "-1.0"),
        (["-t", "nan"], "--temperature", "nan"),
        (["--top-p", "2"], "--top-p", "2.0"),
        (["--top-k", "-1"], "--top-k", "-1"),
        (["--min-p", "1.5"], "--min-p", "1.5"),
        (["--repeat-penalty", "0"], "--repeat-penalty", "0.0"),
        (["--repeat-last-n", "-2"], "--repeat-last-n", "-2"),
        (["--stop", ""], "--stop", "['']"),
        (["--max-tokens", "0"], "--max-tokens", "0"),
        (["--seed", "-1"], "--seed", "-1"),
        (["--rope-factors", "short"], "--rope-factors", "'short'"),
        (["--threads", "100000"], "--threads", "100000"),
    ],
)
def test_option_outside_of_its_range(fails, args: list[str], name: str, value: str) -> None:
    message = fails(*args, "Hello", code=2, model="not-looked-for")
    assert re.fullmatch(rf"{name}: expected .*, got {re.escape(value)}", message)


def test_system_message_of_a_raw_prompt(fails) -> None:
    message = fails("--raw", "--system", "x", "Hello", code=2, model="not-looked-for")
    assert message == "--system: a raw prompt has no system message"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--max-tokens", "many"], "--max-tokens: expected an integer, got 'many'; see"),
        (["--top-k", "1.5"], "--top-k: expected an integer, got '1.5'; see"),
        (["--temperature", "hot"], "--temperature: expected a number, got 'hot'; see"),
        (["--ctx", "0"], "--ctx: expected 1 or more, got '0'; see"),
        (["--parallel", "65"], "--parallel: expected 64 or less, got '65'; see"),
        (["--tmperature", "1"], "--temperature"),
        (["two", "prompts"], "unexpected extra argument"),
        (["--model"], "--model"),
    ],
)
def test_option_that_is_wrong_names_itself_and_the_help(fails, args: list[str], part: str) -> None:
    message = fails(*args, code=2)
    assert part in message
    assert re.search(r"; see phicore( generate)? --help$", message)


def test_unknown_command(phicore) -> None:
    assert checked(phicore("talk"), 2) == "No such command 'talk'; see phicore --help"


def test_unknown_option_of_the_program(phicore) -> None:
    assert checked(phicore("--verbose"), 2).endswith("; see phicore --help")


def test_no_command_shows_the_help(phicore) -> None:
    result = phicore()
    assert result.code == 2
    assert "Usage" in result.out
    assert result.err == ""


def test_devices_of_a_backend_that_has_one(fails) -> None:
    message = fails("--devices", "2", "Hello", code=2)
    assert message == "--devices: this backend computes on one device"


# ---- the prompt ------------------------------------------------------------------------------


def test_stdin_that_is_not_utf8(fails) -> None:
    assert "standard input is not utf-8 text" in fails("-", stdin=b"a\xff", code=2)


def test_argument_that_is_not_utf8(fails) -> None:
    assert fails("a\udcff", code=2) == "the text is not valid UTF-8"


def test_stdin_that_is_empty(fails, phicore) -> None:
    message = "no text: standard input is empty; give the text as an argument"
    assert fails(code=2) == message
    assert fails("-", code=2) == message
    assert checked(phicore("tokenize"), 2).startswith("no text: ")


def test_prompt_longer_than_the_context(fails) -> None:
    message = fails("--ctx", 8, "Hello")
    assert message.startswith("the prompt has 9 tokens and the context holds 8")


def test_context_larger_than_the_models(fails) -> None:
    message = fails("--ctx", 1000, "Hello", code=2)
    assert message == "--ctx: expected 1 to 320, the model's context, got 1000"


@pytest.mark.parametrize(("command", "spelled"), [("generate", "prompt"), ("parity", "--prompt")])
def test_parameter_is_spelled_as_the_command_has_it(
    monkeypatch: pytest.MonkeyPatch, command: str, spelled: str
) -> None:
    """`phicore parity` has an option --prompt, but `phicore generate` has an argument."""
    monkeypatch.setattr(sys, "argv", ["phicore", "--no-plugins", command, "--raw", ""])
    assert _as_option("prompt") == spelled


# ---- the model -------------------------------------------------------------------------------


def test_reference_that_means_nothing(fails) -> None:
    message = fails("Hello", model="phi-3-mimi")
    assert "'phi-3-mimi' is not a file and not a known model" in message
    assert "phi-3-mini" in message


def test_file_that_does_not_exist(fails, tiny: Path) -> None:
    assert "tiny.gguf" in fails("Hello", model=tiny.with_name("tinny.gguf"))


def test_folder_as_a_model(fails, tiny: Path) -> None:
    assert fails("Hello", model=tiny.parent).endswith("name a GGUF file in it: tiny.gguf")


@pytest.mark.parametrize("command", ["generate", "inspect", "tokenize"])
@pytest.mark.parametrize("content", [b"", b"GG", b"# A README\n" * 9, b'{"a": 1}' * 9])
def test_file_that_is_no_gguf(tmp_path: Path, phicore, command: str, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    model = [tmp_path / "m.gguf"] if command == "inspect" else ["-m", tmp_path / "m.gguf", "Hello"]
    assert "m.gguf: " in checked(phicore(command, *model), 1)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_truncated_file(tmp_path: Path, phicore, tiny: Path, command: str, kept: float) -> None:
    data = tiny.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(kept * len(data))])
    model = [tmp_path / "m.gguf"] if command == "inspect" else ["-m", tmp_path / "m.gguf", "Hello"]
    message = checked(phicore(command, *model), 1)
    assert message.startswith("m.gguf: ")
    assert "download" in message


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (without("phi3.block_count"), ["phi3.block_count", "missing"]),
        (without("tokenizer.ggml.model"), ["m.gguf: tokenizer.ggml.model", "missing"]),
        (with_value("general.architecture", "mamba"), ["'mamba' is not supported", "phi3"]),
        (with_value("phi3.block_count", 3), ["tensor 'blk.2.", "missing"]),
        (with_value("phi3.embedding_length", 128), ["shape"]),
        (with_number("phi3.brand_new", 1), ["m.gguf: phi3.brand_new", "is not known"]),
        (with_value("phi3.rope.freq_base", float("inf")), ["m.gguf: phi3.rope.freq_base", "inf"]),
        (with_value("phi3.rope.freq_base", 1e-40), ["m.gguf: phi3.rope.freq_base", "1 to 1e+30"]),
        (with_value("tokenizer.chat_template", "{% if"), ["m.gguf: chat template: "]),
    ],
)
def test_file_with_wrong_metadata(tmp_path: Path, fails, edit, parts: list[str]) -> None:
    message = fails("Hello", model=write_tiny(tmp_path / "m.gguf", edit))
    assert all(part in message for part in parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_file_with_a_damaged_norm(tmp_path: Path, fails, value: float) -> None:
    model = spoilt(write_tiny(tmp_path / "m.gguf"), "blk.0.attn_norm.weight", value)
    assert fails("Hello", model=model) == (
        "m.gguf: tensor 'blk.0.attn_norm.weight': expected finite numbers, "
        f"found {value}; the file is damaged"
    )


def test_file_with_a_damaged_matrix(tmp_path: Path, fails) -> None:
    model = spoilt(write_tiny(tmp_path / "m.gguf"), "blk.0.ffn_down.weight", float("nan"))
    assert "scores are not finite numbers: the file is damaged" in fails("Hello", model=model)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[]"])
def test_tokenizer_that_cannot_be_read(tmp_path: Path, fails, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    message = fails("--tokenizer", tmp_path / "t.json", "Hello")
    assert "t.json: not a tokenizer.json" in message


def test_tokenizer_that_does_not_exist(tmp_path: Path, fails) -> None:
    assert "none.json: cannot be read" in fails("--tokenizer", tmp_path / "none.json", "Hello")
    assert "cannot be read" in fails("--tokenizer", tmp_path, "Hello")


def test_settings_that_are_no_toml(tmp_path: Path, phicore) -> None:
    (tmp_path / "config.toml").write_text("model =")
    assert "config.toml" in checked(phicore("generate", "Hello"), 1)


# ---- the backend -----------------------------------------------------------------------------


def test_backend_that_is_not_installed(fails) -> None:
    message = fails("-b", "mxl", "Hello")
    assert message.startswith("no backend 'mxl'; installed: ")
    assert "numpy" in message


def test_device_that_does_not_exist(fails) -> None:
    pytest.importorskip("phicore_jax", reason="install phicore-jax")
    message = fails("-b", "jax", "--device", "cuda:99", "Hello")
    assert message.startswith("backend jax: no device 'cuda:99' (available: ")


def test_control_characters_in_a_message_do_not_reach_the_terminal(phicore) -> None:
    result = phicore("generate", "-m", "no\x1b[2Jsuch.gguf", "-b", "numpy", "Hi")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("phicore: no␛[2Jsuch.gguf: no such file")
    assert "\x1b" not in result.err
