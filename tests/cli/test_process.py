"""Tests that need a separate process: imports, pipes, signals, terminals, completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from api.tiny_models import write_tiny

posix = pytest.mark.skipif(os.name != "posix", reason="signals and terminals of POSIX")

TENSOR_LIBRARIES = {"numpy", "jax", "jaxlib", "mlx", "torch", "tinygrad", "array_api_strict"}
OTHER_LIBRARIES = {"gguf", "tokenizers", "huggingface_hub", "jinja2", "starlette", "uvicorn"}


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model that, with the options `ENDLESS`, generates for longer than any test waits."""

    def never_end(writer) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        for end in ("<|end|>", "<|endoftext|>"):
            tokens[tokens.index(end)] = f"not-{end}"
        writer.kv_data[0]["tokenizer.ggml.eos_token_id"].value = tokens.index("</s>")

    path = tmp_path_factory.mktemp("models") / "endless.gguf"
    return write_tiny(path, never_end, max_position_embeddings=20000)


# Without a penalty the greedy text repeats a cycle of tokens that contains no end token.
ENDLESS = ("-b", "numpy", "-n", 19000, "-t", 0, "--repeat-penalty", 1)


def finished(process: subprocess.Popen[bytes], stdin: bytes = b"") -> tuple[int, str, str]:
    out, err = process.communicate(stdin, timeout=60)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["--version"]])
def test_help_imports_no_slow_library(args: list[str]) -> None:
    program = (
        "import atexit, json, sys\n"
        "atexit.register(lambda: print(json.dumps(list(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['phicore', *{args}]\n"
        "from phicore.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0
    imported = {name.partition(".")[0] for name in json.loads(done.stderr)}
    assert "phicore" in imported
    assert not imported & (TENSOR_LIBRARIES | OTHER_LIBRARIES)


def test_help_has_examples(start: Callable) -> None:
    for args in (["--help"], ["generate", "--help"]):
        code, out, err = finished(start(*args))
        assert (code, err) == (0, "")
        assert "Examples:" in out
        assert "phicore generate" in out


@posix
def test_closed_pipe_ends_quietly(start, endless: Path) -> None:
    process = start("generate", "-m", endless, *ENDLESS, "Hello")
    assert len(process.stdout.read(5)) == 5
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stdin.close()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert all(line.startswith(("loading: ", "prompt: ")) for line in err.splitlines())


@posix
@pytest.mark.parametrize("args", [["--help"], ["models"]])
def test_closed_pipe_ends_every_command_quietly(start, args: list[str]) -> None:
    process = start(*args)
    process.stdout.close()
    process.stdout = None
    code, _, err = finished(process)
    assert code == 141
    assert "phicore:" not in err
    assert "Traceback" not in err


@posix
@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_interrupt_keeps_the_text_and_exits_130(start, endless: Path, json_flag) -> None:
    process = start("generate", "-m", endless, *ENDLESS, *json_flag, "Hello")
    if json_flag:  # prints nothing until the end
        assert process.stderr.readline().startswith(b"loading: ")
        first = b""
    else:
        first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    code, out, err = finished(process)
    assert code == 130
    assert "Traceback" not in err
    if json_flag and out:  # empty when the signal came before the first step
        assert json.loads(out)["finish_reason"] == "interrupted"
    if not json_flag:
        assert (first + out.encode()).endswith(b"\n")
        assert "peak memory" in err


@posix
def test_stdout_that_is_closed(start, tiny: Path) -> None:
    args = ("generate", "-m", tiny, "-b", "numpy", "-n", 4, "Hello")
    code, _, err = finished(start(*args, redirect=">&-"))
    assert (code, err) == (1, "phicore: standard output is closed\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_disk_that_is_full(start, tiny: Path, command: str) -> None:
    generate = ("-b", "numpy", "-n", 4, "--no-stats", "-m", tiny, "Hello")
    args = generate if command == "generate" else (tiny,)
    with Path("/dev/full").open("wb") as full:
        code, _, err = finished(start(command, *args, stdout=full))
    assert code == 1
    assert err.splitlines()[-1] == "phicore: standard output: No space left on device"
    assert "Traceback" not in err


@posix
def test_stdin_that_is_closed(start, tiny: Path) -> None:
    code, out, err = finished(start("generate", "-m", tiny, redirect="<&-"))
    assert (code, out) == (2, "")
    assert err == "phicore: no text: standard input is closed; give the text as an argument\n"


@posix
def test_stderr_that_is_closed_does_not_matter(start, tiny: Path) -> None:
    args = ("generate", "-m", tiny, "-b", "numpy", "-n", 4, "-t", 0, "Hello")
    code, out, _ = finished(start(*args, redirect="2>&-"))
    assert code == 0
    assert out == finished(start(*args))[1]
    assert finished(start("inspect", "no-model", redirect="2>&-"))[:2] == (1, "")


def test_stdin_is_read_strictly_in_the_c_locale(start, tiny: Path) -> None:
    """Python decodes bytes that are not text to lone surrogates in the C locale."""
    env = {**os.environ, "LC_ALL": "C"}
    code, out, err = finished(start("tokenize", "-m", tiny, "-", env=env), b"a\xffb")
    assert (code, out) == (2, "")
    assert err.startswith("phicore: standard input is not utf-8 text: ")


def test_output_in_an_encoding_that_lacks_characters(start, tiny: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code, out, err = finished(start("tokenize", "-m", tiny, "the", env=env))
    assert (code, err) == (0, "")
    assert out.split() == ["1", "<s>", "263", "?the"]


def in_terminal(*args: object, interrupt_at: bytes = b"", **env: str) -> tuple[int, str]:
    """Run the command on a terminal; return its exit code and its output.

    All its streams are on the terminal. Ctrl-C is pressed when the output `interrupt_at` appears.
    """
    import pty

    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "phicore", *map(str, args)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"} | env,
    )
    os.close(terminal)
    out = b""
    while True:
        try:
            data = os.read(controller, 65536)
        except OSError:  # Linux raises this when the other side is closed
            break
        if not data:
            break
        out += data
        if interrupt_at and interrupt_at in out:
            process.send_signal(signal.SIGINT)
            interrupt_at = b""
    os.close(controller)
    return process.wait(timeout=60), out.decode()


@posix
def test_terminal_shows_the_text_after_the_progress_is_gone(tiny: Path, phicore) -> None:
    args = ("generate", "-m", tiny, "-b", "numpy", "-n", 8, "-t", 0, "--seed", 1, "Hello")
    code, out = in_terminal(*args)
    assert code == 0
    text = phicore(*args).out.rstrip("\n")
    assert text in out.replace("\r\n", "\n")
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") > 0  # the cursor is back
    assert out.index("loading") < out.index("\x1b[?25h")
    assert "seed 1" in re.sub(r"\x1b\[[\d;]*m", "", out)


@posix
@pytest.mark.complete
def test_terminal_shows_how_far_a_benchmark_is(tiny: Path) -> None:
    args = ("bench", "-m", tiny, "-b", "numpy", "-p", 8, "-n", 250, "-r", 6)
    code, out = in_terminal(*args)
    assert code == 0
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out)
    assert re.search(r"measuring tg250: run \d of 6, \d+ of 251 tokens, \d+ s left", plain)
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") > 0


@posix
def test_interrupt_while_compiling_gives_the_cursor_back(tiny: Path, tmp_path: Path) -> None:
    """JAX sometimes swallows the exception, and then crashes when Python ends."""
    pytest.importorskip("phicore_jax", reason="install phicore-jax")
    args = ("generate", "-m", tiny, "-b", "jax", "-n", 300, "Hello")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)}  # an empty one
    code, out = in_terminal(*args, interrupt_at=b"compiling", **cache)
    assert code == 130
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") > 0
    assert "Traceback" not in out


