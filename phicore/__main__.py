"""The program `phicore`. It runs a command, and turns an error into one line and an exit code."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
from typing import Any, NoReturn

import typer

from phicore import cli
from phicore.cli.terminal import printable
from phicore.errors import ArgumentError, PhicoreError

COLLECT_AFTER = 50_000
"""Number of new objects after which Python looks for unused ones. To import JAX makes many objects,
and Python's own number makes that a quarter longer."""
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main() -> NoReturn:
    """Run the command line and exit.

    Every error that a user can cause becomes one line on standard error and an exit code.
    """
    gc.set_threshold(COLLECT_AFTER)
    if sys.stderr is None:  # closed by the shell
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if sys.stdout is None:
        sys.exit(_fail("standard output is closed", 1))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding that lacks a character prints "?"
    # Without this, huggingface_hub would send a request to the Hub once a day, even for a cached
    # model.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code: Any
    try:
        code = cli.app(standalone_mode=False, prog_name="phicore")
        sys.stdout.flush()
    except ArgumentError as error:
        is_foreign = _fault(error) is not None and not _is_of_a_plugin()
        code = _fail(error.worded(str if is_foreign else _as_option), 2)
    except PhicoreError as error:
        is_option = error.parameter is not None and _as_option(error.parameter) != error.parameter
        code = _fail(error.worded(_as_option), 2 if is_option else error.exit_code)
    except typer.TyperException as error:
        code = _fail_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except SystemExit as exit:  # typer and rich raise this for a closed pipe
        broken = isinstance(exit.__context__, BrokenPipeError)
        code = EXIT_BROKEN_PIPE if broken else exit.code
    except BrokenPipeError:
        _discard_stdout()
        code = EXIT_BROKEN_PIPE
    except OSError as error:
        fault = _fault(error)
        if fault is None:  # for example a full disk; errors of model files are handled elsewhere
            _discard_stdout()
            fault = f"{error.filename or 'standard output'}: {error.strerror or error}"
        code = _fail(fault, 1)
    except MemoryError:
        code = _fail("not enough memory; a smaller quantization or --ctx needs less", 1)
    except Exception as error:
        if (fault := _fault(error)) is None:
            raise  # a bug in phicore; the user can report the traceback
        code = _fail(fault, 1)
    if code == EXIT_INTERRUPTED:
        # Exit at once, since an interrupted library may crash when Python shuts down. JAX does.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _tell_of_writing()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # otherwise a Ctrl-C now prints a traceback
    sys.exit(code or 0)


def _tell_of_writing() -> None:
    """Tell a user that the process ends when it has written packed weights."""
    writing = sys.modules.get("phicore.disk.writing")
    if writing is not None and writing.is_writing() and sys.stderr.isatty():
        sys.stderr.write("keeping packed weights for the next start; Ctrl-C leaves them out\n")


def _fault(error: Exception) -> str | None:
    """Return a message for an error that a plugin's code raised, or None for other errors."""
    from phicore.plugins import Plugins

    return Plugins().blame(error)


def _fail(message: str, code: int) -> int:
    # A message may quote a file, and a terminal must not obey it.
    sys.stderr.write(f"phicore: {printable(' '.join(message.split()))}\n")
    return code


def _fail_usage(error: typer.TyperException) -> int:
    """Report a wrong option or command, and return the exit code."""
    message = _of_a_value(error) or error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "phicore"
    return _fail(f"{message}; see {command} --help", error.exit_code)


def _of_a_value(error: typer.TyperException) -> str | None:
    """Return the message for a value of the wrong type or range, or None for other errors.

    Typer's own words come from pydantic, speak of "Input", and leave out the value.
    """
    parameter: Any = getattr(error, "param", None)
    cause: Any = error.__cause__
    if parameter is None or not hasattr(cause, "errors"):
        return None
    found = cause.errors()[0]
    bounds = found.get("ctx", {})
    if "ge" in bounds:
        expected = f"{bounds['ge']:g} or more"
    elif "le" in bounds:
        expected = f"{bounds['le']:g} or less"
    else:
        expected = "an integer" if found["type"].startswith("int") else "a number"
    got = found["input"]
    return ArgumentError(parameter=parameter.opts[0], expected=expected, got=got).worded()


def _as_option(parameter: str) -> str:
    """Return a parameter's option, such as --top-k, or its name if there is no such option."""
    command = typer.main.get_command(cli.app).get_command(None, _command())  # type: ignore[attr-defined]
    for each in command.params if command is not None else ():
        if each.name == parameter and each.opts[0].startswith("--"):
            return each.opts[0]
    return parameter


def _is_of_a_plugin() -> bool:
    """Return whether the command is a plugin's, whose errors are about its own options."""
    return _command() not in typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def _command() -> str:
    """Return the command, the first argument without a dash: options before it take no values."""
    return next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")


def _discard_stdout() -> None:
    """Redirect standard output to the null device, since Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
