"""Open a GGUF file: parse its metadata, check everything, and map its tensors without a copy.

The file may come from anyone. Every number in it is compared with the size of the file before it
is used, so a damaged or hostile file ends in a `GGUFError` that names the field, and no allocation
is larger than the bytes that are really there. The layout, all little-endian:

    magic "GGUF", uint32 version, uint64 number of tensors, uint64 number of metadata keys
    metadata:  string key, uint32 value type, value
    tensors:   string name, uint32 rank, uint64 dimensions (contiguous first), uint32 ggml type,
               uint64 offset into the data
    padding to `general.alignment`, then the data; each tensor starts at a multiple of it

where a string is a uint64 length and its bytes, and an array a uint32 item type, a uint64 count
and its items. A large model may be split over files `NAME-00001-of-00003.gguf` and so on.

Source: the GGUF specification (ggml, docs/gguf.md) and `gguf.cpp`; constants from `gguf`.
"""

import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize

from phicore.errors import GGUFError

VERSIONS = (2, 3)  # version 1 has 32-bit counts; nobody publishes it any more
MAX_RANK = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = 2**63 - 1  # ggml counts in int64
MAX_KEY_BYTES = 65535  # from the specification, as the next one
MAX_TENSOR_NAME_BYTES = 64
MAX_ARRAY_DEPTH = 4  # the specification sets no limit; llama.cpp takes no nested array at all
MIN_METADATA_BYTES = 8 + 4 + 1  # empty key, value type, one-byte value
MIN_ARRAY_BYTES = 4 + 8  # item type, count
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, rank, one dimension, type, offset

_STORED_DTYPES: dict[int, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("<u1"),  # any byte but 0 is true
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}

_LOOKS_LIKE = (  # what people have in hand when they expected a model
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<", "a web page; the download went wrong, fetch the file again"),
    (b"{", "JSON; give the .gguf file itself"),
    (b"PK", "a zip archive or a PyTorch checkpoint; give a .gguf file"),
    (b"tjgg", "the GGML format that GGUF replaced; get a newer file of this model"),
)


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """One tensor of a file, as rows of packed blocks.

    Attributes:
        type: How the values are stored; sizes are in `gguf.constants.GGML_QUANT_SIZES`.
        shape: In NumPy order, the contiguous dimension last (the reverse of the file's order).
        data: shape[:-1] + (row_bytes,) uint8, a read-only view of the memory map.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray = field(repr=False)

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.data.nbytes

    def dequantize(self) -> np.ndarray:
        """Expand to a new float32 array of `shape`, bit-exact with `gguf.quants`.

        A NaN or an infinity in the file comes through without a NumPy warning.

        Raises:
            GGUFError: If `gguf.quants` cannot expand this type (integers, F64, Q8_1, Q8_K).
        """
        try:
            with np.errstate(all="ignore"):
                values = dequantize(self.data, self.type)
        except NotImplementedError:
            raise GGUFError(
                f"tensor {self.name!r}: type {self.type.name} cannot be expanded to float32; "
                "use a file with another quantization"
            ) from None
        return values if values.flags.writeable else values.copy()  # F32 is a view of the file


@dataclass(eq=False)
class GGUFFile:
    """An open GGUF file, all parts of a split one together; a context manager.

    Attributes:
        path: The file, or the first part of a split one.
        metadata: str, int, float and bool; arrays of numbers and bools as 1-D NumPy arrays of the
            stored type, arrays of strings as list[str], arrays of arrays as lists. A string in an
            array need not be UTF-8 (tokens are bytes): bytes that are not become surrogates, and
            `.encode("utf-8", "surrogateescape")` restores them.
        tensors: By name, in file order; empty after `close`.
        size_bytes: Of all parts.
    """

    path: Path
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)
    size_bytes: int
    _maps: list[mmap.mmap] = field(repr=False)

    def close(self) -> None:
        """Release the memory maps. One that views still use lives on until the last view goes."""
        self.tensors = {}
        while self._maps:
            try:
                self._maps.pop().close()
            except BufferError:
                continue

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file of version 2 or 3, or a split model by its first part.

    Metadata is read and copied; tensor data is mapped, and read from disk when it is used.

    Raises:
        GGUFError: If the file, or a part of it, cannot be read, is no GGUF, is damaged or cut
            short. The message names the file and the field.
    """
    first = _open_part(Path(path))
    if "split.count" not in first.metadata or _split_value(first, "split.count") <= 1:
        return first
    parts = [first, *_other_parts(first)]
    tensors = _merge_tensors(parts)
    size_bytes = sum(part.size_bytes for part in parts)
    maps = [view for part in parts for view in part._maps]
    return GGUFFile(first.path, first.metadata, tensors, size_bytes, maps)


