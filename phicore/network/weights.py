"""From a GGUF file's tensors to the parameters of the graph, on a backend."""

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
    """Read the hyperparameters of a file, and from its embedding the size of its vocabulary.

    Raises:
        GGUFError: If they are not understood, or there is no embedding.
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
    """Load every tensor of the file; see `Architecture.params`.

    Raises:
        GGUFError: For a missing, surplus or misshapen tensor, or a type that cannot be read.
    """
    tensors = Tensors(ops, file, progress, used=architecture.rope_tensors)
    params = architecture.params(config, tensors)
    tensors.check_all_read()
    _check_names(architecture.name, params, graph.NAMES)
    for layer in params["layers"]:
        _check_names(architecture.name, layer, graph.LAYER_NAMES)
    return params


def _check_names(name: str, params: Params, known: Sequence[str]) -> None:
    """Refuse parameters that the graph would not read: the network would be another."""
    biases = {f"{known_name}_bias" for known_name in known if known_name not in graph.WITHOUT_BIAS}
    if unknown := sorted(params.keys() - {*known, *biases}):
        raise GGUFError(f"architecture {name}: the graph has no {', '.join(unknown)}")
