"""Reads the hyperparameters of a GGUF file, and loads its tensors as parameters of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from phicore.backend import Backend, Params
from phicore.errors import GGUFError
from phicore.gguf.reader import GGUFFile
from phicore.network import graph
from phicore.network.architectures import Architecture
from phicore.network.config import Phi3Config
from phicore.network.tensors import Tensors
from phicore.progress import Progress


def read_config(file: GGUFFile, architecture: Architecture) -> Phi3Config:
    """Read a file's hyperparameters; the vocabulary size comes from the embedding's shape.

    Raises:
        GGUFError: If the hyperparameters are not supported, or there is no embedding.
    """
    try:
        config = architecture.config(file.metadata)
    except GGUFError as error:
        raise GGUFError(f"{file.path.name}: {error}") from None
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(f"{file.path.name}: tensor 'token_embd.weight' is missing")
    return replace(config, vocab_size=embedding.shape[0])


def load_params(
    ops: Backend, architecture: Architecture, config: Phi3Config, file: GGUFFile, progress: Progress
) -> Params:
    """Load every tensor of the file; `Architecture.params` describes the result.

    Raises:
        GGUFError: If a tensor is missing, unknown or misshapen, or has a type that cannot be read.
    """
    tensors = Tensors(ops, file, progress, used=architecture.rope_tensors)
    with ops.loading(file):
        params = architecture.params(config, tensors)
        tensors.check_all_read()
    _check_names(architecture.name, params, graph.NAMES)
    for layer in params["layers"]:
        _check_names(architecture.name, layer, graph.LAYER_NAMES)
    return params


def _check_names(name: str, params: Params, known: Sequence[str]) -> None:
    """Check that the graph knows all of an architecture's parameters.

    Raises:
        GGUFError: If a parameter is unknown, since the graph would ignore it.
    """
    biases = {f"{known_name}_bias" for known_name in known if known_name not in graph.WITHOUT_BIAS}
    if unknown := sorted(params.keys() - {*known, *biases}):
        raise GGUFError(f"architecture {name}: the graph has no {', '.join(unknown)}")
