"""Tests of `phicore chat` without a terminal: pipes, options and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from api.tiny_models import with_value, write_tiny

import phicore as library
from phicore.chat.store import Store

posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture
def chat(phicore: Callable, tiny: Path) -> Callable:
    """Return a function that runs `phicore chat` with lines on standard input."""

    def run(*args: object, lines: str = "", model: object = tiny):
        given = ["-m", model] if model is not None else []
        return phicore("chat", *given, "-b", "numpy", "-n", 8, *args, stdin=lines.encode())

    return run


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chats"


def newest(chats: Path):
    store = Store(chats, 0)
    return store.load(store.names()[0])


def test_each_line_is_a_turn_and_standard_output_has_the_answers(chat, phicore, tiny) -> None:
    """The first answer is that of `phicore generate` with the same seed."""
    result = chat("--seed", 3, lines="Tell me of the sea\nand then?\n")
    talk_args = ("-m", tiny, "-b", "numpy", "-n", 8, "--seed", 3, "Tell me of the sea")
    first = phicore("generate", *talk_args).out
    assert result.code == 0
    assert result.out.startswith(first)
    assert len(result.out) > len(first)
    assert [line.split(":")[0] for line in result.err.splitlines()] == ["loading"]


def test_text_is_that_of_the_library(chat, tiny: Path, chats: Path) -> None:
    result = chat("--seed", 3, "-t", 2, "-s", "the sea", lines="Hello\nmore\n")
    talk = newest(chats)
    with library.load(tiny, "numpy") as model:
        texts = [
            model.generate(
                talk.messages_of(turn), seed=turn.seed, max_tokens=8, temperature=2
            ).text()
            for turn in talk.turns
        ]
    assert [turn.seed for turn in talk.turns] == [3, 4]
    assert texts == [turn.answer for turn in talk.turns]
    assert result.out == "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


def test_json_says_what_a_turn_has_cost(chat, chats: Path) -> None:
    lines = "Tell me of the sea and of the wind\nand more\n/undo\nor else\n/retry\n"
    result = chat("--json", "--seed", 1, lines=lines)
    first, second, other, again = map(json.loads, result.out.splitlines())
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] >= first["prompt_tokens"]
    assert other["cached_tokens"] >= first["prompt_tokens"]
    assert again["cached_tokens"] == other["prompt_tokens"] - 1
    assert [answer["seed"] for answer in (first, second, other, again)] == [1, 2, 3, 4]
    assert again["text"] == newest(chats).turns[3].answer
    assert first["finish_reason"] in ("length", "stop")


def test_resume_goes_on_in_another_process_and_reads_what_is_new(chat, start, chats, tiny) -> None:
    chat("--seed", 1, "--top-k", 7, "-s", "the wind", lines="Tell me of the sea and of the wind\n")
    [rows] = chats.glob("*.rows")
    assert stat.S_IMODE(rows.stat().st_mode) == 0o600
    process = start("chat", "--resume", "-b", "numpy", "--json", "--seed", "5")
    out, err = process.communicate(b"and more\n", timeout=60)
    said = json.loads(out)
    talk = newest(chats)
    first, second = talk.turns
    assert said["cached_tokens"] >= first.prompt_tokens
    assert f"model: {tiny} (the conversation's)" in err.decode()
    assert second.options["top_k"] == 7
    assert second.system == "the wind"
    assert len(list(chats.glob("*.json"))) == 1


def test_load_takes_a_conversation_by_its_name(chat, chats: Path) -> None:
    chat(lines="first\n/save one\n/clear\nsecond\n/save two\n")
    os.utime(chats / "one.json", (1, 1))
    chat("--load", "one", lines="third\n")
    assert [turn.user for turn in Store(chats, 0).load("one").turns] == ["first", "third"]
    os.utime(chats / "two.json")
    assert "second" in chat("--resume", lines="/sessions\n").err
    result = chat("--load", "three")
    assert (result.code, result.out) == (1, "")
    assert result.err == "phicore: there is no conversation 'three'; /sessions lists them\n"
    assert chat("--load", "../one").err.startswith("phicore: the name of a conversation has ")


def test_damaged_file_is_told_and_the_next_one_resumed(chat, chats: Path) -> None:
    assert chat("--resume").err == "phicore: there is no conversation to resume\n"
    chat(lines="first\n/save one\n")
    (chats / "two.json").write_text("{")
    result = chat("--resume", lines="second\n")
    assert f"{chats / 'two.json'}: damaged: " in result.err
    assert [turn.user for turn in Store(chats, 0).load("one").turns] == ["first", "second"]


def test_damaged_rows_are_told_and_the_text_is_the_same(chat, chats: Path) -> None:
    chat("--seed", 1, lines="Tell me of the sea and of the wind\n")
    [rows] = chats.glob("*.rows")
    data = bytearray(rows.read_bytes())
    good = chat("--resume", "--seed", 5, lines="more\n/undo\n")
    data[-50] ^= 1
    rows.write_bytes(data)
    bad = chat("--resume", "--seed", 5, lines="more\n")
    assert "the conversation is read again: " in bad.err
    assert bad.out == good.out
    assert bad.code == 0


def test_no_history_writes_nothing(chat, tmp_path: Path) -> None:
    assert chat("--no-history", lines="Hello\n/stats\n").code == 0
    assert not (tmp_path / "data").exists()
    result = chat("--no-history", "--resume")
    assert (result.code, result.err) == (2, "phicore: --resume: not together with --no-history\n")


def test_saved_size_limits_the_rows(chat, chats: Path) -> None:
    chat("--saved-size", "0", lines="Tell me of the sea and of the wind\n")
    assert [path.suffix for path in chats.iterdir()] == [".json"]
    chat(lines="Tell me of the sea and of the wind\n")
    chat(lines="Tell me of the wind and of the sea\n")
    sizes = sorted(path.stat().st_size for path in chats.glob("*.rows"))
    assert len(sizes) == 2
    chat("--saved-size", str(int(1.5 * sizes[0])), lines="Tell me of the ice and of the sea\n")
    assert len(list(chats.glob("*.rows"))) == 1


def test_block_is_one_message_and_the_end_ends_it(chat, chats: Path) -> None:
    chat(lines='"""one\n\n two\n"""\n//three\n\n"""four\n')
    assert [turn.user for turn in newest(chats).turns] == ["one\n\n two", "/three", "four"]


