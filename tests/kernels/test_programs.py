"""Tests of compiled programs on disk: a later process finds them without tracing anything."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
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
from phicore.network.sampling import Sampling

traced, forward = [], graph.forward
def count(*args):
    traced.append(args)
    return forward(*args)
graph.forward = count

with phicore.load("MODEL", "jax", OPTIONS) as model:
    tokens = [p.token_id for p in model.generate([5, 6, 7], max_tokens=4, seed=1, ignore_eos=True)]
    if model.engine.drafter is not None:
        model.engine.drafter.warm_up([1], [Sampling()])
print(json.dumps([len(traced), tokens]))
"""
"""A program that prints how many steps it traced, and the tokens of an answer. If there is a draft
model, it guesses, too."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_model(path, Tiny(), Q4_K_M)
    return path


Run = Callable[..., tuple[int, list[int]]]


@pytest.fixture
def kernels() -> None:
    """Skip a test where nothing is kept."""
    if find_kernels()[0] is None:
        pytest.skip("the JAX backend has no kernels here; `phicore backends` says why")


@pytest.fixture
def run(model: Path, tmp_path: Path, kernels: None) -> Run:
    """Return a function that runs `RUN` in a new process whose caches are in `tmp_path`."""

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
    assert not list(tmp_path.glob("phicore/jax-*/*kept*"))  # a second copy would serve nobody


@pytest.mark.complete
def test_second_process_traces_nothing_of_a_draft_model(run: Run, model: Path, tmp_path: Path):
    plain, tokens = run()
    draft = f"draft_model={str(model)!r}"
    count, with_draft = run(draft)
    assert count > plain
    assert with_draft == tokens
    assert run(draft) == (0, tokens)


HELD = """
import gc, json, jax, phicore
from phicore.engine import compiled

def text(model, **options):
    options = {"max_tokens": 4, "seed": 1, "ignore_eos": True, "temperature": 0.9, **options}
    return [p.token_id for p in model.generate([5, 6, 7], **options)]

def steps():
    found = jax.devices("cpu")[0].client.live_executables()
    names = [each.hlo_modules()[0].name for each in found]
    return sum(name.startswith(("jit_kept", "jit_traced")) for name in names)

processors = ["frequency-penalty=0.5"], ["logit-bias=3:1"]
ways = {}, {"logprobs": 2}, *({"processors": each} for each in processors)
with phicore.load("MODEL", "jax") as model:
    expected = [text(model, **way) for way in ways]
    assert steps() > 6
del model
compiled.NAME = 3
gc.collect()
assert steps() == 0
gc.disable()  # a large process seldom searches for cycles, and what is dropped must not wait for it
with phicore.load("MODEL", "jax") as model:
    found = [text(model, **way) for way in (*ways, *ways)]
    held = steps()
print(json.dumps([found == [*expected, *expected], held]))
"""
"""A program that answers in several ways and holds three compiled functions, or one."""


@pytest.mark.complete
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("bound", "most", "are_kept"),
    [("MOST_HELD", 3, True), ("MOST_HELD", 3, False), ("MOST_HELD_BYTES", 1, True)],
)
def test_few_programs_are_held_and_the_others_are_found_again(
    model: Path, tmp_path: Path, bound: str, most: int, are_kept: bool
):
    caches = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    if not are_kept:
        caches["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "jax")
    code = HELD.replace("MODEL", str(model)).replace("NAME", bound)
    is_same, held = json.loads(run_python(code, **caches))
    assert is_same
    assert held <= most
    assert (len(programs(tmp_path)) > 6) == are_kept


SIZES = """
import ctypes, json, phicore
from phicore_jax.programs import Program

class Info(ctypes.Structure):
    _fields_ = [(f"field_{i}", ctypes.c_size_t) for i in range(10)]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
told = []

def used():  # hblkhd and uordblks: what large and small pieces take
    info = library.mallinfo2()
    return info.field_4 + info.field_7

run = Program._run

def noted(self, *args):
    is_first = self._program is None
    result = run(self, *args)
    if is_first:
        told.append(self.memory_bytes)
    return result

Program._run = noted
with phicore.load("MODEL", "jax") as model:
    def text(length):
        for _ in model.generate(list(range(5, 5 + length)), max_tokens=3, logprobs=1):
            pass
    text(3)
    before, first = used(), len(told)
    for length in (40, 90, 200):
        text(length)
    print(json.dumps([sum(told[first:]), len(told) - first, used() - before]))