def _other_parts(first: GGUFFile) -> Iterator[GGUFFile]:
    """Parts 2 and up of a split model; their names follow from the first one's."""
    number, count = _split_value(first, "split.no"), _split_value(first, "split.count")
    name, suffix = first.path.name, _split_suffix(number, count)
    where = f"{name}: split.no: this is part {number + 1} of {count}"
    if not name.endswith(suffix):
        raise GGUFError(f"{where}: expected a name that ends in '{suffix}'; restore the name")
    prefix = name.removesuffix(suffix)
    if number != 0:
        raise GGUFError(f"{where}; open the first part, '{prefix}{_split_suffix(0, count)}'")
    for number in range(1, count):
        path = first.path.with_name(prefix + _split_suffix(number, count))
        if not path.exists():
            raise GGUFError(f"{path}: part {number + 1} of {count} is missing; download it too")
        part = _open_part(path)
        for key, expected in (("split.no", number), ("split.count", count)):
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
    """Open one file, without a look at the other parts of a split model."""
    view = _map_file(path)
    parser = _Parser(path, view)
    n_tensors, n_keys = parser.header()
    metadata = parser.metadata(n_keys)
    tensors = parser.tensors(n_tensors, metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
    return GGUFFile(path, metadata, tensors, len(view), [view])


def _map_file(path: Path) -> mmap.mmap:
    try:
        if path.is_dir():
            raise GGUFError(f"{path}: expected a file, found a folder; give the .gguf file in it")
        if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
            raise GGUFError(f"{path}: expected a file, found a device or a pipe")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise GGUFError(f"{path}: the file is empty; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise GGUFError(f"{path}: cannot be opened: {reason}") from None


class _TensorInfo(NamedTuple):
    """A line of the tensor table; `start` and `end` count from the start of the data."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    end: int


class _Parser:
    """A position in one mapped file; each read is checked against the end of the file first."""

    def __init__(self, path: Path, view: mmap.mmap) -> None:
        self.file = path.name
        self.view = view
        self.size = len(view)
        self.position = 0
        self.where = "header"  # what is being read, for messages

    def error(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.file}: {self.where}: {problem}")

    def header(self) -> tuple[int, int]:
        """Number of tensors, number of metadata keys."""
        magic = GGUF_MAGIC.to_bytes(4, "little")
        if self.view[:4] != magic:
            for start, what in _LOOKS_LIKE:
                if self.view[: len(start)] == start:
                    raise self.error(f"not a GGUF file: this is {what}")
            raise self.error(f"not a GGUF file: expected {magic!r}, found {self.view[:4]!r}")
        self.position = 4
        version = self.integer(4)
        if version and version & 0xFFFF == 0:
            raise self.error("a big-endian file; get the little-endian one")
        if version not in VERSIONS:
            raise self.error(f"expected GGUF version 2 or 3, found {version}; get another file")
        n_tensors, n_keys = self.integer(8), self.integer(8)
        what = f"{n_keys} metadata keys and {n_tensors} tensors"
        self.require(n_keys * MIN_METADATA_BYTES + n_tensors * MIN_TENSOR_BYTES, what)
        return n_tensors, n_keys

    def metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(n_keys):
            self.where = f"metadata key {index + 1} of {n_keys}"
            key = self.string(MAX_KEY_BYTES)
            self.where = f"metadata {key[:80]!r}"
            if key in metadata:
                raise self.error("the key occurs twice; the file is damaged")
            value_type = self.integer(4)
            metadata[key] = self.value(value_type)
            if key == "general.alignment":
                self.check_alignment(value_type, metadata[key])
        return metadata

    def check_alignment(self, value_type: int, alignment: Any) -> None:
        if value_type != GGUFValueType.UINT32:
            raise self.error(f"expected a uint32, found value type {value_type}")
        if alignment.bit_count() != 1:
            raise self.error(f"expected a power of two, found {alignment}")

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, GGUFTensor]:
        infos: dict[str, _TensorInfo] = {}
        for index in range(n_tensors):
            self.where = f"tensor {index + 1} of {n_tensors}"
            info = self.tensor_info(alignment)
            if info.name in infos:
                raise self.error("the name occurs twice; the file is damaged")
            infos[info.name] = info
        data_start = -(-self.position // alignment) * alignment
        self.check_extents(infos.values(), data_start)
        tensors = {}
        for name, ggml_type, shape, start, end in infos.values():
            data = np.frombuffer(self.view, np.uint8, end - start, data_start + start)
            data = data.reshape(*shape[:-1], -1)  # (..., row_bytes)
            tensors[name] = GGUFTensor(name, ggml_type, shape, data)
        return tensors

    def tensor_info(self, alignment: int) -> _TensorInfo:
        name = self.string(MAX_TENSOR_NAME_BYTES)
        self.where = f"tensor {name!r}"
        rank = self.integer(4)
        if not 1 <= rank <= MAX_RANK:
            raise self.error(f"expected 1 to {MAX_RANK} dimensions, found {rank}")
        shape = tuple(self.integer(8) for _ in range(rank))[::-1]
        if not 1 <= math.prod(shape) <= MAX_ELEMENTS:
            raise self.error(f"shape {shape} is impossible; the file is damaged")
        type_number = self.integer(4)
        try:
            ggml_type = GGMLQuantizationType(type_number)
        except ValueError:
            raise self.error(
                f"ggml type {type_number} is unknown; use another quantization of this model"
            ) from None
        block_size, block_bytes = GGML_QUANT_SIZES[ggml_type]
        if shape[-1] % block_size:
            raise self.error(
                f"expected rows of a multiple of {block_size} values ({ggml_type.name}), "
                f"found {shape[-1]}"
            )
        offset = self.integer(8)
        if offset % alignment:
            raise self.error(f"expected an offset aligned to {alignment}, found {offset}")
        n_bytes = math.prod(shape) // block_size * block_bytes
        return _TensorInfo(name, ggml_type, shape, offset, offset + n_bytes)

    def check_extents(self, infos: Iterable[_TensorInfo], data_start: int) -> None:
        """Each tensor must end within the file, and before the next one starts."""
        in_order = sorted(infos, key=lambda info: info.start)
        for info, following in pairwise(in_order):
            if info.end > following.start:
                self.where = f"tensor {following.name!r}"
                raise self.error(f"overlaps tensor {info.name!r}; the file is damaged")
        if in_order and (missing := data_start + in_order[-1].end - self.size) > 0:
            self.where = f"tensor {in_order[-1].name!r}"
            raise self.error(
                f"{missing} bytes are missing at the end of the file; "
                "the download is probably incomplete, fetch it again"
            )

    def value(self, value_type: int) -> Any:
        if value_type == GGUFValueType.STRING:
            return self.string()
        if value_type == GGUFValueType.ARRAY:
            return self.array(depth=1)
        return self.numbers(value_type, 1)[0].item()

    def array(self, depth: int) -> np.ndarray | list[Any]:
        if depth > MAX_ARRAY_DEPTH:
            raise self.error(f"arrays are nested more than {MAX_ARRAY_DEPTH} deep")
        item_type, count = self.integer(4), self.integer(8)
        if item_type == GGUFValueType.STRING:
            return self.strings(count)
        if item_type == GGUFValueType.ARRAY:
            self.require(count * MIN_ARRAY_BYTES, f"an array of {count} arrays")
            return [self.array(depth + 1) for _ in range(count)]
        return self.numbers(item_type, count)

    def numbers(self, value_type: int, count: int) -> np.ndarray:
        """(count,) in the machine's byte order, or bool."""
        stored = _STORED_DTYPES.get(value_type)
        if stored is None:
            raise self.error(f"value type {value_type} is unknown; the file is damaged")
        values = np.frombuffer(self.take(count * stored.itemsize, f"{count} values"), stored)
        if value_type == GGUFValueType.BOOL:
            return values != 0
        return values.astype(stored.newbyteorder("="))

    def strings(self, count: int) -> list[str]:
        self.require(count * 8, f"an array of {count} strings")
        view, size, end = self.view, self.size, self.position
        strings = []
        for index in range(count):  # as `string` does, in one frame: vocabularies are long
            start = end + 8
            end = start + int.from_bytes(view[end:start], "little")
            if end > size:  # also when the length itself was cut short
                raise self.error(f"string {index + 1} of {count} ends after the end of the file")
            strings.append(view[start:end].decode("utf-8", "surrogateescape"))
        self.position = end
        return strings

    def string(self, max_bytes: int | None = None) -> str:
        n_bytes = self.integer(8)
        if max_bytes is not None and n_bytes > max_bytes:
            raise self.error(f"expected a name of at most {max_bytes} bytes, found {n_bytes}")
        try:
            return self.take(n_bytes, "a string").decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"the text is not UTF-8 at byte {error.start}") from None

    def integer(self, n_bytes: int) -> int:
        return int.from_bytes(self.take(n_bytes, "a number"), "little")

    def take(self, n_bytes: int, what: str) -> bytes:
        self.require(n_bytes, what)
        start, self.position = self.position, self.position + n_bytes
        return self.view[start : self.position]

    def require(self, n_bytes: int, what: str) -> None:
        left = self.size - self.position
        if n_bytes > left:
            raise self.error(
                f"{what}: expected {n_bytes} bytes or more, found {left} to the end of the file; "
                "the file is damaged or its download incomplete"
            )