def test_message_as_argument_comes_first(chat, chats: Path) -> None:
    chat("Hello", lines="more\r\n")
    assert [turn.user for turn in newest(chats).turns] == ["Hello", "more"]


def test_commands_work_and_do_not_speak_on_standard_output(chat, chats: Path) -> None:
    lines = "/set temperature 0\n/system the sea\n/help\n/seed 7\n/sessions\n/bye\nnever sent\n"
    result = chat(lines=lines)
    assert (result.code, result.out) == (0, "")
    assert "temperature 0" in result.err
    assert "/retry [SEED]" in result.err
    assert not chats.exists()


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/nothing", "there is no command /nothing; /help lists them"),
        ("/set temperature 1e9", "temperature: expected 0 (greedy), or 1e-6 to 1e6, got 10000000"),
        ("the sea " * 200, "the message is not sent: with it, the conversation has "),
        ("/edit", "there is no message to edit"),
        ("/copy", "there is no answer to copy"),
    ],
)
def test_what_fails_is_told_in_a_line_and_in_the_exit_code(chat, line: str, error: str) -> None:
    result = chat(lines=f"{line}\nHello\n")
    assert result.code == 1
    assert [found for found in result.err.splitlines() if found.startswith(error)]
    assert result.out  # the rest goes on
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["-t", -1], "--temperature: expected 0 (greedy), or 1e-6 to 1e6, got -1.0"),
        (["--seed", -1], "--seed: expected 0 to 2**64 - 1, got -1"),
        (["-n", 0], "--max-tokens: expected 1 or more, or -1 (until the context is full), got 0"),
        (["--saved-size", "much"], "--saved-size: expected a size such as 4GB, got 'much'"),
        (["--kv-memory", "0"], "--kv-memory: expected a size such as 4GB, got '0'"),
        (["--stop", ""], "--stop: "),
        (["--rope-factors", "short"], "--rope-factors: expected auto or long, got 'short'"),
        (["--processor", "x"], "--processor: expected one of logit-bias"),
    ],
)
def test_options_are_checked(chat, args: list[object], error: str) -> None:
    result = chat(*args, lines="Hello\n")
    assert (result.code, result.out) == (2, "")
    assert result.err.splitlines()[-1].startswith(f"phicore: {error}")


def test_standard_input_that_is_no_text(phicore, tiny: Path, start) -> None:
    process = start("chat", "-m", tiny, "-b", "numpy", "-n", 4, env={**os.environ, "LC_ALL": "C"})
    out, err = process.communicate(b"a\xffb\n", timeout=60)
    assert (process.returncode, out) == (2, b"")
    assert "phicore: standard input is not utf-8 text: " in err.decode()


