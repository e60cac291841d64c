"""The command `phicore serve`, and its options, which commands of plugins may have, too."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from phicore.backend.options import BackendOptions
from phicore.cli.options import (
    BackendOption,
    ContextOption,
    DraftModelOption,
    KvMemoryOption,
    ModelOption,
    ParallelOption,
    SpeculationOption,
    TokenizerOption,
    bytes_of,
    guessing,
    model_or_default,
    takes,
    takes_those_of,
)
from phicore.errors import ArgumentError
from phicore.server.plan import Plan, check_packages
from phicore.server.settings import Settings
from phicore.team.options import TeamOptions

BACKLOG = 512
"""Number of clients that may wait to be accepted."""
EXAMPLES = """
\b
Examples:
  phicore serve
  phicore serve -m phi-3-mini --port 8000 --warmup
  phicore serve --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8080/v1/chat/completions -d \\
    '{"messages": [{"role": "user", "content": "Hi"}]}'
"""


class Serving(NamedTuple):
    """What to serve, and where."""

    plan: Plan
    host: str
    port: int


@takes("settings", Settings)
@takes("backend_options", BackendOptions)
@takes("team_options", TeamOptions)
def chosen(
    *,
    model: ModelOption = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The address to listen at. One that others can reach needs --api-key, "
            "--api-key-file or --insecure.",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, max=65535, help="The port. 0 takes a free one."),
    ] = 8080,
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another name by which clients may call the model. May be given several times.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Answer only clients that send this key. May be given several times. Other users "
            "of this machine can see it; a file keeps it from them.",
            envvar="PHICORE_API_KEY",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read keys from this file, one a line."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen at any address without a key."),
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name of this server that clients may use, beside localhost and addresses; * "
            "allows all. May be given several times.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="An origin such as https://example.org whose pages may use the server; * allows "
            "all. May be given several times.",
        ),
    ] = None,
    settings: dict[str, Any],
    parallel: ParallelOption = 8,
    ctx: ContextOption = None,
    kv_memory: KvMemoryOption = None,
    prefix_cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most memory in which beginnings of prompts are remembered, such as 1GB; 0 "
            "remembers none. [an eighth of the memory, at most 2GB]",
        ),
    ] = None,
    speculation: SpeculationOption = None,
    draft_model: DraftModelOption = None,
    tokenizer: TokenizerOption = None,
    backend: BackendOption = None,
    backend_options: dict[str, Any],
    team_options: dict[str, Any],
    log_format: Annotated[
        str, typer.Option(metavar="text|json", help="How logs are written on standard error.")
    ] = "text",
    log_level: Annotated[
        str, typer.Option(metavar="debug|info|warning|error", help="What is logged.")
    ] = "info",
) -> Serving:
    """Return what the options of a server say, after all of them are checked.

    Raises:
        PhicoreError: If an option is wrong, or a package that the server needs is not installed.
    """
    checked = Settings(**settings)
    BackendOptions(**backend_options)
    TeamOptions(**team_options)
    kv_bytes = None if kv_memory is None else bytes_of(kv_memory)
    guesses = guessing(speculation, draft_model)
    prefix_bytes = None if prefix_cache is None else _prefix_bytes(prefix_cache)
    if log_format not in ("text", "json"):
        raise ArgumentError(parameter="log_format", expected="text or json", got=log_format)
    if log_level not in ("debug", "info", "warning", "error"):
        expected = "debug, info, warning or error"
        raise ArgumentError(parameter="log_level", expected=expected, got=log_level)
    keys = [*(api_key or ()), *(() if api_key_file is None else _keys_in(api_key_file))]
    if any(not key.strip() for key in keys):
        raise ArgumentError("a key must not be empty", parameter="api_key")
    if not (keys or insecure or _is_local(host)):
        raise ArgumentError(
            f"others can reach {host}; give --api-key or --api-key-file, or --insecure to answer "
            "everybody",
            parameter="host",
        )
    _check_names(alias or (), allowed_host or (), cors_origin or ())
    check_packages()
    from phicore.cli.terminal import Console

    hosts = list(allowed_host or ())
    if not _is_local(host):
        # With a key, a page that lets its name point here has nothing to send.
        hosts += ["*"] if keys and not allowed_host else [host]
    reference = model_or_default(model, Console().say)
    plan = Plan(
        reference,
        loading={
            "backend": backend,
            "ctx": ctx,
            "tokenizer": tokenizer,
            "max_sequences": parallel,
            "kv_memory": kv_bytes,
            "prefix_cache_bytes": prefix_bytes,
            **guesses,
            **backend_options,
            **team_options,
        },
        names=(name_of(reference), *(alias or ())),
        settings=checked,
        api_keys=tuple(keys),
        allowed_hosts=tuple(hosts),
        cors_origins=tuple(cors_origin or ()),
        log_format=log_format,
        log_level=log_level,
    )
    return Serving(plan, host, port)


@takes_those_of(chosen, "serving")
def serve(*, serving: Serving) -> None:
    """Serve a model to programs, with OpenAI's API, and to people, with a page.

    The server listens at once and tells at /health when the model is loaded. SIGTERM and Ctrl-C
    let it finish what is under way.
    """
    from phicore.cli.serving import run

    serving.plan.prepare_process()
    run(listening(serving.host, serving.port), serving.plan)


def _check_names(aliases: Sequence[str], hosts: Sequence[str], origins: Sequence[str]) -> None:
    """Refuse names that no request could ever have."""
    for alias in aliases:
        if not alias.strip():
            raise ArgumentError("a name must not be empty", parameter="alias")
    for host in hosts:
        if re.search(r"[/:\s]", host) or not host:
            expected = "a name without scheme, port and path, such as llm.example.org, or *"
            raise ArgumentError(parameter="allowed_host", expected=expected, got=host)
    for origin in origins:
        if origin not in ("*", "null") and not re.fullmatch(
            r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin
        ):
            expected = "a scheme, a host and perhaps a port, such as https://example.org, or *"
            raise ArgumentError(parameter="cors_origin", expected=expected, got=origin)


def _prefix_bytes(text: str) -> int:
    if text.strip() == "0":
        return 0
    try:
        return bytes_of(text)
    except ArgumentError as error:
        expected = "a size such as 1GB, or 0"
        raise ArgumentError(parameter="prefix_cache", expected=expected, got=error.got) from None


def _keys_in(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}", parameter="api_key_file") from None
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}: not UTF-8 text", parameter="api_key_file") from None
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ArgumentError(f"{path}: there is no key in it", parameter="api_key_file")
    return keys


def _is_local(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_of(reference: str) -> str:
    """Return the name of a model for clients: that of its file, or the reference."""
    is_path = reference.endswith(".gguf") and ":" not in reference
    return Path(reference).stem if is_path or os.path.sep in reference[:2] else reference


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Clients may connect at once; they wait until it accepts."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ArgumentError(f"{host}: {error.strerror}", parameter="host") from None
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        problem = f"cannot listen at {host}:{port}: {error.strerror}"
        raise ArgumentError(problem, parameter="port") from None
    return found
