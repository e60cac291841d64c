"""Every backend against transformers in float32, on tiny random models of every type and shape.

The goldens are made by tools/make_reference.py; tests/golden/README.md says what they hold.
"""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import synthetic
from compare import assert_close
from tolerances import FLOAT32_LOGITS

from phicore.config import Phi3Config
from phicore.engine import Engine
from phicore.errors import GGUFError
from phicore.gguf.reader import open_gguf
from phicore.loader import load_params
from phicore.sampler import Sampling
from phicore.timings import Timings

GOLDEN = Path(__file__).parent.parent / "golden" / "phi3.npz"
CASES = {case.name: case for case in synthetic.cases()}
LONG_ROPE = {"long_factors", "short_factors"}
GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)


@cache
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


def engine_of(path: Path, ops) -> Engine:
    with open_gguf(path) as file:
        config = Phi3Config.from_gguf(file.metadata)
        params = load_params(ops, config, file, lambda *_: None)
    context = config.max_position_embeddings
    return Engine(ops, config, params, vocab_size=80, context=context, progress=lambda *_: None)


@pytest.mark.parametrize("name", sorted(CASES.keys() - LONG_ROPE))
def test_logits_of_tiny_model_equal_transformers(name, ops, tmp_path):
    path = CASES[name].write(tmp_path / "tiny.gguf")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == str(golden()[f"{name}/sha256"]), "the writer changed: make the goldens again"

    logits = engine_of(path, ops).logits(golden()["token_ids"].tolist())

    assert logits.dtype == np.float32
    assert_close(logits, golden()[f"{name}/logits"], FLOAT32_LOGITS)


@pytest.mark.parametrize("name", ["F32", "mix", "llama", "window", "partial_rope"])
def test_greedy_tokens_of_tiny_model_equal_transformers(name, ops, tmp_path):
    expected = golden()[f"{name}/greedy_ids"].tolist()
    engine = engine_of(CASES[name].write(tmp_path / "tiny.gguf"), ops)

    tokens = engine.generate(
        golden()["token_ids"].tolist(), GREEDY, limit=len(expected), seed=0, timings=Timings()
    )

    assert list(tokens) == expected


@pytest.mark.parametrize("name", sorted(LONG_ROPE))
def test_long_rope_is_refused_until_it_is_computed(name, ops, tmp_path):
    with pytest.raises(GGUFError, match="rope"):
        engine_of(CASES[name].write(tmp_path / "tiny.gguf"), ops)
