"""Tests of random-weight models: sizes and types of real models, files that load, one writing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import platformdirs
import pytest
from gguf import GGMLQuantizationType as Type

import phicore
from phicore.lab import synthetic
from phicore.lab.synthetic import MODELS, TensorSpec, synthetic_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "phicore" / "synthetic"


def tensors_of(name: str) -> dict[str, TensorSpec]:
    return {tensor.name: tensor for tensor in MODELS[name].tensors()}


def test_phi_3_mini_has_the_types_of_q4_k_m() -> None:
    tensors = tensors_of("phi-3-mini")
    finer = {*range(4), 6, 9, 12, 15, 18, 21, 24, *range(27, 32)}
    expected = {
        "token_embd.weight": (Type.Q4_K, (32064, 3072)),
        "output_norm.weight": (Type.F32, (3072,)),
        "output.weight": (Type.Q6_K, (32064, 3072)),
    }
    for i in range(32):
        down = Type.Q6_K if i in finer else Type.Q4_K
        expected |= {
            f"blk.{i}.attn_norm.weight": (Type.F32, (3072,)),
            f"blk.{i}.attn_qkv.weight": (Type.Q5_K, (9216, 3072)),
            f"blk.{i}.attn_output.weight": (Type.Q4_K, (3072, 3072)),
            f"blk.{i}.ffn_norm.weight": (Type.F32, (3072,)),
            f"blk.{i}.ffn_up.weight": (Type.Q4_K, (16384, 3072)),
            f"blk.{i}.ffn_down.weight": (down, (3072, 8192)),
        }
    assert {name: (t.type, t.shape) for name, t in tensors.items()} == expected


@pytest.mark.parametrize(
    ("name", "weights", "size_bytes"),
    # Published numbers of parameters. The Phi-3-mini download has 2.39 GB.
    [("phi-3-mini", 3_821_079_552, 2_392_493_568), ("phi-3-medium", 13_960_238_080, None)],
)
def test_models_are_as_large_as_the_real_ones(
    name: str, weights: int, size_bytes: int | None
) -> None:
    tensors = tensors_of(name).values()
    assert sum(int(np.prod(t.shape)) for t in tensors) == weights
    if size_bytes is not None:
        assert sum(t.size_bytes for t in tensors) == size_bytes


def test_phi_3_medium_has_fewer_heads_of_keys_and_values() -> None:
    assert tensors_of("phi-3-medium")["blk.39.attn_qkv.weight"].shape == (7680, 5120)


def test_file_has_the_tensors_of_the_description_and_weights_of_one_scale() -> None:
    reader = gguf.GGUFReader(synthetic_model("tiny"))
    found = {t.name: t for t in reader.tensors}
    for name, spec in tensors_of("tiny").items():
        tensor = found.pop(name)
        assert (tensor.tensor_type, tensor.n_bytes) == (spec.type, spec.size_bytes)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == spec.shape
        if len(spec.shape) == 2:
            assert values.std() == pytest.approx(synthetic.WEIGHT_STD, rel=0.1)
            assert abs(values.mean()) < 0.1 * synthetic.WEIGHT_STD
            assert len(np.unique(tensor.data, axis=0)) == len(values)  # rows differ
    assert not found


def test_tensors_of_two_layers_differ() -> None:
    found = {t.name: t.data for t in gguf.GGUFReader(synthetic_model("tiny")).tensors}
    assert (found["blk.0.ffn_up.weight"] != found["blk.1.ffn_up.weight"]).mean() > 0.9


def test_tiny_model_has_finite_scores_that_differ(backend_name: str) -> None:
    with phicore.load(synthetic_model("tiny"), backend_name) as model:
        logits = model.logits([1, 300, 400, 500])
        text = model.generate("Hello", max_tokens=8, temperature=0, ignore_eos=True).text()
    assert logits.shape == (4, MODELS["tiny"].vocab_size)
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.1).all()
    assert (np.abs(np.diff(logits, axis=0)).max(axis=1) > 0.1).all()
    assert text


def test_tokenizer_has_every_byte_and_phi_3s_control_tokens() -> None:
    with phicore.load(synthetic_model("tiny"), "numpy") as model:
        tokenizer = model.tokenizer
        ids = model.encode("<|user|>\nbada é<|end|>", raw=True)
        assert model.vocab_size == tokenizer.vocab_size == MODELS["tiny"].vocab_size
    pieces = [tokenizer.piece(i) for i in ids]
    assert pieces[:2] == ["<s>", "<|user|>"]
    assert pieces[-3:] == ["<0xC3>", "<0xA9>", "<|end|>"]
    assert "".join(pieces[2:-3]) == "▁bada▁"
    assert {tokenizer.piece(i) for i in tokenizer.end_token_ids} == {"<|endoftext|>", "<|end|>"}


def test_words_are_enough_for_the_largest_vocabulary_and_distinct() -> None:
    words = synthetic._words()
    found = [next(words) for _ in range(32064)]
    assert len(set(found)) == len(found)


def test_second_call_does_not_write_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    path = synthetic_model("tiny", lambda *call: calls.append(call))
    size = sum(t.size_bytes for t in MODELS["tiny"].tensors())
    assert calls[-1] == ("writing tiny", size, size)
    monkeypatch.setattr(synthetic, "write_model", None)
    assert synthetic_model("tiny") == path


def test_what_is_written_depends_on_nothing(tmp_path: Path) -> None:
    synthetic.write_model(tmp_path / "m.gguf", "tiny")
    assert (tmp_path / "m.gguf").read_bytes() == synthetic_model("tiny").read_bytes()


def test_interrupted_write_leaves_nothing(cache: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic_model("tiny", interrupt)
    assert list(cache.iterdir()) == []


def test_disk_without_room_is_an_error_before_anything_is_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(phicore.SourceError, match=r"needs 2\.39 GB, the disk has 1\.00 GB free"):
        synthetic_model("phi-3-mini")
    assert list(cache.iterdir()) == []


def test_cache_that_cannot_be_written_is_an_error(cache: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(phicore.SourceError, match=r"tiny.*gguf: cannot be written: "):
        synthetic_model("tiny")


def test_unknown_name_is_an_error_with_those_there_are() -> None:
    with pytest.raises(phicore.ArgumentError, match="'phi-4'; there are: phi-3-mini, phi-3-medium"):
        synthetic_model("phi-4")
