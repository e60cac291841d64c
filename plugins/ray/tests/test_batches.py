"""Answers to data sets: the same ones whatever the number of actors, and when an actor dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import phicore_ray
import pytest
from ray_clusters import Cluster, data, descendants, serve, wait_until

import phicore
from phicore.errors import ArgumentError

PROMPTS = [{"id": i, "prompt": f"Tell me about {i}", "seed": 3 * i} for i in range(40)]
ARGUMENTS = {"max_tokens": 12, "temperature": 0.9}


@pytest.fixture
def idle(cluster: Cluster) -> None:
    """Let the cluster's CPUs be free."""
    if "phicore" in serve.status().applications:
        serve.delete("phicore")


def answers(tiny_path: Path, prompts: list[dict[str, Any]], **options: Any) -> dict[int, Any]:
    """Return the answers by the prompts' ids."""
    given: dict[str, Any] = {"request": ARGUMENTS, "seed_column": "seed", "backend": "jax"}
    found = phicore_ray.map_batches(
        data.from_items(prompts).repartition(5), tiny_path, **{**given, **options}
    )
    return {row["id"]: (row["answer"], row["answer_finish_reason"]) for row in found.take_all()}


@pytest.mark.usefixtures("idle")
def test_answers_are_those_of_one_process_whatever_the_number_of_actors(tiny_path: Path):
    with phicore.load(tiny_path, "jax") as model:
        requests = [model.request(p["prompt"], seed=p["seed"], **ARGUMENTS) for p in PROMPTS]
        expected = {a.index: (a.text, a.finish_reason) for a in model.generate_many(requests)}
    assert answers(tiny_path, PROMPTS, num_cpus=0.5) == expected
    assert answers(tiny_path, PROMPTS, num_cpus=0.5, concurrency=2, batch_size=3) == expected


@pytest.mark.usefixtures("idle")
def test_block_whose_actor_is_killed_is_computed_again(endless_path: Path):
    options: dict[str, Any] = {
        "backend": "numpy",
        "num_cpus": 0.5,
        "batch_size": 4,
        "request": {"max_tokens": 150, "temperature": 0.9},
    }
    expected = answers(endless_path, PROMPTS, **options)
    before = descendants(os.getpid())
    found: list[dict[int, Any]] = []
    thread = threading.Thread(
        target=lambda: found.append(answers(endless_path, PROMPTS, **options, concurrency=2))
    )
    thread.start()

    def busy() -> int | None:
        for pid in descendants(os.getpid()) - before:
            try:
                name = Path(f"/proc/{pid}/cmdline").read_text()
                ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
            except OSError:
                continue
            if "Answering.__call__" in name or ("MapWorker" in name and ticks > 100):
                return pid
        return None

    pid = wait_until(busy, "an actor that computes")
    time.sleep(0.2)
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert found == [expected]


@pytest.mark.usefixtures("idle")
def test_prompt_that_is_too_long_is_an_error_of_its_row(tiny_path: Path):
    prompts = [*PROMPTS[:2], {"id": 9, "prompt": "word " * 2000, "seed": 1}]
    found = answers(tiny_path, prompts, num_cpus=0.5)
    assert found[9][0] == ""
    assert found[9][1].startswith("error: ")
    assert found[0][1] in ("stop", "length")


def test_wrong_arguments_are_told_before_anything_is_computed(cluster: Cluster):
    prompts = data.from_items(PROMPTS)
    with pytest.raises(ArgumentError, match="concurrency: expected 1 or more, got 0"):
        phicore_ray.map_batches(prompts, concurrency=0)
    with pytest.raises(ArgumentError, match="request: give seed or seed_column instead"):
        phicore_ray.map_batches(prompts, request={"seed": 1})
