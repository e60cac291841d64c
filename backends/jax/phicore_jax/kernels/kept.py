"""Packed matrices of a model file that outlive the process.

Packing takes longer than everything else that a start does, since a large model needs gigabytes of
fresh memory. The matrices of a file are therefore kept in the user's cache folder once they are
packed. The next process that loads the file maps them, and processes share their memory.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from phicore.backend.host import free_memory_bytes
from phicore.disk import writing
from phicore.disk.folders import packed_weights
from phicore.disk.store import Key
from phicore.gguf import blocks
from phicore.gguf.reader import GGUFFile, GGUFTensor

LEAST_BYTES = 16 << 20
"""Smaller models are not kept, since packing them takes less than 0.05 s."""

Pack = Callable[[Sequence[GGUFTensor]], np.ndarray]


@cache
def layout_digest() -> str:
    """Hash of the sources that decide how matrices are stored in memory.

    These are all modules of the kernels, so that no change of the layout can be missed.
    """
    digest = hashlib.sha256()
    for path in (*sorted(Path(__file__).parent.glob("*.py")), Path(blocks.__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class KeptMatrices:
    """The packed matrices of a model file: those of an earlier process, or of this one.

    Attributes:
        key: What the matrices are made from: the file, the layout, and the target.
    """

    def __init__(self, file: GGUFFile, target: str) -> None:
        self._store = packed_weights()
        identity = {"file": file.identity(), "layout": layout_digest(), "target": target}
        self.key = Key(file.path.stem, identity)
        is_large = file.size_bytes >= LEAST_BYTES
        self._is_kept = is_large and self._store.limit_bytes > 0 and sys.platform != "win32"
        free = free_memory_bytes()
        has_memory = free is None or free > 2 * file.size_bytes  # else others would lose theirs
        found = None
        if self._is_kept:
            found = self._store.find(self.key, is_read_ahead=has_memory)
        self._found = found or {}
        self._used: dict[str, np.ndarray] = {}

    def strips(
        self, tensors: Sequence[GGUFTensor], count: int, shape: tuple[int, int], pack: Pack
    ) -> np.ndarray:
        """Return the strips of stacked tensors: mapped if they were kept, or else packed now.

        Args:
            count: The number of matrices that the tensors belong to.
            shape: The shape of the strips.
            pack: Packs the tensors.
        """
        name = matrix_name(tensors[0].type, [tensor.name for tensor in tensors], count)
        found = self._found.get(name)
        if found is None or found.shape != shape:
            found = pack(tensors)
        self._used[name] = found
        return found

    def keep(self, is_busy: Callable[[], bool]) -> None:
        """Write the matrices that were used in the background, unless all of them were kept.

        Args:
            is_busy: Returns whether somebody waits for the process now.
        """
        is_new = any(array is not self._found.get(name) for name, array in self._used.items())
        if self._is_kept and is_new:
            writing.write_later(self._store, self.key, self._used, is_busy)


def matrix_name(ggml_type: GGMLQuantizationType, names: Sequence[str], count: int) -> str:
    """Return the name of packed tensors: those of the first matrix stand for all."""
    parts = " + ".join(names[: len(names) // count])
    return f"{parts}: {ggml_type.name}" + (f", {count} matrices" if count > 1 else "")


@contextmanager
def kept_matrices(
    file: GGUFFile, target: str, is_busy: Callable[[], bool]
) -> Iterator[KeptMatrices]:
    """Return a context in which matrices are packed; when it ends without an error, keep them."""
    kept = KeptMatrices(file, target)
    yield kept
    kept.keep(is_busy)
