"""Tests that defaults, graph, sampler and engine use exactly the listed functions."""

from dataclasses import replace
from pathlib import Path

import array_api_strict
import pytest
from gguf import GGMLQuantizationType as Type
from phicore_array_api_strict.backend import ListedNames, StrictBackend

from phicore.backend import DTYPES, FUNCTIONS, Backend
from phicore.engine import Engine, Request
from phicore.gguf.reader import open_gguf
from phicore.network.sampling import Sampling
from phicore.testing.conformance.laws import TINY
from phicore.testing.tiny_models import write_model

SMALL = replace(TINY, max_position_embeddings=300)


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_listed_functions_are_standard_names_without_repeats():
    assert len(set(FUNCTIONS)) == len(FUNCTIONS) > 20
    assert all(callable(getattr(array_api_strict, name)) for name in FUNCTIONS)
    assert all(hasattr(array_api_strict, name) for name in DTYPES)


def test_listed_names_other_name_raises():
    names = ListedNames(array_api_strict, ("exp",))
    names.exp(array_api_strict.asarray(0.0))
    with pytest.raises(AttributeError, match=r"xp\.tril is not in the list"):
        _ = names.tril
    assert names.used == {"exp"}


def test_namespace_whole_generation_uses_exactly_the_listed_functions(tmp_path: Path):
    ops = StrictBackend()
    for tiny in (SMALL, replace(SMALL, arch="phimoe", num_local_experts=3)):
        generate(ops, write_model(tmp_path / "m.gguf", tiny, Type.F32, tokenizer=False))
    unused = set(FUNCTIONS) - ops.xp.used
    assert not unused, f"listed in protocol.py, used by nothing: {sorted(unused)}"


def generate(ops: StrictBackend, path: Path) -> None:
    with open_gguf(path) as file:
        engine = Engine.load(ops, file, context=300)
        sampling = Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01)
        prompt = [1 + i % 20 for i in range(254)]  # the answer needs a larger cache
        tokens = list(engine.generate(Request(prompt, sampling, max_tokens=4, seed=1)))
        engine.logits(prompt[:3])
    assert len(tokens) == 4
    assert all(0 <= t < SMALL.vocab_size for t in tokens)


@pytest.mark.parametrize("edge", ["asarray", "to_numpy"])
def test_backend_without_what_is_required_cannot_be_made(edge: str):
    """`phicore backends` shows this TypeError as the reason why the backend is not usable."""
    incomplete = type("Incomplete", (StrictBackend,), {edge: getattr(Backend, edge)})
    with pytest.raises(TypeError, match=rf"abstract class Incomplete .*{edge}"):
        incomplete()
