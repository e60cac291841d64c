"""Tests of packed matrices that outlive the process: the same bits, for the same file only."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import platformdirs
import pytest
from api.tiny_models import spoilt
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st
from kernels.made import TYPES, block_columns, kernels_of, random_tensor, run_python
from phicore_jax.kernels import kept
from phicore_jax.kernels.kept import layout_digest

import phicore
from phicore.disk import writing
from phicore.gguf.reader import open_gguf
from phicore.testing.tiny_models import Q4_K_M, Tiny, write_model

IDS = [5, 17, 40, 200, 3]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the matrices of small models, too, in a folder of the test's own; return the folder."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(kept, "LEAST_BYTES", 0)
    monkeypatch.delenv("PHICORE_PACKED_CACHE")
    return tmp_path / "cache" / "phicore" / "packed"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", Tiny(), Q4_K_M)


def wait_for_writers() -> None:
    for thread in writing._threads:
        thread.join(600)
        assert not thread.is_alive()


def logits(path: Path, **options: object) -> tuple[np.ndarray, int]:
    """Return the logits of a text, and how many matrices were packed for them."""
    packed: list[object] = []
    from phicore_jax.kernels.runtime import Kernels

    original = Kernels._strips

    def counted(self, tensors):
        packed.append(tensors)
        return original(self, tensors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "_strips", counted)
        patch.setattr(writing, "WAIT_S", 0.001)
        with phicore.load(path, "jax", **options) as model:
            found = model.logits(IDS)
    wait_for_writers()
    return found, len(packed)


@given(data=st.data(), ggml_type=st.sampled_from(TYPES), count=st.integers(1, 2))
def test_mapped_strips_have_the_bits_of_packed_ones(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, ggml_type: Type, count: int
) -> None:
    path = tmp_path_factory.mktemp("kept") / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platformdirs, "user_cache_path", lambda name: path.parent / name)
        with open_gguf(write_model(path, Tiny(), Type.Q8_0)) as file:
            kernels = kernels_of(kept_target())
            rng = np.random.default_rng(0)
            columns = block_columns(ggml_type) * data.draw(st.integers(1, 3))
            rows = [16 * data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40))]
            tensors = [
                replace(random_tensor(ggml_type, n, columns, rng), name=f"t{i}")
                for _ in range(count)
                for i, n in enumerate(rows)
            ]
            exact = kernels.pack(tensors, count)
            with kernels.loading(file, lambda: False) as pack:
                first = pack(tensors, count)
            wait_for_writers()
            with kernels.loading(file, lambda: False) as pack:
                again = pack(tensors, count)
    assert first.strips.flags.writeable
    assert not again.strips.flags.writeable  # a map of the file
    for found in (first, again):
        assert found.strips.tobytes() == exact.strips.tobytes()
        assert (found.type, found.rows, found.columns) == (exact.type, exact.rows, exact.columns)


def kept_target() -> str:
    from phicore_jax.kernels.build import supported_targets

    return supported_targets()[0]


@pytest.mark.parametrize("architecture", ["phi3", "llama"])
def test_second_load_packs_nothing_and_computes_the_same(
    tmp_path: Path, folder: Path, architecture: str
) -> None:
    path = write_model(tmp_path / "m.gguf", Tiny(arch=architecture), Q4_K_M)
    first, packed = logits(path)
    assert packed > 0
    (kept_file,) = folder.iterdir()
    assert kept_file.name.startswith("m-")
    again, packed = logits(path)
    assert packed == 0
    assert again.tobytes() == first.tobytes()
    assert list(folder.iterdir()) == [kept_file]


def test_experts_are_kept(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", Tiny(arch="phimoe", num_local_experts=4), Q4_K_M)
    first, packed = logits(path)
    assert packed > 0
    again, packed = logits(path)
    assert packed == 0
    assert again.tobytes() == first.tobytes()


def test_option_and_variable_switch_it_off(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert logits(model, packed_cache=False)[1] > 0
    for off in ("0", "0GB", "1kB"):  # the last is too little
        monkeypatch.setenv("PHICORE_PACKED_CACHE", off)
        assert logits(model)[1] > 0
    assert not folder.exists()
    monkeypatch.setenv("PHICORE_PACKED_CACHE", "much")
    with pytest.raises(phicore.ArgumentError, match="PHICORE_PACKED_CACHE: expected a size such"):
        logits(model)


def test_fingerprint_does_not_depend_on_the_option(model: Path) -> None:
    with (
        phicore.load(model, "jax") as one,
        phicore.load(model, "jax", packed_cache=False) as other,
        phicore.load(model, "jax", cache_type="f16") as third,
    ):
        assert one.fingerprint == other.fingerprint != third.fingerprint
    wait_for_writers()


def test_small_model_is_not_kept(
    model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "LEAST_BYTES", model.stat().st_size + 1)
    assert logits(model)[1] > 0
    assert not folder.exists()


def test_changed_file_is_packed_again(model: Path, folder: Path, tmp_path: Path) -> None:
    """A change of one byte, and another time of the change with the same contents."""
    first, _ = logits(model)
    old = model.stat()
    with open_gguf(model) as file:
        tensor = file.tensors["blk.1.ffn_down.weight"].data
        at = model.read_bytes().index(tensor.tobytes()) + 1000  # not a byte of the fingerprint
        fingerprint = file.fingerprint()
    with model.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x55]))
    os.utime(model, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    with open_gguf(model) as file:
        assert file.fingerprint() == fingerprint
    changed, packed = logits(model)
    assert packed > 0
    assert changed.tobytes() != first.tobytes()
    assert logits(model, packed_cache=False)[0].tobytes() == changed.tobytes()
    assert len(list(folder.iterdir())) == 2


def test_replaced_file_of_the_same_size_and_time_is_packed_again(
    model: Path, tmp_path: Path
) -> None:
    first, _ = logits(model)
    old = model.stat()
    other = write_model(tmp_path / "other.gguf", Tiny(), Q4_K_M, seed=1)
    assert other.stat().st_size == old.st_size
    other.replace(model)
    os.utime(model, ns=(old.st_atime_ns, old.st_mtime_ns))
    changed, packed = logits(model)
    assert packed > 0
    assert changed.tobytes() != first.tobytes()


@pytest.mark.parametrize("damage", ["header", "short", "empty", "long"])
def test_damaged_file_is_made_anew(model: Path, folder: Path, damage: str) -> None:
    first, _ = logits(model)
    (file,) = folder.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "header":
        data[100] ^= 1
    sizes = {"header": len(data), "short": len(data) - 1, "empty": 0, "long": len(data) + 1}
    file.write_bytes(bytes(data[: sizes[damage]]).ljust(sizes[damage], b"\0"))
    again, packed = logits(model)
    assert packed > 0
    assert again.tobytes() == first.tobytes()
    assert logits(model)[1] == 0
    assert list(folder.iterdir()) == [file]


def test_layout_and_target_are_part_of_the_identity(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_gguf(model) as file:
        keys = [kept.KeptMatrices(file, target).key for target in ("avx2", "generic")]
        monkeypatch.setattr(kept, "layout_digest", lambda: "another")
        keys.append(kept.KeptMatrices(file, "avx2").key)
    assert len({key.file_name for key in keys}) == 3


def test_digest_of_the_layout_changes_with_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in Path(kept.__file__).parent.glob("*.py"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(kept, "__file__", str(tmp_path / "kept.py"))
    before = layout_digest.__wrapped__()
    assert before == layout_digest()
    formats = tmp_path / "formats.py"
    formats.write_text(formats.read_text().replace("GROUP = 32", "GROUP = 64"))
    assert layout_digest.__wrapped__() != before


def test_load_that_fails_keeps_nothing(model: Path, folder: Path) -> None:
    spoilt(model, "output_norm.weight", np.nan)
    with pytest.raises(phicore.GGUFError, match="expected finite numbers"):
        logits(model)
    wait_for_writers()
    assert not folder.exists()


@pytest.mark.complete
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped on Linux")
def test_next_process_maps_the_file(tmp_path: Path, model: Path) -> None:
    program = f"""
from pathlib import Path
from phicore_jax.kernels import kept
kept.LEAST_BYTES = 0
import phicore
with phicore.load({str(model)!r}, "jax") as model:
    model.logits([1, 2, 3])
    print(*(line for line in open("/proc/self/maps") if ".arrays" in line), sep="")
"""
    environment = {"XDG_CACHE_HOME": str(tmp_path / "own"), "PHICORE_PACKED_CACHE": "1GB"}
    assert run_python(program, **environment) == "\n"
    (mapped,) = run_python(program, **environment).split("\n")[:-2]
    assert mapped.split()[1] == "r--s"  # read-only, and shared with other processes
