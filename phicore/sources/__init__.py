"""Sources of models: files, the Hugging Face Hub and packages, and the references to them."""

from phicore.sources.references import (
    ALIASES,
    DEMO,
    SCHEMES,
    KnownModel,
    ModelFiles,
    default_reference,
    known_models,
    resolve,
)

__all__ = [
    "ALIASES",
    "DEMO",
    "SCHEMES",
    "KnownModel",
    "ModelFiles",
    "default_reference",
    "known_models",
    "resolve",
]
