"""Tests of damaged and hostile files, built byte by byte: each raises one clear `GGUFError`."""

import contextlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from hypothesis import example, given
from hypothesis import strategies as st

from phicore.errors import GGUFError
from phicore.gguf import open_gguf

MAX_ALLOCATION_BYTES = 1_000_000  # for files of a few hundred bytes; trusting a count takes more


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return u64(len(value)) + value


def pair(key: str | bytes, value_type: int, value: bytes) -> bytes:
    return text(key) + u32(value_type) + value


def array(item_type: int, count: int, items: bytes = b"") -> bytes:
    return u32(item_type) + u64(count) + items


def info(name: str, dims: tuple[int, ...], ggml_type: int = T.F32, offset: int = 0) -> bytes:
    """Return an entry of the tensor table; `dims` are in the file's order, contiguous first."""
    sizes = b"".join(map(u64, dims))
    return text(name) + u32(len(dims)) + sizes + u32(ggml_type) + u64(offset)


def build(
    *parts: bytes, keys: int = 0, tensors: int = 0, version: int = 3, data: bytes = b""
) -> bytes:
    """Return a whole file; `keys` and `tensors` are the counts that its header claims."""
    table = b"GGUF" + u32(version) + u64(tensors) + u64(keys) + b"".join(parts)
    return table + bytes(-len(table) % 32) + data if data else table


def tensor_file(*infos: bytes, data: bytes = bytes(64)) -> bytes:
    return build(*infos, tensors=len(infos), data=data)


def metadata_file(*pairs: bytes) -> bytes:
    return build(*pairs, keys=len(pairs))


def nested(depth: int) -> bytes:
    return array(V.ARRAY, 1) * (depth - 1) + array(V.UINT8, 1, b"\x07")


VALID = build(
    pair("general.architecture", V.STRING, text("phi3")),
    pair("general.alignment", V.UINT32, u32(32)),
    pair("bool", V.BOOL, b"\x01"),
    pair("float", V.FLOAT32, np.float32(0.5).tobytes()),
    pair("tokens", V.ARRAY, array(V.STRING, 3, text("a") + text("") + text(b"\xff"))),
    pair("scores", V.ARRAY, array(V.FLOAT32, 4, bytes(16))),
    pair("nested", V.ARRAY, array(V.ARRAY, 2, array(V.UINT8, 1, b"\x01") + array(V.BOOL, 0))),
    info("norm", (3,), T.F32, 0),
    info("weight", (32, 2), T.Q8_0, 32),
    info("ids", (2, 2), T.I32, 128),
    keys=7,
    tensors=3,
    data=bytes(range(144)),
)


def message_of(folder: Path, content: bytes) -> str:
    """Return the message that refuses a file: one line that starts with the file's name."""
    path = folder / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert message.removeprefix(f"{folder}{os.sep}").startswith("model.gguf: ")
    assert message.isprintable()
    assert len(message) < 400
    return message


