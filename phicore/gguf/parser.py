"""Parses everything before the data of a GGUF file: header, metadata and tensor table.

Files are not trusted. Every number in a file is compared with the file's size before it is used.
So a damaged or hostile file causes a `GGUFError` that names the field, and no allocation is larger
than the file's contents. The layout, with all numbers little-endian:

    magic "GGUF", uint32 version, uint64 number of tensors, uint64 number of metadata keys
    metadata:  string key, uint32 value type, value
    tensors:   string name, uint32 rank, uint64 dimensions (contiguous first), uint32 ggml type,
               uint64 offset into the data
    padding to a multiple of `general.alignment`, then the data; each tensor's offset in the data
               is also a multiple of `general.alignment`

A string is a uint64 length and its bytes. An array is a uint32 item type, a uint64 count and its
items.

Source: the GGUF specification (ggml, docs/gguf.md) and `gguf.cpp`; constants from `gguf`.
"""

import math
import mmap
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from phicore.errors import GGUFError

VERSIONS = (2, 3)  # version 1 has 32-bit counts, and is not published any more
MAX_RANK = 4  # GGML_MAX_DIMS
MAX_ELEMENTS = 2**63 - 1  # ggml counts in int64
MAX_KEY_BYTES = 65535  # from the specification
MAX_TENSOR_NAME_BYTES = 64  # from the specification
MAX_ARRAY_DEPTH = 4  # the specification sets no limit; llama.cpp takes no nested array at all
LENGTH_BYTES = 8  # in front of every string
MIN_METADATA_BYTES = LENGTH_BYTES + 4 + 1  # empty key, value type, one-byte value
MIN_ARRAY_BYTES = 4 + 8  # item type, count
MIN_TENSOR_BYTES = LENGTH_BYTES + 4 + 8 + 4 + 8  # empty name, rank, one dimension, type, offset

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

_LOOKS_LIKE = (  # how files begin that people mistake for a GGUF file
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<", "a web page; the download went wrong, fetch the file again"),
    (b"{", "JSON; give the .gguf file itself"),
    (b"PK", "a zip archive or a PyTorch checkpoint; give a .gguf file"),
    (b"tjgg", "the GGML format that GGUF replaced; get a newer file of this model"),
)


class TensorInfo(NamedTuple):
    """An entry of the tensor table.

    `shape` is in NumPy order, with the contiguous dimension last. This dimension is a multiple of
    the block size. `offset` is the number of bytes from the start of the data.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


class Header(NamedTuple):
    """The parsed contents of a file before the data, which starts at byte `data_start`.

    The tensors have distinct names, do not overlap, and end within the file. `GGUFFile.metadata`
    describes the types of the metadata.
    """

    metadata: dict[str, Any]
    tensors: list[TensorInfo]
    data_start: int


def parse_header(file_name: str, view: mmap.mmap) -> Header:
    """Parse and check everything before the data.

    Args:
        file_name: The name of the file, for messages.
        view: The bytes of the whole file.
    Raises:
        GGUFError: If the file is not GGUF of version 2 or 3, is damaged or is cut short. The
            message names the file and the field.
    """
    parser = _Parser(file_name, view)
    n_tensors, n_keys = parser.counts()
    metadata = parser.metadata(n_keys)
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    tensors = parser.tensors(n_tensors, alignment)
    data_start = -(-parser.position // alignment) * alignment
    parser.check_extents(tensors, data_start)
    return Header(metadata, tensors, data_start)


class _Parser:
    """Reads a mapped file from a current position. Each read is first checked against its end."""

    def __init__(self, file_name: str, view: mmap.mmap) -> None:
        self.file_name = file_name
        self.view = view
        self.size = len(view)
        self.position = 0
        self.where = "header"  # the part that is being read, for messages

    def error(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.file_name}: {self.where}: {problem}")

    def counts(self) -> tuple[int, int]:
        """Check the magic and the version; read the numbers of tensors and of metadata keys."""
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

    def tensors(self, n_tensors: int, alignment: int) -> list[TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for index in range(n_tensors):
            self.where = f"tensor {index + 1} of {n_tensors}"
            tensor = self.tensor(alignment)
            if tensor.name in tensors:
                raise self.error("the name occurs twice; the file is damaged")
            tensors[tensor.name] = tensor
        return list(tensors.values())

    def tensor(self, alignment: int) -> TensorInfo:
        name = self.string(MAX_TENSOR_NAME_BYTES)
        self.where = f"tensor {name!r}"
        rank = self.integer(4)
        if not 1 <= rank <= MAX_RANK:
            raise self.error(f"expected 1 to {MAX_RANK} dimensions, found {rank}")
        shape = tuple(self.integer(8) for _ in range(rank))[::-1]
        # ollama's converter writes empty vectors of rotary factors where a model has none.
        if not (1 <= math.prod(shape) <= MAX_ELEMENTS or shape == (0,)):
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
        size_bytes = math.prod(shape) // block_size * block_bytes
        return TensorInfo(name, ggml_type, shape, offset, size_bytes)

    def check_extents(self, tensors: Iterable[TensorInfo], data_start: int) -> None:
        """Check that each tensor ends within the file and before the next tensor starts."""
        in_order = sorted(tensors, key=lambda tensor: tensor.offset)
        for tensor, following in pairwise(in_order):
            if tensor.end > following.offset:
                self.where = f"tensor {following.name!r}"
                raise self.error(f"overlaps tensor {tensor.name!r}; the file is damaged")
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
        """Read an array of `count` numbers in the machine's byte order, or of bools."""
        stored = _STORED_DTYPES.get(value_type)
        if stored is None:
            raise self.error(f"value type {value_type} is unknown; the file is damaged")
        values = np.frombuffer(self.take(count * stored.itemsize, f"{count} values"), stored)
        if value_type == GGUFValueType.BOOL:
            return values != 0
        return values.astype(stored.newbyteorder("="))

    def strings(self, count: int) -> list[str]:
        self.require(count * LENGTH_BYTES, f"an array of {count} strings")
        view, size, end = self.view, self.size, self.position
        strings = []
        for index in range(count):  # without calls of `string`, since vocabularies are long
            start = end + LENGTH_BYTES
            end = start + int.from_bytes(view[end:start], "little")
            if end > size:  # also when the length itself was cut short
                raise self.error(f"string {index + 1} of {count} ends after the end of the file")
            strings.append(view[start:end].decode("utf-8", "surrogateescape"))
        self.position = end
        return strings

    def string(self, max_bytes: int | None = None) -> str:
        n_bytes = self.integer(LENGTH_BYTES)
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
