"""Compiled programs that are kept on disk together with what is needed to find them untraced.

JAX's own cache of compiled programs finds one by its code. To get the code, each start has to trace
and lower the function, which takes longer than to load the program. Here a program is found by what
its code follows from: the sources of phicore, the versions of the libraries, the options of JAX and
of the backend, the identity of the function, and the forms of its arguments.

A list of the programs that a model used first is kept, too, so that the next process can load them
in a thread while it reads the model. XLA loads them without holding Python's lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import secrets
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jaxlib
import platformdirs
from gguf import GGMLQuantizationType
from jax.experimental import serialize_executable

import phicore.backend
import phicore_jax
from phicore.backend import Backend, KeptProgram, ProgramStore
from phicore.backend.host import cpu_count
from phicore.backend.sources import sources_digest
from phicore.disk.replacing import replacing
from phicore.gguf.reader import GGUFTensor
from phicore_jax.code_files import read, write

log = logging.getLogger(__name__)

FIRST = 6
"""Number of programs that the list of a model has at most."""

HEAP = 20
"""XLA's objects of a program, above all its graph, take up to so many times the bytes of what is
written, measured on programs of 0.2 to 1 MB. The machine code is small beside them."""

PREFIX = "kept_"
"""The names of functions whose programs are kept begin with this."""

Jit = Callable[[Callable[..., Any], Sequence[int], str], Any]
Loaded = tuple[Callable[..., Any], int]
"""A program, and about how many bytes of memory it takes."""


@runtime_checkable
class KeptKernels(Protocol):
    """The kernels that programs call. XLA must know them before it loads a program."""

    @property
    def identity(self) -> str | None:
        """Return a text that tells what the kernels compute; None if programs cannot be kept."""

    def has_type(self, ggml_type: GGMLQuantizationType) -> bool:
        """Return whether matrices of this type can be packed."""

    def form(self, tensors: Sequence[GGUFTensor], count: int) -> Any:
        """Return what `OwnKernels.pack` would return, with forms in place of arrays."""

    def handlers(self, text: str) -> list[tuple[str, str]]:
        """Return the kernels that the text of a program names."""

    def provide(self, name: str, handler: str) -> None:
        """Make XLA know a kernel that was compiled before.

        Raises:
            LookupError: If it is not on disk any more.
        """


def folder() -> Path:
    """Return the folder of the programs."""
    return platformdirs.user_cache_path("phicore") / f"programs-{jax.__version__}"


def conditions(kernels: KeptKernels, options: object) -> str | None:
    """Return a text of everything that a program depends on beside its function and arguments.

    Returns:
        The text; None if programs cannot be kept.
    """
    sources = sources_digest(
        [Path(phicore_jax.__file__).parent, Path(phicore.backend.__file__).parent]
    )
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    if sources is None or kernels.identity is None or settings.get("jax_disable_jit"):
        return None
    flags = sorted((n, v) for n, v in os.environ.items() if n.startswith(("XLA_", "JAX_")))
    parts = (sys.version, jax.__version__, jaxlib.__version__, sources, kernels.identity, options)
    return "\n".join(map(str, (*parts, flags, sorted(settings.items(), key=lambda s: s[0]))))


class Programs(ProgramStore):
    """The programs of one model.

    Args:
        kernels: The kernels that programs call.
        conditions: The result of `conditions`.
        model: A text that tells this model from others.
        outline: See `ProgramStore.outline`.
        device: The device that runs them.
        jit: Compiles a function; further arguments are `donate` and a name.
        guarded: Wraps what is called, so that XLA's errors are those of the backend.
    """

    def __init__(
        self,
        kernels: KeptKernels,
        conditions: str,
        model: str,
        outline: Backend,
        device: Any,
        jit: Jit,
        guarded: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        self._kernels = kernels
        self._conditions = conditions
        self._outline = outline
        self._device = device
        self._jit = jit
        self._guarded = guarded
        self._folder = folder()
        self._list = self._folder / f"{_hash(conditions, model)}.json"
        self._used: list[str] = []
        self._lock = threading.Lock()
        # The process waits at its end for a thread that compiles: XLA must not lose its memory.
        self._workers = ThreadPoolExecutor(max(1, cpu_count() - 1), "phicore-programs")
        self._early = self._load_early()

    @property
    def outline(self) -> Backend:
        return self._outline

    def compile(self, fn: Callable[..., Any], donate: Sequence[int], identity: str) -> KeptProgram:
        make = partial(self._program, fn, donate, identity)
        return Program(make, self._guarded, self._workers)

    def _load_early(self) -> dict[str, Future[Loaded | None]]:
        """Begin to load the programs that the last process used first."""
        try:
            names = json.loads(self._listed())
            names = [name for name in names if re.fullmatch("[0-9a-f]{32}", name)]
        except (ValueError, TypeError):
            names = []
        return {name: self._workers.submit(self._loaded, name) for name in names}

    def _program(
        self, fn: Callable[..., Any], donate: Sequence[int], identity: str, args: Any
    ) -> Loaded:
        """Return a program for arguments of this form: loaded early, now, or compiled now."""
        leaves, tree = jax.tree.flatten(args)
        forms = [(x.shape, x.dtype.name, x.weak_type, str(x.sharding)) for x in leaves]
        name = _hash(self._conditions, identity, str(donate), str(tree), str(forms))
        early = self._early.pop(name, None)
        program = self._loaded(name) if early is None else early.result()
        if program is None:
            program = self._compiled(fn, donate, name, args)
        self._remember(name)
        return program

    def _loaded(self, name: str) -> Loaded | None:
        """Return a program that is on disk; None if there is none that works."""
        data = read(self._folder / name)
        if data is None:
            return None
        try:
            text = zlib.decompress(data)
            kernels, *program = pickle.loads(text)
            for kernel in kernels:
                self._kernels.provide(*kernel)
            loaded = serialize_executable.deserialize_and_load(
                *program, backend=self._device.client, execution_devices=[self._device]
            )
            return loaded, HEAP * len(text)
        except Exception as error:  # noqa: BLE001 - whatever it is, the program can be compiled
            log.debug("program %s: %s", name, error)
            return None

    def _compiled(
        self, fn: Callable[..., Any], donate: Sequence[int], name: str, args: Any
    ) -> Loaded:
        # JAX's cache finds programs by their code, which includes their name. A program from there
        # could not be written: XLA would leave the machine code out. So each name is new.
        lowered = self._jit(fn, donate, f"{PREFIX}{secrets.token_hex(8)}").lower(*args)
        program, size = lowered.compile(), 0
        _remove_copies()
        try:
            kernels = self._kernels.handlers(lowered.as_text())
            text = pickle.dumps((kernels, *serialize_executable.serialize(program)))
            size = HEAP * len(text)
            write(self._folder / name, zlib.compress(text, 1))
        except Exception as error:  # noqa: BLE001 - the program itself works
            log.debug("program %s is not kept: %s", name, error)
        return program, size

    def _remember(self, name: str) -> None:
        """Add a program to the list of those that are used first, and write the list."""
        with self._lock:
            if name in self._used or len(self._used) >= FIRST:
                return
            self._used.append(name)
            text = json.dumps(self._used)
        if self._listed() != text:
            with suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
                with replacing(self._list, is_synced=False) as new:
                    new.write_text(text, encoding="utf-8")

    def _listed(self) -> str:
        """Return the text of the list; "" if there is none, or it is damaged."""
        try:
            return self._list.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""


class Program(KeptProgram):
    """A function that is compiled, or found on disk, when it is first called or prepared."""

    def __init__(
        self,
        make: Callable[[Any], Loaded],
        guarded: Callable[[Callable[..., Any]], Callable[..., Any]],
        workers: ThreadPoolExecutor,
    ) -> None:
        self._make = make
        self._workers = workers
        self._guarded = guarded
        self._prepared: Future[Loaded] | None = None
        self._program: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        # A wrapped method that is kept would refer back to this object, and the memory of a program
        # that is dropped would wait for a search for cycles, which is rare in a large process.
        return self._guarded(self._run)(*args)

    def prepare(self, *args: Any) -> None:
        if self._program is None and self._prepared is None:
            self._prepared = self._workers.submit(self._make, jax.tree.map(_form, args))

    def _run(self, *args: Any) -> Any:
        if self._program is None:
            prepared, self._prepared = self._prepared, None
            found = self._make(args) if prepared is None else prepared.result()
            self._program, self.memory_bytes = found
        return self._program(*args)


def _form(x: Any) -> jax.ShapeDtypeStruct:
    """Return what a program depends on of an array, whose memory may be given away meanwhile."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding, weak_type=x.weak_type)


def _remove_copies() -> None:
    """Remove from JAX's cache the programs that are kept here. Nobody asks for them there."""
    if home := jax.config.jax_compilation_cache_dir:
        for path in Path(home).glob(f"jit_{PREFIX}*"):
            with suppress(OSError):  # another thread or process has removed it, or still writes it
                path.unlink()


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