HEADERS = {
    "empty": (b"", "the file is empty; download it again"),
    "web_page": (b"<!DOCTYPE html><html>", "not a GGUF file: this is a web page"),
    "json": (b'{"error": "not found"}', "not a GGUF file: this is JSON"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1", "`git lfs pull`"),
    "ggml": (b"tjgg" + u32(3), "the GGML format that GGUF replaced"),
    "other_magic": (b"GGUG" + u32(3), r"expected b'GGUF', found b'GGUG'"),
    "short_magic": (b"GG", "expected b'GGUF', found b'GG'"),
    "magic_only": (b"GGUF", "header: a number: expected 4 bytes or more, found 0"),
    "big_endian": (b"GGUF\0\0\0\x03" + bytes(16), "header: a big-endian file"),
    "version_0": (build(version=0), "expected GGUF version 2 or 3, found 0"),
    "version_1": (build(version=1), "expected GGUF version 2 or 3, found 1"),
    "version_4": (build(version=4), "expected GGUF version 2 or 3, found 4"),
    "tensor_count": (build(tensors=2**64 - 1), "18446744073709551615 tensors: expected"),
    "key_count": (build(keys=2**62), "header: 4611686018427387904 metadata keys"),
    "counts_in_file": (build(bytes(12), keys=1), "expected 13 bytes or more, found 12"),
}

METADATA = {
    "key_length": (build(u64(2**63), bytes(32), keys=1), "metadata key 1 of 1: expected a name of"),
    "key_not_utf8": (metadata_file(pair(b"a\xff", V.UINT8, b"\0")), "not UTF-8 at byte 1"),
    "long_key": (metadata_file(pair("k" * 65536, V.UINT8, b"\0")), "at most 65535 bytes"),
    "key_with_newline": (metadata_file(pair("a\nb", 99, b"\0")), r"metadata 'a\nb': value type 99"),
    "duplicate_key": (metadata_file(*[pair("k", V.UINT8, b"\0")] * 2), "'k': the key occurs twice"),
    "value_type": (metadata_file(pair("k", 13, bytes(8))), "'k': value type 13 is unknown"),
    "item_type": (metadata_file(pair("k", V.ARRAY, array(13, 0))), "value type 13 is unknown"),
    "string_length": (
        metadata_file(pair("k", V.STRING, u64(2**64 - 1) + b"abc")),
        "metadata 'k': a string: expected 18446744073709551615 bytes or more, found 3",
    ),
    "string_not_utf8": (
        metadata_file(pair("k", V.STRING, text(b"ab\xc3"))),
        "metadata 'k': the text is not UTF-8 at byte 2",
    ),
    "array_length": (
        metadata_file(pair("k", V.ARRAY, array(V.UINT64, 2**61, bytes(8)))),
        "metadata 'k': 2305843009213693952 values: expected 18446744073709551616 bytes",
    ),
    "string_array_length": (
        metadata_file(pair("k", V.ARRAY, array(V.STRING, 2**40, text("a")))),
        "metadata 'k': an array of 1099511627776 strings: expected",
    ),
    "string_in_array": (
        metadata_file(pair("k", V.ARRAY, array(V.STRING, 2, text("a") + u64(2**63)))),
        "metadata 'k': string 2 of 2 ends after the end of the file",
    ),
    "string_in_array_cut": (
        metadata_file(pair("k", V.ARRAY, array(V.STRING, 2, text(bytes(9)) + bytes(7)))),
        "metadata 'k': string 2 of 2 ends after the end of the file",
    ),
    "nested_array_length": (
        metadata_file(pair("k", V.ARRAY, array(V.ARRAY, 2**50, bytes(24)))),
        "metadata 'k': an array of 1125899906842624 arrays: expected",
    ),
    "nesting": (metadata_file(pair("k", V.ARRAY, nested(5))), "nested more than 4 deep"),
    "deep_nesting": (metadata_file(pair("k", V.ARRAY, nested(5000))), "nested more than 4 deep"),
    "alignment_type": (
        metadata_file(pair("general.alignment", V.UINT64, u64(32))),
        "metadata 'general.alignment': expected a uint32, found value type 10",
    ),
    "alignment_string": (
        metadata_file(pair("general.alignment", V.STRING, text("32"))),
        "metadata 'general.alignment': expected a uint32, found value type 8",
    ),
    "alignment_zero": (
        metadata_file(pair("general.alignment", V.UINT32, u32(0))),
        "metadata 'general.alignment': expected a power of two, found 0",
    ),
    "alignment_24": (
        metadata_file(pair("general.alignment", V.UINT32, u32(24))),
        "metadata 'general.alignment': expected a power of two, found 24",
    ),
}

TENSORS = {
    "name_length": (tensor_file(info("t" * 65, (4,))), "tensor 1 of 1: expected a name of at most"),
    "rank_0": (tensor_file(info("t", ()), data=bytes(96)), "'t': expected 1 to 4 dimensions"),
    "rank_5": (tensor_file(info("t", (1,) * 5)), "'t': expected 1 to 4 dimensions, found 5"),
    "rank_huge": (
        build(text("t") + u32(2**32 - 1) + bytes(64), tensors=1),
        "'t': expected 1 to 4 dimensions, found 4294967295",
    ),
    "zero_dimension": (tensor_file(info("t", (4, 0))), "'t': shape (0, 4) is impossible"),
    "product": (tensor_file(info("t", (2**33, 2**33))), "'t': shape (8589934592, 8589934592) is"),
    "type_removed": (tensor_file(info("t", (4,), 4)), "'t': ggml type 4 is unknown; use another"),
    "type_huge": (tensor_file(info("t", (4,), 2**32 - 1)), "ggml type 4294967295 is unknown"),
    "row_length": (
        tensor_file(info("t", (16, 2), T.Q4_0)),
        "'t': expected rows of a multiple of 32 values (Q4_0), found 16",
    ),
    "offset_not_aligned": (
        tensor_file(info("t", (4,), T.F32, 16)),
        "'t': expected an offset aligned to 32, found 16",
    ),
    "duplicate_name": (
        tensor_file(info("t", (4,)), info("t", (4,), T.F32, 32)),
        "'t': the name occurs twice",
    ),
    "same_place": (
        tensor_file(info("a", (4,)), info("b", (4,))),
        "tensor 'b': overlaps tensor 'a'",
    ),
    "overlap": (
        tensor_file(info("b", (4,), T.F32, 32), info("a", (9,))),
        "tensor 'b': overlaps tensor 'a'",
    ),
    "data_cut": (
        tensor_file(info("a", (4,)), info("b", (16,), T.F32, 32), data=bytes(90)),
        "'b': 6 bytes are missing at the end of the file; the download is probably incomplete",
    ),
    "no_data": (build(info("t", (4,)), tensors=1), "bytes are missing at the end of the file"),
    "offset_beyond": (
        tensor_file(info("t", (4,), T.F32, 2**64 - 32)),
        "18446744073709551536 bytes are missing",
    ),
    "alignment_beyond": (
        build(
            pair("general.alignment", V.UINT32, u32(2**31)),
            info("t", (4,)),
            keys=1,
            tensors=1,
            data=bytes(16),
        ),
        "tensor 't': 2147483",
    ),
}

CASES = {**HEADERS, **METADATA, **TENSORS}


@pytest.mark.parametrize(("content", "expected"), CASES.values(), ids=CASES.keys())
def test_hostile_file_is_refused_with_its_reason(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    assert expected in message_of(tmp_path, content)


def test_valid_file_of_version_2_opens(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(VALID[:4] + u32(2) + VALID[8:])
    with open_gguf(path) as file:
        assert list(file.tensors) == ["norm", "weight", "ids"]
        assert file.metadata["tokens"] == ["a", "", "\udcff"]
        assert [inner.tolist() for inner in file.metadata["nested"]] == [[1], []]


def test_tensor_at_an_odd_address_dequantizes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    table = build(
        pair("general.alignment", V.UINT32, u32(1)),
        info("pad", (1,), T.I8, 0),
        info("t", (2,), T.F32, 1),
        keys=1,
        tensors=2,
    )
    path.write_bytes(table + b"\0" + np.array([1.5, -2], "<f4").tobytes())
    with open_gguf(path) as file:
        assert file.tensors["t"].dequantize().tolist() == [1.5, -2]


def test_path_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"absent\.gguf: cannot be opened: No such file"):
        open_gguf(tmp_path / "absent.gguf")


def test_path_to_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="expected a file, found a folder"):
        open_gguf(tmp_path)


def test_path_with_a_nul_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="null"):
        open_gguf(f"{tmp_path}/a\0.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_path_to_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match="found a device or a pipe"):
        open_gguf(tmp_path / "model.gguf")


def test_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "model.gguf").write_bytes(VALID)
    monkeypatch.setattr(Path, "open", deny)  # file modes do not bind an administrator
    with pytest.raises(GGUFError, match=r"model\.gguf: cannot be opened: Permission denied"):
        open_gguf(tmp_path / "model.gguf")


