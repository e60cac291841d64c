"""Answers to the prompts of a data set, with Ray Data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from ray.data import ActorPoolStrategy, Dataset

import phicore
from phicore.errors import ArgumentError, BackendError, ContextError, TokenizerError
from phicore.model import Model
from phicore_ray.scaling import Scaling

RETRIES = 3
"""A block is computed again so many times when its actor dies."""


def map_batches(
    prompts: Dataset,
    model: str | os.PathLike[str] | None = None,
    *,
    column: str = "prompt",
    output: str = "answer",
    concurrency: int = 1,
    num_gpus: float = 0.0,
    num_cpus: float | None = None,
    batch_size: int = 64,
    request: Mapping[str, Any] | None = None,
    seed_column: str | None = None,
    seed: int = 0,
    **loading: Any,
) -> Dataset:
    """Answer the prompts of a data set. Nothing is computed until the result is read.

    Each actor loads the model once, and computes the prompts of a batch together. An answer
    depends on its prompt, its seed and the arguments of the request alone, not on the number of
    actors or on the batches. When an actor dies, Ray computes its blocks again, with the same
    answers.

    Args:
        prompts: The data set. Each row has a prompt: a text, or a list of messages with `role`
            and `content`.
        model: The reference of the model, which every node of the cluster must be able to resolve.
        column: The name of the column with the prompts.
        output: The name of the column for the answers. The column `{output}_finish_reason` tells
            why each has ended: "stop", "length", "context" or "error: ...", with an empty answer.
        concurrency: The number of actors.
        num_gpus: The number of GPUs for each actor.
        num_cpus: The number of CPUs for each actor; it computes with as many threads. None takes
            an equal share of this machine's CPUs.
        batch_size: The number of prompts that an actor gets at a time.
        request: Arguments of `Model.request` for all prompts, such as `max_tokens`.
        seed_column: The name of a column with a seed for each prompt. None takes `seed`.
        seed: The seed for all prompts if there is no such column.
        loading: Further arguments of `phicore.load`.
    Returns:
        The rows with the two new columns.
    Raises:
        ArgumentError: If an argument is wrong.
    """
    if not isinstance(concurrency, int) or concurrency < 1:
        raise ArgumentError(parameter="concurrency", expected="1 or more", got=concurrency)
    if "seed" in (request or {}):
        raise ArgumentError("give seed or seed_column instead", parameter="request")
    scaling = Scaling(replicas=str(concurrency), num_gpus=num_gpus, num_cpus=num_cpus)
    chosen = {"threads": scaling.threads, **loading} if num_gpus == 0 else dict(loading)
    return prompts.map_batches(
        Answering,
        fn_constructor_args=(None if model is None else os.fspath(model), chosen),
        fn_kwargs={
            "column": column,
            "output": output,
            "seed_column": seed_column,
            "seed": seed,
            "arguments": dict(request or {}),
        },
        batch_size=batch_size,
        batch_format="numpy",
        num_cpus=scaling.cpus,
        num_gpus=num_gpus,
        compute=ActorPoolStrategy(size=concurrency),
        max_restarts=-1,
        max_task_retries=RETRIES,
    )


class Answering:
    """An actor that answers batches of prompts with a model of its own."""

    def __init__(self, reference: str | None, loading: Mapping[str, Any]) -> None:
        """Load the model.

        Raises:
            PhicoreError: If it cannot be loaded.
        """
        self._model = load(reference, loading)

    def __call__(
        self,
        batch: dict[str, np.ndarray],
        *,
        column: str,
        output: str,
        seed_column: str | None,
        seed: int,
        arguments: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Return the batch with the answers.

        Raises:
            ArgumentError: If a column is missing.
        """
        for name in (column, *(() if seed_column is None else (seed_column,))):
            if name not in batch:
                known = ", ".join(batch)
                raise ArgumentError(f"no column {name!r}; the data set has {known}")
        seeds: Any = [seed] * len(batch[column]) if seed_column is None else batch[seed_column]
        texts = np.full(len(seeds), "", dtype=object)
        reasons = np.full(len(seeds), "", dtype=object)
        requests, places = [], []
        for i, prompt in enumerate(batch[column]):
            asked: Any = prompt if isinstance(prompt, str) else _messages(prompt)
            try:
                requests.append(self._model.request(asked, seed=int(seeds[i]), **arguments))
                places.append(i)
            except (ContextError, TokenizerError) as error:  # this prompt's; others go on
                reasons[i] = f"error: {error}"
        for answer in self._model.generate_many(requests):
            i = places[answer.index]
            if answer.error is None:
                texts[i], reasons[i] = answer.text, answer.finish_reason
            else:
                reasons[i] = f"error: {answer.error}"
        return {**batch, output: texts, f"{output}_finish_reason": reasons}


def load(reference: str | None, loading: Mapping[str, Any]) -> Model:
    """Load a model, with a number of threads where the backend lets that be chosen.

    Raises:
        PhicoreError: If it cannot be loaded.
    """
    try:
        return phicore.load(reference, **loading)
    except BackendError as error:
        if error.parameter != "threads":
            raise
        return phicore.load(reference, **{**loading, "threads": None})


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": each["role"], "content": each["content"]} for each in prompt]
