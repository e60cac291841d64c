"""Tests of plugins' architectures: files of a new architecture are read, inspected and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from api.tiny_models import with_number, write_tiny
from unit.throwaway import Install, install

import phicore
from phicore.errors import GGUFError
from phicore.lab.inspection import inspect_model
from phicore.plugins import Plugins

__all__ = ["install"]

TOKENS = [1, 40, 41, 42, 43]
EXAONE = """
    from phicore import hookimpl
    from phicore.network.architectures import Architecture

    class Exaone(Architecture):
        name = {name!r}
        {more}

    @hookimpl
    def phicore_register_architectures(register):
        register({what})
"""


def exaone(name: str = "exaone", more: str = "", what: str = "Exaone()") -> str:
    return EXAONE.format(name=name, more=more, what=what)


def test_architecture_of_a_plugin_is_loaded(install: Install, tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf", arch="exaone")
    with pytest.raises(GGUFError, match=r"'exaone' is not supported \(supported: phi3, .*qwen2\)"):
        phicore.load(path, "numpy")
    install("phicore-exaone", "exaone", exaone())
    same = write_tiny(tmp_path / "phi3.gguf")  # equal weights, with fused matrices
    with phicore.load(path, "numpy") as model, phicore.load(same, "numpy") as phi3:
        assert model.config.architecture == "exaone"
        assert np.allclose(model.logits(TOKENS), phi3.logits(TOKENS), rtol=0, atol=1e-5)
    assert inspect_model(str(path))["hyperparameters"]["architecture"] == "exaone"
    assert [i.provides for i in Plugins().installed() if i.name == "exaone"] == [
        ("architecture exaone",)
    ]


def test_architecture_of_a_plugin_refuses_unknown_keys_but_its_own(
    install: Install, tmp_path: Path
):
    path = write_tiny(tmp_path / "m.gguf", with_number("exaone.scale", 2), arch="exaone")
    install("phicore-exaone", "exaone", exaone())
    with pytest.raises(GGUFError, match=r"m\.gguf: exaone\.scale: this hyperparameter is not"):
        phicore.load(path, "numpy")


def test_architecture_of_a_plugin_knows_keys_that_change_nothing(install: Install, tmp_path: Path):
    path = write_tiny(tmp_path / "m.gguf", with_number("exaone.scale", 2), arch="exaone")
    install("phicore-exaone", "exaone", exaone(more='neutral = {"scale": (1, 2)}'))
    with phicore.load(path, "numpy") as model:
        assert model.metadata["exaone.scale"] == 2
        assert np.isfinite(model.logits(TOKENS)).all()


def test_architecture_that_exists_already_is_told(install: Install, tmp_path: Path):
    install("phicore-exaone", "exaone", exaone(name="phi3", more="layer = None"))
    plugins = Plugins()
    assert plugins.architectures()["phi3"].layer is not None
    assert [b.reason for b in plugins.broken] == ["the architecture 'phi3' exists already"]
    phicore.load(write_tiny(tmp_path / "m.gguf"), "numpy").close()


def test_architecture_that_is_none_is_told(install: Install, tmp_path: Path):
    install("phicore-exaone", "exaone", exaone(what="Exaone"))
    plugins = Plugins()
    assert set(plugins.architectures()) == {"phi3", "phimoe", "llama", "qwen2"}
    assert plugins.broken[0].reason.startswith("TypeError: expected an Architecture, got <class")


def test_architecture_whose_parameters_the_graph_does_not_read_is_refused(
    install: Install, tmp_path: Path
):
    more = """
        def layer(self, config, tensors, blk):
            return {**super().layer(config, tensors, blk), "q_norm": 1, "router_bias": 2}
    """
    install("phicore-exaone", "exaone", exaone(more=more.strip()))
    path = write_tiny(tmp_path / "m.gguf", arch="exaone")
    message = "architecture exaone: the graph has no q_norm, router_bias"
    with pytest.raises(GGUFError, match=message):
        phicore.load(path, "numpy")
