# ruff: noqa: E402 - JAX reads its settings when it is imported
"""Compute logits and text of a model on one device and on several, and print both as JSON.

This runs as a separate process, since JAX reads its settings when it is imported. With `--address`
it is one of several processes that share the devices.

    python program.py MODEL.gguf DEVICES [--cache-type TYPE] [--steps N]
        [--process I/N --address ADDRESS]
"""

from __future__ import annotations

import argparse
import json
import os

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("devices", type=int)
parser.add_argument("--cache-type")
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--process", default="0/1")
parser.add_argument("--address")
args = parser.parse_args()
number, count = map(int, args.process.split("/"))

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices // count}"

import jax

if args.address:
    jax.distributed.initialize(args.address, count, number)

from pathlib import Path

import numpy as np
from phicore_jax.backend import JaxBackend

from phicore.backend import BackendOptions
from phicore.engine import Engine, Request
from phicore.network.sampling import Sampling
from phicore.testing.conformance.models import DRAWN, PROMPT, engine_of

LONG = PROMPT * 12  # the cache must grow after it


def engine(devices: int) -> Engine:
    options = BackendOptions(device="cpu", cache_type=args.cache_type, devices=devices)
    return engine_of(JaxBackend(options, steps=args.steps), Path(args.model))


def text(engine: Engine, sampling: Sampling, prompt: list[int], limit: int) -> list[int]:
    return list(engine.generate(Request(prompt, sampling, max_tokens=limit, seed=1)))


one, many = engine(1), engine(args.devices)
logits = [e.logits(PROMPT) for e in (one, many)]
weights = jax.tree.leaves(many.runner.params["layers"][0])
print(
    json.dumps(
        {
            "devices": jax.device_count(),
            "error": float(np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])),
            "texts": [text(e, DRAWN, PROMPT, 20) for e in (one, many)],
            "long_texts": [text(e, Sampling(temperature=0), LONG, 40) for e in (one, many)],
            "bytes": sum(w.nbytes for w in weights),
            "bytes_here": sum(w.addressable_shards[0].data.nbytes for w in weights),
        }
    )
)