def test_truncation_anywhere_is_refused(tmp_path: Path) -> None:
    for size in range(len(VALID)):
        assert message_of(tmp_path, VALID[:size])


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "model.gguf"


def check_use(path: Path, content: bytes) -> None:
    """Open a file and expand its tensors: only `GGUFError` may be raised, and memory is small."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(GGUFError), open_gguf(path) as file:
            for tensor in file.tensors.values():
                with contextlib.suppress(GGUFError):
                    assert tensor.dequantize().shape == tensor.shape
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_ALLOCATION_BYTES


@pytest.mark.parametrize("number", [2**31, 2**62, 2**63 - 1, 2**64 - 1], ids=hex)
def test_huge_number_anywhere_opens_or_is_refused(scratch: Path, number: int) -> None:
    for position in range(4, len(VALID) - 144):
        check_use(scratch, VALID[:position] + u64(number) + VALID[position + 8 :])


@given(position=st.integers(0, len(VALID) - 1), value=st.integers(0, 255))
@example(position=5, value=1)  # the version
def test_changed_byte_opens_or_is_refused(scratch: Path, position: int, value: int) -> None:
    check_use(scratch, VALID[:position] + bytes([value]) + VALID[position + 1 :])


@given(tail=st.binary(max_size=200), size=st.integers(0, len(VALID)))
def test_random_tail_opens_or_is_refused(scratch: Path, tail: bytes, size: int) -> None:
    check_use(scratch, VALID[:size] + tail)
