"""Sources of models: files, the Hugging Face Hub and packages, and the references to them."""

from phicore.sources.references import (
    ALIASES,
    SCHEMES,
    KnownModel,
    ModelFiles,
    default_reference,
    known_models,
    resolve,
)

__all__ = [
    "ALIASES",
    "SCHEMES",
    "KnownModel",
    "ModelFiles",
    "default_reference",
    "known_models",
    "resolve",
]
