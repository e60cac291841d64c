"""The Python API: `load` makes a `Model` from a reference, and `join` helps a process that does."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

from phicore.backend import BackendOptions
from phicore.engine.drafts import Drafter
from phicore.engine.request import is_integer
from phicore.engine.scheduler import MAX_SEQUENCES, SIZES
from phicore.engine.team import ALONE
from phicore.errors import ArgumentError, PhicoreError
from phicore.model import SPECULATION, Model
from phicore.plugins import Plugins, choose_backend
from phicore.progress import Progress, silent
from phicore.sources import default_reference, resolve
from phicore.team.follower import Follower
from phicore.team.leader import Leader
from phicore.team.member import Member
from phicore.team.options import TeamOptions


def load(
    ref: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    *,
    ctx: int | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    max_sequences: int = MAX_SEQUENCES,
    prefix_cache_bytes: int | None = None,
    kv_memory: int | None = None,
    speculation: bool | Drafter = SPECULATION,
    draft_model: str | os.PathLike[str] | Model | None = None,
    processes: int = 1,
    coordinator: str | None = None,
    team: Member | None = None,
    **options: Any,
) -> Model:
    """Load a model.

    With JAX on a CPU this returns while a thread still packs the weights. What needs them waits,
    and its steps are compiled meanwhile; `Model.wait_until_loaded` only waits.

    Args:
        ref: A path, `hf:owner/repo[:Q4_K_M]`, `package:NAME`, a short name such as `phi-3-mini`, or
            None for the default model.
        backend: The name of an installed backend. None takes the preferred one that works here.
        ctx: The largest number of tokens that a prompt and its answer may have together. None takes
            the context that the model was made for.
        tokenizer: A tokenizer.json to use instead of the model's own.
        progress: Called with (what, done, total) while weights are loaded, steps are compiled and
            prompts are read.
        max_sequences: The largest number of generations that are computed together; others wait.
        prefix_cache_bytes: The largest number of bytes in which the model remembers what ended
            generations have read, for prompts that begin the same way, such as the next turn of a
            conversation. None takes an eighth of the machine's memory, at most 2 GB; 0 remembers
            nothing, so that each generation reads its whole prompt.
        kv_memory: The largest number of bytes of all keys and values together. Generations that do
            not fit wait, and the context is what fits. None takes half of the memory that is free
            on a CPU, and sets no limit on other devices.
        speculation: Whether tokens are guessed from what prompt and answer have in common and from
            what a constraint forces, and checked several at a time. The text stays the same, and
            comes faster where it repeats itself or the prompt, or follows a schema. A
            `phicore.engine.drafts.Drafter` guesses in its own way.
        draft_model: A smaller model with the same vocabulary, which guesses where nothing repeats
            itself: a reference, which is loaded on the same backend, or a loaded model, which must
            not compute anything else meanwhile. It implies `speculation`.
        processes: Number of processes, on one host or several, that compute the model. This one
            leads, and waits for the others, which call `join`. `devices` counts the devices of all.
        coordinator: The address at which this process waits, HOST:PORT, if there are several. The
            next port is used, too.
        team: The team that this process has joined already. `join` says this.
        options: The fields of `BackendOptions`: `device`, `devices`, `cache_type`, `dtype`,
            `fast_prefill`, `compact`, `threads`, `packed_cache`.
    Raises:
        PhicoreError: If the model cannot be loaded. The error is of a subclass, and its one line
            says what is wrong and what to do.
    """
    known = {field.name for field in fields(BackendOptions)}
    if unknown := options.keys() - known:
        raise ArgumentError(
            f"unknown parameter; the options of a backend are {', '.join(sorted(known))}",
            parameter=min(unknown),
        )
    chosen = BackendOptions(**options)
    if not is_integer(max_sequences) or not 1 <= max_sequences <= SIZES[-1]:
        expected = f"1 to {SIZES[-1]}"
        raise ArgumentError(parameter="max_sequences", expected=expected, got=max_sequences)
    TeamOptions(processes, coordinator)
    plugins = Plugins()
    if (team or processes > 1) and backend is None:  # a look for devices would come too early
        backend = next((b.name for b in plugins.backends().values() if b.can_join), None)
    # Without any, this raises an error before a model is downloaded.
    is_early = backend is not None or not plugins.backends()
    info = choose_backend(backend, plugins) if is_early else None
    reference = default_reference()[0] if ref is None else os.fspath(ref)
    files = resolve(reference, tokenizer=tokenizer, schemes=plugins.sources())
    draft_files = None
    if draft_model is not None and not isinstance(draft_model, Model):
        draft_files = resolve(os.fspath(draft_model), schemes=plugins.sources())
    info = info or choose_backend(None, plugins)  # imports the libraries it tries
    if processes > 1:
        assert coordinator is not None
        if speculation or draft_model is not None:
            raise ArgumentError("not with several processes", parameter="speculation")
        info.check_can_join()
        settings = {
            "ref": reference,
            "backend": info.name,
            "ctx": ctx,
            "max_sequences": max_sequences,
            "prefix_cache_bytes": prefix_cache_bytes,
            "kv_memory": kv_memory,
            **options,
        }
        team = Leader(coordinator, processes, settings, progress or silent)
    with nullcontext() if team is None else team.joined(info):
        ops = info.create(chosen)
        shared: dict[str, Any] = {
            "backend": info.name,
            "progress": progress or silent,
            "architectures": plugins.architectures(),
        }
        draft = draft_model if isinstance(draft_model, Model) else None
        if draft_files is not None:
            draft = Model(draft_files, ops, context=None, prefix_cache_bytes=0, **shared)
        return Model(
            files,
            ops,
            context=ctx,
            observers=plugins.observers(),
            processors=plugins.logits_processors(),
            broken_plugins=plugins.broken,
            max_sequences=max_sequences,
            prefix_cache_bytes=prefix_cache_bytes,
            kv_memory=kv_memory,
            speculation=speculation,
            draft_model=draft,
            team=team or ALONE,
            **shared,
        )


def join(
    coordinator: str,
    ref: str | os.PathLike[str] | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    wait_s: float = 600.0,
) -> None:
    """Compute a model together with the process that leads, until that closes it.

    Args:
        coordinator: The address of the process that leads, HOST:PORT.
        ref, tokenizer, progress: Arguments of `load`. Without `ref`, it is the leader's. The file
            must be the same as the leader's.
        wait_s: How long the process that leads is waited for, in seconds.
    Raises:
        PhicoreError: If the team or the model cannot be had.
    """
    team = Follower(coordinator, wait_s)
    settings = dict(team.settings)
    theirs = settings.pop("ref")
    try:
        model = load(ref or theirs, team=team, tokenizer=tokenizer, progress=progress, **settings)
    except PhicoreError as error:
        team.fail(str(error))
        raise
    with model:
        try:
            team.follow(model.engine, lambda: model.grammar_vocabulary)
        except BaseException:  # the leader's devices would wait for ever
            team.give_up()
            raise