@posix
def test_no_prompt_on_a_terminal_does_not_wait(tiny: Path) -> None:
    code, out = in_terminal("generate", "-m", tiny)
    assert code == 2
    assert out.startswith("phicore: no text: give it as an argument")


@posix
def test_table_on_a_terminal_is_not_cut() -> None:
    code, out = in_terminal("models")
    assert code == 0
    plain = re.sub(r"\x1b\[[\d;]*m|\s", "", out)
    assert "…" not in plain
    assert "mini-4k-instruct-q4.gguf" in plain.replace("phi-3-mini-fp16", "")


# ---- shell completion ------------------------------------------------------------------------


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs the installed command as a shell's completion does."""
    command = shutil.which("phicore", path=sysconfig.get_path("scripts"))
    assert command is not None

    def run(*args: str, **variables: str) -> str:
        env = {**os.environ, "HOME": str(tmp_path), **variables}
        done = subprocess.run([command, *args], env=env, capture_output=True, timeout=60)
        assert done.stderr == b""
        return done.stdout.decode()

    return run


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("phicore gen", ["generate"]),
        ("phicore generate --repeat", ["--repeat-penalty", "--repeat-last-n"]),
        ("phicore inspect --js", ["--json"]),
    ],
)
def test_completion_in_bash(shell, line: str, expected: list[str]) -> None:
    words = str(len(line.split()) - 1)
    out = shell(_PHICORE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=words)
    assert sorted(out.split()) == sorted(expected)


def test_completion_is_shown_and_installed(shell, tmp_path: Path) -> None:
    detect = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert "_PHICORE_COMPLETE=complete_bash" in shell("--show-completion", "bash", **detect)
    assert "completion installed" in shell("--install-completion", "bash", **detect)
    (script,) = [p for p in tmp_path.rglob("*") if p.is_file() and "phicore" in p.name]
    assert "_PHICORE_COMPLETE=complete_bash" in script.read_text()
    assert "phicore" in (tmp_path / ".bashrc").read_text()
