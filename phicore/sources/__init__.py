"""Where models come from: references, the Hugging Face Hub, and packages."""

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
