"""Tests of `benchmarks/engines`: the protocol of a process, and ik_llama.cpp's programs.

ik_llama.cpp is not installed here, so programs take its place that print what its documentation
shows (the README of `llama-batched-bench`, and the fields of `llama-bench -o json`).
"""

from __future__ import annotations

import importlib
import json
import stat
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = """#!{python}
import json, sys
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with Path({log!r}).open("a") as file:
    file.write(json.dumps(options) + "\\n")
print("some library says something")
print(json.dumps([{{"build_commit": "8337e4cd", "build_number": 4242, "n_prompt": 1,
                    "avg_ns": 1, "avg_ts": {speed}}}], indent=2))
"""
MANY = """#!{python}
print('''
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|     1 |     16 |    4 |     68 |    0.373 |  1373.96 |    6.878 |    74.44 |    7.251 |   141.23 |
|     1 |     16 |    8 |    136 |    0.751 |  1363.27 |    7.344 |   139.43 |    8.095 |   252.99 |
''')
"""


@pytest.fixture
def ik() -> ModuleType:
    return importlib.import_module("engines.ik")


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are scripts with #!")
def test_ik_llama_cpps_programs_are_asked_and_read(ik: ModuleType, tmp_path: Path):
    log = str(tmp_path / "log")
    text = BENCH.format(python=sys.executable, log=log, speed=50.0)
    bench = program(tmp_path / "llama-bench", text)
    program(tmp_path / "llama-batched-bench", MANY.format(python=sys.executable))
    with ik.Programs(str(bench), "m.gguf", 2) as programs:
        assert programs.ask("about") == "ik_llama.cpp 8337e4cd (build 4242)"
        assert programs.ask("prefill", 100) == pytest.approx(2.0)
        assert programs.ask("decode", 16, 1) == pytest.approx(1 / 50)
        assert programs.ask("after", 16, 2000) == pytest.approx((40.0, 1 / 50))
        assert programs.ask("decode_many", 16, 8) == pytest.approx(1 / 139.43)
        assert programs.ask("save_logits", [1, 2], "file") is None
        assert programs.ask("products") is None
    asked = [json.loads(line) for line in Path(log).read_text().splitlines()]
    assert all(one["-m"] == "m.gguf" and one["-t"] == "2" and one["-fa"] == "1" for one in asked)
    assert [(one["-p"], one["-n"], one.get("-gp")) for one in asked] == [
        ("1", "0", None),
        ("100", "0", None),
        ("0", "16", None),
        ("2000", "0", None),
        ("0", "0", "2000,16"),
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-ins are scripts with #!")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#!/bin/sh\necho 'cannot load' >&2; exit 3\n", "llama-bench ended with 3: cannot load"),
        ("#!/bin/sh\necho nothing\n", "llama-bench printed no JSON: 'nothing\\n'"),
    ],
)
def test_program_that_fails_ends_its_engine_alone(
    ik: ModuleType, tmp_path: Path, text: str, message: str
):
    bench = program(tmp_path / "llama-bench", text)
    with (
        ik.Programs(str(bench), "m.gguf", 2) as programs,
        pytest.raises(ik.EngineEnded, match=message.replace("\\", r"\\")),
    ):
        programs.ask("prefill", 5)


def test_engine_without_a_member_answers_null():
    worker = importlib.import_module("engines.worker")

    class Least:
        vocab_size = 100

        def tokens(self, ids: list[int], count: int) -> list[int]:
            return [0] * count

    asked = [["decode_many", 3, 8], ["live_bytes", 9], ["products"], ["save_logits", [1], "p"]]
    found = [*worker.answers(Least(), map(json.dumps, asked))]
    assert found == ["null"] * 4
    [seconds] = worker.answers(Least(), iter(['["prefill", 7]']))
    assert float(seconds) >= 0


def test_process_that_ends_is_told_with_its_status():
    worker = importlib.import_module("engines.worker")
    with (
        worker.Worker(sys.executable, "no such engine", {}) as process,
        pytest.raises(worker.EngineEnded, match="its process ended with 1"),
    ):
        process.ask("about")
