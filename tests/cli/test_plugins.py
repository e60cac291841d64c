"""Tests of `phicore plugins`, of commands of plugins and of disabling plugins."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from unit.throwaway import Install, install

__all__ = ["install"]

HELLO = """
    import typer
    from phicore import ArgumentError, hookimpl

    @hookimpl
    def phicore_register_commands(register):
        def hello(name: str, loud: bool = False):
            "Say hello."
            if name == "nobody":
                raise ArgumentError("name: there is nobody")
            print(f"hello {name}" + "!" * loud)
            if name == "bye":
                raise typer.Exit(3)

        register("hello", hello)
        register("OTHER", hello)
"""


@pytest.fixture(autouse=True)
def _switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHICORE_DISABLE_PLUGINS", "")  # --no-plugins sets it


def test_plugins_lists_what_each_provides(phicore: Callable) -> None:
    result = phicore("plugins")
    assert result.code == 0
    header, *rows = [line.split() for line in result.out.splitlines()]
    assert header == ["name", "distribution", "version", "status"]
    assert ["numpy", "phicore-numpy", "0.1.0", "backend", "numpy"] in rows


def test_plugins_that_are_switched_off_are_listed(
    phicore: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHICORE_DISABLE_PLUGINS", "numpy")
    rows = {row["name"]: row for row in json.loads(phicore("plugins", "--json").out)}
    assert rows["numpy"]["status"] == "switched off"
    assert phicore("tokenize", "x", "--model", "nosuch").code == 1
    assert "no backend 'numpy'" in phicore("generate", "-b", "numpy", "x").err


def test_no_plugins_keeps_phicore_s_own_backends(phicore: Callable) -> None:
    rows = json.loads(phicore("--no-plugins", "plugins", "--json").out)
    assert "backend numpy" in [row["status"] for row in rows]


def test_commands_of_plugins_are_phicore_s(phicore: Callable, install: Install) -> None:
    install("greeter", "greeter", HELLO.replace("OTHER", "hi"))
    assert "Say hello." in phicore("--help").out
    assert phicore("hello", "world", "--loud").out == "hello world!\n"
    assert phicore("hi", "bye").code == 3
    failed = phicore("hello", "nobody")
    assert (failed.code, failed.err) == (2, "phicore: name: there is nobody\n")
    assert phicore("hello").err.startswith("phicore: Missing argument")
    row = {row["name"]: row for row in json.loads(phicore("plugins", "--json").out)}["greeter"]
    assert row["status"] == "commands hello, hi"
    assert "No such command" in phicore("--no-plugins", "hello", "world").err


def test_command_of_a_plugin_does_not_replace_one(phicore: Callable, install: Install) -> None:
    install("greeter", "greeter", HELLO.replace("OTHER", "generate"))
    assert phicore("generate", "--help").out.startswith("Usage: phicore generate [OPTIONS]")
    assert "the command 'generate' exists already" in phicore("plugins").out
    assert phicore("hello", "x").out == "hello x\n"


def test_fault_of_a_plugin_is_a_line_that_names_it(phicore: Callable, install: Install) -> None:
    install("greeter", "greeter", HELLO.replace("OTHER", "hi").replace("raise Arg", "1 / 0; Arg"))
    failed = phicore("hello", "nobody")
    assert failed.code == 1
    assert failed.err == (
        "phicore: greeter failed: ZeroDivisionError: division by zero "
        "(throwaway_greeter.py, line 10)\n"
    )


def test_command_that_typer_cannot_read_stops_no_other(phicore: Callable, install: Install) -> None:
    code = HELLO.replace("name: str", "name: Nowhere").replace("OTHER", "hi")
    install("greeter", "greeter", "    from __future__ import annotations\n" + code)
    assert phicore("--help").code == 0
    assert "not usable: NameError" in phicore("plugins").out
    assert phicore("hello", "x").err.startswith("phicore: No such command")


def test_errors_of_a_command_are_its_own(phicore: Callable, install: Install) -> None:
    code = HELLO.replace("OTHER", "hi").replace('"name: there', '"model: it')
    install("greeter", "greeter", code.replace('print(f"hello', 'raise OSError("slow"); print(f"'))
    assert phicore("hello", "nobody").err == "phicore: model: it is nobody\n"  # it has no --model
    failed = phicore("hello", "x")
    assert failed.code == 1
    assert failed.err.startswith("phicore: greeter failed: OSError: slow (throwaway_greeter.py")


def test_what_a_command_returns_is_no_exit_code(phicore: Callable, install: Install) -> None:
    code = HELLO.replace("OTHER", "hi").replace("raise typer.Exit(3)", "return True")
    install("greeter", "greeter", code)
    assert phicore("hello", "bye").code == 0


def test_no_plugins_leaves_out_what_the_user_has_left_out(
    phicore: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHICORE_DISABLE_PLUGINS", "numpy")
    rows = json.loads(phicore("--no-plugins", "plugins", "--json").out)
    assert {row["name"]: row["status"] for row in rows}["numpy"] == "switched off"
