"""The commands of `phicore`: their options, and their output.

A command prints its result, and nothing else, on standard output. Everything else goes to standard
error (see `terminal.py`). Modules that are slow to import are imported by the command that needs
them.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Annotated, Any

import typer

from phicore.cli.bench import EXAMPLES as BENCH
from phicore.cli.bench import bench
from phicore.cli.cache import cache
from phicore.cli.chat import EXAMPLES as CHAT
from phicore.cli.chat import chat
from phicore.cli.conformance import EXAMPLES as CONFORMANCE
from phicore.cli.conformance import conformance
from phicore.cli.doctor import EXAMPLES as DOCTOR
from phicore.cli.doctor import doctor
from phicore.cli.generate import EXAMPLES as GENERATE
from phicore.cli.generate import generate
from phicore.cli.inspect import inspect, tokenize
from phicore.cli.join import EXAMPLES as JOIN
from phicore.cli.join import join
from phicore.cli.listings import as_command, backends, models, plugins
from phicore.cli.new_backend import new_backend
from phicore.cli.parity import EXAMPLES as PARITY
from phicore.cli.parity import parity
from phicore.cli.serve import EXAMPLES as SERVE
from phicore.cli.serve import serve


class WithPlugins(typer.core.TyperGroup):
    """The group of phicore's commands, followed by the commands of plugins."""

    @cached_property
    def _of_plugins(self) -> dict[str, Any]:
        from phicore.plugins import Plugins

        return Plugins().commands(as_command, taken=list(self.commands))

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(self._of_plugins)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        own = super().get_command(ctx, cmd_name)
        return own if own is not None else self._of_plugins.get(cmd_name)


app = typer.Typer(
    name="phicore",
    cls=WithPlugins,
    rich_markup_mode=None,  # plain help: it fits 80 columns, and needs no import of rich
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Phi-3, Llama, Mistral, SmolLM2 and Qwen2 models from GGUF files, with JAX, MLX or "
    "NumPy.",
    epilog="""
\b
Examples:
  phicore generate "Give me three tips for better sleep."
  phicore chat
  phicore generate -m path/to/model.gguf -b jax -t 0 "Why is the sky blue?"
  phicore serve -m phi-3-mini
  phicore bench --synthetic phi-3-mini
  phicore inspect phi-3-mini
  echo "Hello world" | phicore tokenize
""",
)


def _switch_plugins_off(is_off: bool) -> None:
    if is_off:
        from phicore.plugins import DISABLE

        os.environ[DISABLE] = f"{os.environ.get(DISABLE, '')},*"


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
    no_plugins: Annotated[
        bool,
        typer.Option(
            "--no-plugins",
            help="Load only what phicore itself has and the backends jax, mlx and numpy.",
            is_eager=True,
            callback=_switch_plugins_off,  # runs before plugins are searched for the command
        ),
    ] = False,
) -> None:
    if version:
        from phicore import __version__

        print(f"phicore {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


app.command(epilog=GENERATE)(generate)
app.command(epilog=SERVE)(serve)
app.command(epilog=JOIN)(join)
app.command(epilog=CHAT)(chat)
app.command(epilog=BENCH)(bench)
app.command()(inspect)
app.command()(tokenize)
app.command(epilog=PARITY)(parity)
app.command(epilog=CONFORMANCE)(conformance)
app.command("new-backend")(new_backend)
app.command()(plugins)
app.command()(backends)
app.command()(models)
app.add_typer(cache, name="cache")
app.command(epilog=DOCTOR)(doctor)
