"""Opens GGUF files and maps their tensors without a copy.

`parser` checks every number of a file before this module uses it. A large model may be split over
files `NAME-00001-of-00003.gguf` and so on. Opening the first file opens all of them as one.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from phicore.errors import GGUFError
from phicore.gguf.parser import parse_header


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a file, as rows of packed blocks.

    Attributes:
        type: The type of the blocks; their sizes are in `gguf.constants.GGML_QUANT_SIZES`.
        shape: The shape in NumPy order, with the contiguous dimension last. The file stores the
            dimensions in reverse order.
        data: The blocks, shape[:-1] + (row_bytes,) uint8, a read-only view of the memory map.
        scale: A factor of all values, (1,) float32, or of each matrix, (X,), which another tensor
            of the file holds. Only types that are expanded when they are loaded have one.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray = field(repr=False)
    scale: np.ndarray | None = field(repr=False, default=None)

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.data.nbytes

    def dequantize(self) -> np.ndarray:
        """Expand the tensor to a new float32 array of `shape`, bit-exact with `gguf.quants`.

        The values are multiplied by `scale`. NaNs and infinities of the file are kept, without a
        NumPy warning.

        Raises:
            GGUFError: If `gguf.quants` cannot expand this type (integers, F64, Q8_1, Q8_K).
        """
        try:
            with np.errstate(all="ignore"):
                values = dequantize(self.data, self.type)
                if self.scale is not None:
                    values = values * self.scale.reshape(-1, *(1,) * (len(self.shape) - 1))
        except NotImplementedError:
            raise GGUFError(
                f"tensor {self.name!r}: type {self.type.name} cannot be expanded to float32; "
                "use a file with another quantization"
            ) from None
        return values if values.flags.writeable else values.copy()  # F32 is a view of the file


@dataclass(eq=False)
class GGUFFile:
    """An open GGUF file, or all parts of a split one. It is a context manager.

    Attributes:
        path: The path of the file, or of the first part.
        metadata: The values by key: str, int, float and bool; arrays of numbers and bools as 1-D
            NumPy arrays of the stored type, arrays of strings as list[str], arrays of arrays as
            lists. A string in an array need not be UTF-8, since tokens are bytes. Bytes that are
            not UTF-8 become surrogates; `.encode("utf-8", "surrogateescape")` restores them.
        tensors: The tensors by name, in file order; empty after `close`.
        size_bytes: The size of the file, or of all parts together.
        versions: The size, the time of the last change in nanoseconds, and the inode of each part,
            when it was opened.
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)
    size_bytes: int
    versions: list[list[int]] = field(repr=False)
    _maps: list[mmap.mmap] = field(repr=False)

    def forget(self, name: str) -> None:
        """Free the memory of a tensor's data, which is read from disk if it is used again."""
        data = self.tensors[name].data
        if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
            return
        for view in self._maps:
            base = np.frombuffer(view, np.uint8)
            start = data.ctypes.data - base.ctypes.data
            if 0 <= start < base.size:
                first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
                size = (start + data.size) // mmap.PAGESIZE * mmap.PAGESIZE - first
                if size > 0:  # only pages that hold nothing else, since other tensors may be in use
                    view.madvise(mmap.MADV_DONTNEED, first, size)

    def fingerprint(self) -> str:
        """Return a text that tells this model from others.

        It depends on the names, shapes and types of all tensors, and on a few bytes of each.
        """
        found = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            found.update(f"{name} {tensor.shape} {tensor.type.name}".encode())
            data = tensor.data.reshape(-1)
            for start in range(0, data.size, max(1, data.size // 4)):
                found.update(data[start : start + 64].tobytes())
        return found.hexdigest()[:32]

    def identity(self) -> list[Any]:
        """Return what changes when the tensors change, in values that JSON has.

        It consists of the `fingerprint` and of what the system knows of the files, so a file that
        is replaced, or is changed at places that the fingerprint does not read, has another one. A
        copy has another one, too.
        """
        return [self.fingerprint(), self.versions]

    def again(self) -> Self:
        """Return another object of this file, which is closed apart from this one."""
        return replace(self, tensors=dict(self.tensors), _maps=list(self._maps))

    def outline(self) -> Self:
        """Return this file with matrices that are all zeros and take no memory.

        Vectors are as they are.
        """
        zero = np.zeros((), np.uint8)
        tensors = {
            name: replace(tensor, data=np.broadcast_to(zero, tensor.data.shape))
            if len(tensor.shape) > 1
            else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors, _maps=[])

    def close(self) -> None:
        """Release the memory maps. A map that arrays still view is released with the last view."""
        self.tensors = {}
        while self._maps:
            with suppress(BufferError):
                self._maps.pop().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file of version 2 or 3; a split model is opened by its first part.

    Metadata is copied. Tensor data is mapped, and read from disk when it is used.

    Raises:
        GGUFError: If the file or a part cannot be read, is not GGUF, is damaged or is cut short.
            The message names the file and the field.
    """
    first = _open_part(Path(path))
    if "split.count" not in first.metadata or _split_value(first, "split.count") <= 1:
        return first
    parts = [first, *_other_parts(first)]
    tensors = _merge_tensors(parts)
    size_bytes = sum(part.size_bytes for part in parts)
    versions = [version for part in parts for version in part.versions]
    maps = [view for part in parts for view in part._maps]
    return GGUFFile(first.path, first.metadata, tensors, size_bytes, versions, maps)


def _other_parts(first: GGUFFile) -> Iterator[GGUFFile]:
    """Open parts 2 and up of a split model, whose names follow from the first part's."""
    number, count = _split_value(first, "split.no"), _split_value(first, "split.count")
    name, suffix = first.path.name, _split_suffix(number, count)
    where = f"{name}: split.no: this is part {number + 1} of {count}"
    if not name.endswith(suffix):
        raise GGUFError(f"{where}: expected a name that ends in '{suffix}'; restore the name")
    prefix = name.removesuffix(suffix)
    if number != 0:
        raise GGUFError(f"{where}; open the first part, '{prefix}{_split_suffix(0, count)}'")
    for later in range(1, count):
        path = first.path.with_name(prefix + _split_suffix(later, count))
        if not path.exists():
            raise GGUFError(f"{path}: part {later + 1} of {count} is missing; download it too")
        part = _open_part(path)
        for key, expected in (("split.no", later), ("split.count", count)):
            if (found := _split_value(part, key)) != expected:
                raise GGUFError(
                    f"{path.name}: {key}: expected {expected}, found {found}; "
                    "the parts are not of one model, download them again"
                )
        yield part


def _merge_tensors(parts: list[GGUFFile]) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for part in parts:
        if both := tensors.keys() & part.tensors.keys():
            raise GGUFError(f"{part.path.name}: tensor {min(both)!r}: also in an earlier part")
        tensors |= part.tensors
    expected = _split_value(parts[0], "split.tensors.count")
    if len(tensors) != expected:
        raise GGUFError(
            f"{parts[0].path.name}: split.tensors.count: expected {expected} tensors, found "
            f"{len(tensors)} in {len(parts)} parts; download them again"
        )
    return tensors


def _split_suffix(number: int, count: int) -> str:
    return f"-{number + 1:05d}-of-{count:05d}.gguf"  # llama.cpp, llama_split_path


def _split_value(part: GGUFFile, key: str) -> int:
    value = part.metadata.get(key)
    if type(value) is not int or value < 0:
        raise GGUFError(f"{part.path.name}: {key}: expected a count, found {value!r:.40}")
    return value


def _open_part(path: Path) -> GGUFFile:
    """Open a single file. Other parts of a split model are not opened."""
    view, version = _map_file(path)
    header = parse_header(path.name, view)
    tensors = {}
    for name, ggml_type, shape, offset, size_bytes in header.tensors:
        data = np.frombuffer(view, np.uint8, size_bytes, header.data_start + offset)
        data = data.reshape(*shape[:-1], -1)  # (..., row_bytes)
        tensors[name] = GGUFTensor(name, ggml_type, shape, data)
    return GGUFFile(path, header.metadata, tensors, len(view), [version], [view])


def _map_file(path: Path) -> tuple[mmap.mmap, list[int]]:
    """Map a file; also return its entry in `GGUFFile.versions`."""
    try:
        if path.is_dir():
            raise GGUFError(f"{path}: expected a file, found a folder; give the .gguf file in it")
        if path.exists() and not path.is_file():  # opening a named pipe would wait forever
            raise GGUFError(f"{path}: expected a file, found a device or a pipe")
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_size == 0:
                raise GGUFError(f"{path}: the file is empty; download it again")
            version = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), version
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise GGUFError(f"{path}: cannot be opened: {reason}") from None
