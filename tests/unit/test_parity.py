"""Tests of comparing backends' readings and finding the first operation in which they differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from api.tiny_models import write_tiny
from phicore_numpy.backend import NumpyBackend

from phicore import load
from phicore.backend import Array
from phicore.errors import ArgumentError
from phicore.lab.parity import Reading, compare, first_part, parity, read_reference
from phicore.lab.tracing import trace

LOGITS = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
REFERENCE = Reading("reference", [LOGITS], [[1, 2, 3]])


def test_compare_a_reading_with_itself_is_nothing():
    found = compare(REFERENCE, REFERENCE)
    assert (found.relative_error, found.kl_divergence, found.top1_agreement) == (0, 0, 1)
    assert (found.first_divergent, found.is_within, found.positions) == (None, True, 2)


def test_compare_figures_are_those_of_their_formulas():
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 3
    found = compare(replace(REFERENCE, logits=[other]), REFERENCE)
    assert found.kl_divergence == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-5)
    assert found.top1_agreement == 0.5
    expected = np.linalg.norm(other - LOGITS) / np.linalg.norm(LOGITS)
    assert found.relative_error == pytest.approx(expected)
    assert not found.is_within


def test_compare_finds_the_first_token_that_differs():
    two = Reading("b", [LOGITS, LOGITS], [[1, 2, 3], [4, 5, 6]])
    for texts, first in (
        ([[1, 2, 3], [4, 5, 6]], None),
        ([[1, 2, 9], [4, 9, 6]], (1, 1)),
        ([[1, 2], [4, 5, 7]], (2, 1)),
    ):
        assert compare(replace(two, texts=texts), two).first_divergent == first


def test_compare_what_is_not_finite_is_too_far():
    bad = np.array(LOGITS)
    bad[0, 0] = np.nan
    assert not compare(replace(REFERENCE, logits=[bad]), REFERENCE).is_within


def test_compare_other_shapes_say_so():
    with pytest.raises(ArgumentError, match=r"^reference: logits \(2, 3\), the model's have"):
        compare(replace(REFERENCE, logits=[LOGITS[:, :2]]), REFERENCE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("parity") / "tiny.gguf")


def test_trace_has_every_operation_in_order(tiny: Path, backend_name: str):
    with load(tiny, backend=backend_name) as model:
        found = trace(model.engine, [1, 2, 3])
        logits = model.logits([1, 2, 3])
    layers = ["input_layernorm", "qkv_proj", "rope", "attention", "o_proj"]
    layers += ["post_attention_layernorm", "gate_up_proj", "swiglu", "down_proj"]
    expected = ["embed_tokens"]
    expected += [
        f"layers.{n}.{name}" for n in range(model.config.num_hidden_layers) for name in layers
    ]
    assert list(found) == [*expected, "norm", "lm_head"]
    assert found["embed_tokens"].shape == (1, 3, model.config.hidden_size)
    np.testing.assert_allclose(found["lm_head"][0], logits, rtol=1e-3, atol=1e-3)


def test_trace_of_a_tied_model_names_the_output(tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf", tie_word_embeddings=True)
    with load(path, backend="numpy") as model:
        assert list(trace(model.engine, [1, 2]))[-1] == "embed_tokens (output)"


def test_first_part_is_where_a_fault_was_planted(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    with load(tiny, backend="numpy") as model:
        sound = trace(model.engine, [1, 2, 3, 4])
    calls = []
    swiglu = NumpyBackend.swiglu

    def faulty(self: NumpyBackend, gate_up: Array) -> Array:
        calls.append(1)
        return swiglu(self, gate_up) * (1.01 if len(calls) == 2 else 1)

    monkeypatch.setattr(NumpyBackend, "swiglu", faulty)
    with load(tiny, backend="numpy") as model:
        part = first_part(trace(model.engine, [1, 2, 3, 4]), sound, 1e-4)
    assert part["operation"] == "layers.1.swiglu"
    assert part["errors"]["layers.1.gate_up_proj"] == 0
    assert part["errors"]["layers.1.swiglu"] == pytest.approx(0.01, rel=1e-3)


def test_parity_of_every_backend(tiny: Path, backend_name: str):
    found = parity(str(tiny), ["numpy", backend_name], prompts=["the sea", "and"], n_gen=8)
    [row] = found["comparisons"]
    assert row["is_within"]
    assert row["first_divergent"] is None
    assert row["top1_agreement"] == 1


def test_parity_against_a_reference(tiny: Path, tmp_path: Path):
    ids = [3, 1, 4, 1, 5]
    with load(tiny, backend="numpy") as model:
        pieces = model.generate(
            ids, max_tokens=4, temperature=0, repeat_penalty=1.0, ignore_eos=True
        )
        arrays = {
            "token_ids": np.array(ids, np.int32),
            "logits": model.logits(ids),
            "greedy_ids": np.array([piece.token_id for piece in pieces], np.int32),
        }
    np.savez(tmp_path / "ref.npz", **arrays)
    found = parity(str(tiny), ["numpy"], against=tmp_path / "ref.npz", n_gen=8)
    [row] = found["comparisons"]
    assert (row["name"], row["reference"], row["positions"]) == ("numpy", "ref.npz", 5)
    assert row["relative_error"] < 1e-6
    assert row["first_divergent"] is None


def test_read_reference_of_another_file_is_an_error(tmp_path: Path):
    (tmp_path / "a.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "b.npz", logits=np.zeros((2, 3)))
    np.savez(tmp_path / "c.npz", token_ids=np.arange(3), logits=LOGITS, greedy_ids=np.arange(1))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ArgumentError, match=rf"{name}: expected an \.npz file with token_ids"):
            read_reference(tmp_path / name)
    with pytest.raises(ArgumentError, match=r"missing\.npz: No such file"):
        read_reference(tmp_path / "missing.npz")
    with pytest.raises(ArgumentError, match=r"c\.npz: logits \(2, 3\) do not fit \(3,\)"):
        read_reference(tmp_path / "c.npz")


def test_parity_of_one_backend_has_nothing_to_compare(tiny: Path):
    with pytest.raises(ArgumentError, match=r"^backends: expected two or more"):
        parity(str(tiny), ["numpy"])
