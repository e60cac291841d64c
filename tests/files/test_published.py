"""Published files, rebuilt in small from their metadata, load and run on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from files.rebuild import Rebuilt, published, write

import phicore
from phicore.backend import Backend
from phicore.errors import PhicoreError
from phicore.testing.compare import assert_close
from phicore.testing.conformance.models import Reference, engine_of
from phicore.testing.tolerances import FLOAT32_LOGITS

RUNS = {name: entry for name, entry in published().items() if "refused" not in entry}
REFUSED = {name: entry for name, entry in published().items() if "refused" in entry}


@pytest.fixture(scope="session")
def file_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that writes the small file of a published one, once."""
    folder = tmp_path_factory.mktemp("published")

    @cache
    def of(name: str) -> Path:
        return write(published()[name], folder / f"{list(published()).index(name)}.gguf")

    return of


@cache
def expected(path: Path, tokens: tuple[int, ...]) -> np.ndarray:
    return engine_of(Reference(), path).logits(list(tokens))


def test_table_has_many_files_of_every_architecture() -> None:
    assert len(RUNS) >= 30
    architectures = {entry["metadata"]["general.architecture"][1] for entry in published().values()}
    assert architectures == {"phi3", "phimoe", "llama", "qwen2"}


@pytest.mark.parametrize("name", RUNS)
def test_published_file_answers_a_question(name: str, file_of: Callable[[str], Path]) -> None:
    with phicore.load(file_of(name), "numpy") as model:
        is_raw = "tokenizer.chat_template" not in RUNS[name]["metadata"]
        options = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "raw": is_raw}
        generation = model.generate("the the", **options)
        assert len(list(generation)) == 4
        prompt = "".join(model.tokenizer.piece(id) for id in generation.prompt_ids)
        assert "the" in prompt
        assert is_raw or "<|im_start|>" in prompt
        assert model.tokenizer.end_token_ids


@pytest.mark.each_value("name", "backend_name")
@pytest.mark.parametrize("name", RUNS)
def test_published_file_has_the_same_logits_on_every_backend(
    name: str, ops: Backend, file_of: Callable[[str], Path]
) -> None:
    path, vocab_size = file_of(name), len(Rebuilt(published()[name]).tokens)
    tokens = np.random.default_rng(1).integers(0, vocab_size, 12).tolist()
    ours = engine_of(ops, path).logits(tokens)
    assert_close(ours, expected(path, tuple(tokens)), FLOAT32_LOGITS)


@pytest.mark.parametrize("name", REFUSED)
def test_published_file_that_would_be_computed_wrongly_is_refused(
    name: str, file_of: Callable[[str], Path]
) -> None:
    path = file_of(name)
    with pytest.raises(PhicoreError) as caught:
        phicore.load(path, "numpy")
    assert str(caught.value).startswith(f"{path.name}: {REFUSED[name]['refused']}")
