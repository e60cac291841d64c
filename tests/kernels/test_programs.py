"""Tests of compiled programs on disk: a later process finds them without tracing anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kernels.made import run_python
from phicore_jax import programs as programs_module
from phicore_jax.kernels import find_kernels

from phicore.testing.tiny_models import Q4_K_M, Tiny, write_model

RUN = """
import json, phicore
from phicore.network import graph

traced, forward = [], graph.forward
def count(*args):
    traced.append(args)
    return forward(*args)
graph.forward = count

with phicore.load("MODEL", "jax", OPTIONS) as model:
    tokens = [p.token_id for p in model.generate([5, 6, 7], max_tokens=4, seed=1, ignore_eos=True)]
print(json.dumps([len(traced), tokens]))
"""
"""A program that prints how many steps it traced, and the tokens of an answer."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(path, Tiny(), Q4_K_M)
    return path


Run = Callable[..., tuple[int, list[int]]]


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Run:
    """Return a function that runs `RUN` in a new process whose caches are in `tmp_path`."""
    if find_kernels()[0] is None:
        pytest.skip("the JAX backend has no kernels here; `phicore backends` says why")

    def run(options: str = "", **environment: str) -> tuple[int, list[int]]:
        program = RUN.replace("MODEL", str(model)).replace("OPTIONS", options)
        caches = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
        count, tokens = json.loads(run_python(program, **caches, **environment))
        return count, tokens

    return run


@pytest.fixture(autouse=True)
def no_cache_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept where the user has chosen JAX's own cache, as the other tests do."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def programs(cache: Path) -> list[Path]:
    return sorted(p for p in cache.glob("phicore/programs-*/*") if p.suffix != ".json")


def test_second_process_traces_nothing(run: Run, tmp_path: Path):
    count, tokens = run()
    assert count == 2  # the prompt's step, and the other tokens'
    assert len(programs(tmp_path)) == 3  # these, and the sampler after the prompt
    assert run() == (0, tokens)


def test_programs_that_were_removed_are_compiled_and_kept_again(run: Run, tmp_path: Path):
    """XLA cannot write a program that it found in JAX's cache, which still has these."""
    count, tokens = run()
    for path in programs(tmp_path):
        path.unlink()
    assert run() == (count, tokens)
    assert run() == (0, tokens)


@pytest.mark.complete
def test_damaged_programs_are_compiled_again(run: Run, tmp_path: Path):
    count, tokens = run()
    first, second, _ = programs(tmp_path)
    first.write_bytes(first.read_bytes()[:-9])
    code = second.read_bytes()
    second.write_bytes(code[:1000] + bytes([code[1000] ^ 1]) + code[1001:])
    assert run() == (count, tokens)
    assert run() == (0, tokens)


@pytest.mark.complete
def test_programs_whose_kernels_were_removed_are_compiled_again(run: Run, tmp_path: Path):
    count, tokens = run()
    shutil.rmtree(tmp_path / "phicore" / "kernels")
    assert run() == (count, tokens)
    assert run() == (0, tokens)


@pytest.mark.complete
@pytest.mark.parametrize("lists", ["[", "{}", '["../x", 3]', "[1]"])
def test_damaged_list_of_programs_does_no_harm(run: Run, tmp_path: Path, lists: str):
    _, tokens = run()
    (path,) = tmp_path.glob("phicore/programs-*/*.json")
    kept = json.loads(path.read_text())
    path.write_text(lists)
    assert run() == (0, tokens)
    assert sorted(json.loads(path.read_text())) == sorted(kept)  # two threads add to it


@pytest.mark.complete
@pytest.mark.parametrize(
    ("options", "environment"),
    [
        ("", {"PHICORE_THREADS": "1"}),
        ("", {"JAX_ENABLE_CUSTOM_PRNG": "1"}),
        ("cache_type='f32'", {}),
        ("fast_prefill=True", {}),
    ],
)
def test_other_settings_have_programs_of_their_own(
    run: Run, options: str, environment: dict[str, str]
):
    count, _ = run()
    assert run(options, **environment)[0] == count
    assert run(options, **environment)[0] == 0
    assert run()[0] == 0


@pytest.mark.complete
def test_changed_source_is_traced_again(run: Run, tmp_path: Path, monkeypatch: Any):
    count, tokens = run()
    sources = tmp_path / "sources"
    shutil.copytree(Path(programs_module.__file__).parent, sources / "phicore_jax")
    monkeypatch.setenv("PYTHONPATH", str(sources))
    assert run() == (0, tokens)
    with (sources / "phicore_jax" / "experts.py").open("a") as file:
        file.write("# changed\n")
    assert run() == (count, tokens)


@pytest.mark.complete
def test_nothing_is_kept_where_the_user_chose_jaxs_cache(run: Run, tmp_path: Path):
    count, tokens = run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == (count, tokens)
    assert programs(tmp_path) == []
