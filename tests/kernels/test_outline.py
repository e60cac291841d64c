"""Tests of outlines: the forms of weights are those of the arrays that are loaded later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from phicore_jax.backend import JaxBackend
from phicore_jax.kernels import find_kernels
from phicore_jax.outline import Outline
from phicore_jax.programs import KeptKernels

from phicore.backend import BackendOptions
from phicore.errors import GGUFError
from phicore.gguf.matrix import Matrix
from phicore.gguf.reader import GGUFTensor, open_gguf
from phicore.network.architectures import architecture_of
from phicore.network.weights import load_params, read_config
from phicore.progress import silent
from phicore.testing.tiny_models import Case, cases


@pytest.fixture
def outline() -> Outline:
    kernels, about = find_kernels()
    if not isinstance(kernels, KeptKernels):
        pytest.skip(f"the JAX backend has no kernels here: {about}")
    ops = JaxBackend(BackendOptions(device="cpu"))
    return Outline(kernels, ops.device, ops.options, ops.capabilities)


def forms_of(params: Any) -> Any:
    leaves, tree = jax.tree.flatten(params)
    return tree, [(x.shape, x.dtype, str(x.sharding), x.weak_type) for x in leaves]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_forms_are_those_of_the_arrays(outline: Outline, tmp_path: Path, case: Case):
    path = case.write(tmp_path / "m.gguf")
    with open_gguf(path) as file:
        architecture = architecture_of(file.metadata)
        config = read_config(file, architecture)
        forms = load_params(outline, architecture, config, file.outline(), silent)
        ops = JaxBackend(BackendOptions(device="cpu"))
        params = load_params(ops, architecture, config, file, silent)
    assert forms_of(forms) == forms_of(params)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(forms))


def test_type_without_values_is_refused_before_anything_is_packed(outline: Outline):
    tensor = GGUFTensor("x", Type.I8, (4, 32), np.zeros((4, 32), np.uint8))
    with pytest.raises(GGUFError, match="type I8 cannot be expanded"):
        outline.load_weight(Matrix("x", (tensor,)))
