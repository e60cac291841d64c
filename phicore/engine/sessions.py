"""Session files: what a sequence has computed, for another process that goes on with it.

A session is a safetensors file with the used slots of each layer's cache and the tokens that they
belong to. It is valid for the same model, cache type and backend only, since backends store rows in
different ways.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from phicore.disk.replacing import replacing
from phicore.engine.cache import Cache
from phicore.engine.prefixes import Prefix
from phicore.engine.runner import Runner
from phicore.errors import SessionError

VERSION = "1"
_TOKENS = "tokens"


def save(path: Path, prefix: Prefix, runner: Runner, model: str) -> None:
    """Write a session file. An older file is replaced only when the new one is complete.

    Args:
        model: A text that only this model has.
    Raises:
        SessionError: If the backend's arrays cannot be saved, or the file cannot be written.
    """
    cache, first = prefix.cache, int(prefix.cache.first[0])
    used = len(prefix.tokens) - first
    arrays = {_TOKENS: prefix.tokens}
    for number, layer in enumerate(cache.layers):
        for name, array in layer.items():
            arrays[f"{number}.{name}"] = _host(runner, array)[:, :, :used].copy()
    metadata = {
        "phicore_session": VERSION,
        "model": model,
        "form": _form(runner),
        "is_long": str(prefix.is_long),
        "first": str(first),
    }
    metadata["checksum"] = _checksum(arrays, metadata)
    try:
        with replacing(path) as new:
            save_file(arrays, new, metadata)
    except OSError as error:
        raise SessionError(f"{path}: cannot be written: {error.strerror}") from error
    except SafetensorError as error:  # the library wraps what the system says
        raise SessionError(f"{path}: cannot be written: {error}") from error


def load(path: Path, runner: Runner, model: str) -> Prefix:
    """Read a session file.

    Raises:
        SessionError: If the file cannot be read, is damaged, or is for another model, cache type or
            backend.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check(path, metadata, runner, model)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except FileNotFoundError:
        raise SessionError(f"{path}: there is no such file") from None
    except OSError as error:
        raise SessionError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, TypeError) as error:
        raise SessionError(f"{path}: not a session file, or damaged: {error}") from error
    if _checksum(arrays, metadata) != metadata.get("checksum"):
        raise SessionError(f"{path}: damaged: its checksum is wrong; delete it")
    tokens, first = _checked_text(path, arrays.get(_TOKENS), metadata.get("first", ""), runner)
    is_long, used = metadata.get("is_long") == "True", len(tokens) - first
    cache = runner.new_cache(used, is_long)
    for number, layer in enumerate(cache.layers):
        for name, empty in layer.items():
            saved, whole = arrays.get(f"{number}.{name}"), np.zeros_like(_host(runner, empty))
            # A checksum finds damage. A file that somebody has made may hold anything.
            shape = (*whole.shape[:2], used, *whole.shape[3:])
            if saved is None or (saved.dtype, saved.shape) != (whole.dtype, shape):
                raise SessionError(f"{path}: not a session of this model: layer {number} differs")
            whole[:, :, :used] = saved
            layer[name] = runner.ops.asarray(whole)
    cache = Cache(
        cache.ops, cache.layers, cache.capacity, cache.rope_start, np.array([first], np.int32)
    )
    return Prefix(tokens, is_long, cache)


def _checked_text(
    path: Path, tokens: np.ndarray | None, first: str, runner: Runner
) -> tuple[np.ndarray, int]:
    """Return a session's tokens, and the number of those whose slots were freed.

    Raises:
        SessionError: If the model cannot have computed such tokens.
    """
    config = runner.config
    if (
        tokens is None
        or tokens.dtype != np.int32
        or tokens.ndim != 1
        or not 0 < len(tokens) <= config.max_position_embeddings
        or tokens.min() < 0
        or tokens.max() >= config.vocab_size
    ):
        raise SessionError(f"{path}: not a session of this model: its tokens cannot be")
    freed = int(first) if first.isascii() and first.isdecimal() and len(first) < 10 else -1
    used = len(tokens) - freed
    has_room = config.sliding_window is not None or freed == 0
    if freed < 0 or used < 1 or not has_room or used > runner.capacity_for(used):
        raise SessionError(f"{path}: not a session of this model: its slots cannot be")
    return tokens, freed


def _check(path: Path, metadata: dict[str, str], runner: Runner, model: str) -> None:
    if metadata.get("phicore_session") != VERSION:
        found = metadata.get("phicore_session", "none")
        raise SessionError(f"{path}: expected a session file of version {VERSION}, found {found}")
    if metadata.get("model") != model:
        raise SessionError(f"{path}: was saved for another model; delete it, or name another file")
    if metadata.get("form") != _form(runner):
        raise SessionError(
            f"{path}: was saved with another cache type or backend ({metadata.get('form')}, here "
            f"{_form(runner)}); use the same, or name another file"
        )


def _form(runner: Runner) -> str:
    """Return a text that tells how the backend stores a slot."""
    ops, c = runner.ops, runner.config
    layer = ops.new_cache(1, c.num_key_value_heads, 1, c.head_dim)
    arrays = (f"{name} {a.dtype}{list(a.shape)}" for name, a in sorted(layer.items()))
    return f"{ops.options.cache_type}: {', '.join(arrays)}"


def _host(runner: Runner, array: Any) -> np.ndarray:
    try:
        return runner.ops.to_numpy(array)
    except (RuntimeError, TypeError, ValueError) as error:
        cache_type = runner.ops.options.cache_type
        raise SessionError(f"a cache of type {cache_type} cannot be saved; take f16") from error


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """Return a checksum of all arrays, and of the metadata except the checksum itself."""
    said = sorted((name, value) for name, value in metadata.items() if name != "checksum")
    checksum = zlib.crc32(repr(said).encode())
    for name in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, checksum)
        checksum = zlib.crc32(name.encode(), checksum)
    return f"{checksum:08x}"