"""
"""A program that tells how much memory programs are said to take, and how much they take."""


@pytest.mark.complete
@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc tells what it has given")
def test_programs_take_about_as_much_memory_as_they_tell(tmp_path: Path):
    model = tmp_path / "deep.gguf"
    write_model(model, Tiny(num_hidden_layers=24), Q4_K_M)
    caches = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    for _ in range(2):  # they are compiled, and then loaded
        told, count, grown = json.loads(run_python(SIZES.replace("MODEL", str(model)), **caches))
        assert count >= 3
        assert told / 3 < grown < 1.5 * told


@pytest.mark.complete
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
    for path in programs(tmp_path):
        path.write_bytes(path.read_bytes()[:-9])
    assert run() == (count, tokens)
    for path in programs(tmp_path):
        code = path.read_bytes()
        path.write_bytes(code[:1000] + bytes([code[1000] ^ 1]) + code[1001:])
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


BEGIN = """
import signal, sys, threading, time
from pathlib import Path
from phicore_jax.kernels.runtime import Kernels
from phicore_jax.programs import folder

pack, begun = Kernels._strips, threading.Event()
def strips(self, tensors):
    begun.set()
    AT_PACKING
    return pack(self, tensors)
Kernels._strips = strips
"""
"""What a program begins with to do something whenever matrices are packed."""

MAIN = """
import phicore.__main__ as program
sys.argv = ["phicore", "generate", "-m", "MODEL", "-b", "jax", "--raw", "-n", "2", "ab"]
program.main()
"""


@pytest.mark.complete
def test_steps_are_compiled_while_weights_are_packed(run: Run, model: Path, tmp_path: Path):
    """Packing waits until the programs are there, which would never be if these waited for it."""
    wait = """
    ends = time.monotonic() + 120
    while sum(p.suffix == "" for p in folder().glob("*")) < 3:
        assert time.monotonic() < ends, "the steps wait for the weights"
        time.sleep(0.05)
"""
    first = tmp_path / "first"
    caches = {"XDG_CACHE_HOME": str(first), "HOME": str(first)}
    program = BEGIN.replace("    AT_PACKING", wait) + RUN
    program = program.replace("MODEL", str(model)).replace("OPTIONS", "")
    count, tokens = json.loads(run_python(program, **caches))
    assert count == 2
    assert run() == (count, tokens)


def packing(model: Path, tmp_path: Path, at_packing: str, before: str = "") -> tuple[int, str]:
    """Run `phicore generate` with something done at packing; return status and error output."""
    program = BEGIN.replace("AT_PACKING", at_packing) + before + MAIN.replace("MODEL", str(model))
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return found.returncode, found.stderr


@pytest.mark.complete
@pytest.mark.usefixtures("run")
def test_error_while_weights_are_packed_is_one_line(model: Path, tmp_path: Path):
    status, errors = packing(model, tmp_path, "raise MemoryError")
    lines = [line for line in errors.splitlines() if not line.startswith(("loading", "compiling"))]
    assert status == 1
    assert lines == ["phicore: not enough memory; a smaller quantization or --ctx needs less"]


@pytest.mark.usefixtures("run")
def test_interrupt_while_weights_are_packed_ends_at_once(model: Path, tmp_path: Path):
    """The process does not wait for the thread: packing takes longer than the test may take."""
    press = """
def press():
    begun.wait()
    time.sleep(0.5)
    signal.raise_signal(signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
"""
    status, errors = packing(model, tmp_path, "time.sleep(600)", press)
    assert (status, errors) == (130, "")


@pytest.mark.complete
@pytest.mark.usefixtures("run")
def test_python_ends_without_packing_the_rest(model: Path, tmp_path: Path):
    """A program that loads a model and gives it up does not wait until all weights are packed."""
    program = (
        BEGIN.replace("AT_PACKING", "packed.append(tensors); time.sleep(1)")
        + """
import phicore
packed = []
model = phicore.load("MODEL", "jax")
begun.wait()
KEEP
import atexit
atexit.register(lambda: print(len(packed)))
""".replace("MODEL", str(model))
    )
    caches = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    for keep in ("", "model.close(); del model"):
        packed = int(run_python(program.replace("KEEP", keep), **caches))
        assert packed <= 3