def test_model_without_a_chat_template_is_one_line(chat, tmp_path: Path) -> None:
    refuses = "{{ raise_exception('talk to the hand') }}"
    path = write_tiny(tmp_path / "m.gguf", with_value("tokenizer.chat_template", refuses))
    result = chat(lines="Hello\n", model=path)
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1] == "phicore: m.gguf: chat template: talk to the hand"


def test_warning_of_a_template_is_told_once(chat, tmp_path: Path) -> None:
    drops = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
        "{{ '<|assistant|>' }}"
    )
    path = write_tiny(tmp_path / "m.gguf", with_value("tokenizer.chat_template", drops))
    result = chat("--seed", 1, lines="Hello\nand more\nand more\n", model=path)
    assert result.code == 0
    assert result.err.splitlines()[1:] == [
        "chat template: it leaves out messages: assistant",
        "chat template: it leaves out messages: assistant, assistant",
    ]


ENDLESS = ("-b", "numpy", "-n", 19000, "-t", 0, "--repeat-penalty", 1)


def finished(process) -> tuple[int, bytes, str]:
    """Return the exit code, the rest of standard output, and standard error."""
    out, err = process.stdout.read(), process.stderr.read()
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    return process.wait(timeout=60), out, err.decode()


@posix
def test_interrupt_keeps_what_is_there_and_exits_130(start, endless: Path, chats: Path) -> None:
    process = start("chat", "-m", endless, *ENDLESS)
    process.stdin.write(b"Hello\nnever sent\n")
    process.stdin.flush()
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    code, out, err = finished(process)
    assert code == 130
    assert "Traceback" not in err
    [turn] = newest(chats).turns
    assert turn.finish_reason == "interrupted"
    assert (first + out).decode() == turn.answer + ("" if turn.answer.endswith("\n") else "\n")
    assert list(chats.glob("*.rows"))


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_that_ends_the_program_keeps_what_is_there(name, start, endless, chats) -> None:
    process = start("chat", "-m", endless, *ENDLESS)
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    process.stdout.read(20)
    number = getattr(signal, name)
    process.send_signal(number)
    code, _, err = finished(process)
    assert code == 128 + number
    assert "Traceback" not in err
    assert newest(chats).turns[0].answer


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_before_the_answer_begins_keeps_the_message(name, start, endless, chats) -> None:
    """The model reads the message for seconds, and the file has it from the beginning."""
    process = start("chat", "-m", endless, *ENDLESS)
    message = "the sea and the wind and " * 600
    process.stdin.write(f"{message}\n".encode())
    process.stdin.flush()
    end = time.monotonic() + 60
    while not list(chats.glob("*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    number = getattr(signal, name)
    process.send_signal(number)
    code, out, err = finished(process)
    assert code == 128 + number, err
    [turn] = newest(chats).turns
    assert turn.user == message
    assert turn.is_lost
    assert out == b""


@posix
def test_signal_while_it_waits_ends_it_too(start, tiny: Path, chats: Path) -> None:
    process = start("chat", "-m", tiny, "-b", "numpy", "-n", 8)
    process.stdin.write(b"Tell me of the sea and of the wind\n")
    process.stdin.flush()
    process.stdout.readline()
    end = time.monotonic() + 30
    while not newest(chats).turns[0].answer and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    assert list(chats.glob("*.rows"))


@posix
def test_closed_pipe_ends_quietly(start, endless: Path, chats: Path) -> None:
    process = start("chat", "-m", endless, *ENDLESS)
    process.stdin.write(b"Hello\n")
    process.stdin.flush()
    process.stdout.read(5)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141
    assert "Traceback" not in err.decode()
    assert newest(chats).turns[0].answer


def test_help_says_what_the_commands_do_without_a_terminal(chat) -> None:
    err = chat(lines="/help set\n/help top_k\n").err
    assert "/set [NAME [VALUE]]" in err
    assert re.search(r"top_k\nKeep the k most probable", err)


def test_guesses_change_no_answer(chat, tiny: Path) -> None:
    lines = "Tell me of the sea\nand then?\n"
    plain = chat("--seed", 3, "-n", 40, "--no-history", lines=lines)
    for given in (["--speculation"], ["--draft-model", tiny]):
        found = chat("--seed", 3, "-n", 40, "--no-history", *given, lines=lines)
        assert (found.code, found.out) == (0, plain.out)
    refused = chat("--no-speculation", "--draft-model", tiny, lines=lines)
    assert refused.code == 2
