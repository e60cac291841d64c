"""GGUF files on the Hugging Face Hub: references to them, the choice among them, the cache.

`huggingface_hub` does the work, so its settings hold: `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE` and the rest. It is imported inside the functions, because that takes half a second
which a local file should not cost.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from phicore.errors import SourceError

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRevisionInfo

TOKENIZER = "tokenizer.json"

# Which quantization a repository's name alone stands for: llama.cpp's default first, then by size.
PREFERENCE = (
    *("Q4_K_M", "Q4", "Q4_K_S", "Q4_K", "Q5_K_M", "Q5_K_S", "Q5_K", "Q6_K", "Q8_0", "Q4_1", "Q4_0"),
    *("F16", "FP16", "BF16", "F32", "FP32"),
)

_REFERENCE = re.compile(
    r"hf:(?://)?(?P<repo>[^/:@]+/[^/:@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/:@]+|[^/:@]+))?"
    r"(?:/(?P<file>[^:]+\.gguf)|:(?P<tag>[^/:@]+))?",
    re.IGNORECASE,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_NOT_A_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # image projectors, statistics
_CACHED_TIMEOUT_S = 3.0  # what a Hub that does not answer may cost where the cache can
_SIGN_IN = "set HF_TOKEN or run `hf auth login`"


def split_parts(name: str) -> list[str]:
    """All parts of the model that a file name belongs to, in order; the name itself if not split.

    `m-00002-of-00003.gguf` gives `m-00001-of-00003.gguf` and its two successors (the naming of
    llama.cpp's gguf-split).
    """
    split = _SPLIT.search(name)
    if split is None or int(split[1]) == 0:
        return [name]
    stem, count = name[: split.start()], split[1]
    return [f"{stem}-{part:05d}-of-{count}.gguf" for part in range(1, int(count) + 1)]


def model_names(names: Iterable[str]) -> list[str]:
    """The GGUF models among file names, sorted; a split one is represented by its first part."""
    models = (n for n in names if n.lower().endswith(".gguf") and not _NOT_A_MODEL.search(n))
    return sorted(n for n in models if split_parts(n)[0] == n)


def choose(models: Sequence[str], tag: str | None) -> list[str]:
    """The models with a quantization tag; without a tag, those with the most preferred one.

    A tag is compared as a whole word, whatever its case: `q4_k` is not in `model-Q4_K_M.gguf`.
    One result means that the choice is clear.
    """
    if tag is None and len(models) == 1:
        return list(models)
    for wanted in PREFERENCE if tag is None else (tag,):
        word = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", re.IGNORECASE)
        if found := [name for name in models if word.search(name)]:
            return found
    return [] if tag else list(models)


def listed(names: Sequence[str], limit: int = 12) -> str:
    """File names for an error message: some of them, and how many more there are."""
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@dataclass(frozen=True)
class HubReference:
    """`hf:owner/repo`, then `@revision`, then `/file.gguf` or `:TAG`; the last two are optional."""

    text: str
    repo: str
    revision: str | None = None
    file: str | None = None
    tag: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Read a reference.

        Raises:
            SourceError: If it does not have the form above.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise SourceError(
                f"{text}: not a Hub reference; expected hf:owner/repo, hf:owner/repo/file.gguf or "
                "hf:owner/repo:Q4_K_M, with an optional @revision after the repository"
            )
        return cls(text, **match.groupdict())

    def matches(self, files: Iterable[str]) -> list[str]:
        """The models among a repository's files that this reference can mean, by first part."""
        if self.file is None:
            return choose(model_names(files), self.tag)
        first = split_parts(self.file)[0]
        return [first] if first in files else []


@dataclass(frozen=True)
class _Snapshot:
    """The files of one revision of a repository, as the Hub lists them or as the cache has them."""

    reference: HubReference
    files: Mapping[str, Path | None]  # name: where it is in the cache, None if not looked up
    cache_only: str | None = None  # why the cache alone was asked

    def select(self) -> str:
        """The one model that the reference means, by first part; a SourceError if it is not one."""
        ref, found = self.reference, self.reference.matches(self.files)
        if len(found) == 1:
            return found[0]
        if found:
            raise SourceError(
                f"{ref.text}: several files match; name one as hf:{ref.repo}/FILE: {listed(found)}"
            )
        wanted = ref.file or (f"GGUF file tagged {ref.tag}" if ref.tag else "GGUF file")
        raise SourceError(f"{ref.text}: {self._missing(wanted)}")

    def download(self, name: str) -> Path:
        """The local path of a file, which is fetched unless the cache has it."""
        from huggingface_hub import hf_hub_download

        ref = self.reference
        if name not in self.files:
            raise SourceError(f"{ref.text}: {self._missing(name)}")
        return self.files[name] or Path(
            hf_hub_download(ref.repo, name, revision=ref.revision, library_name="phicore")
        )

    def _missing(self, wanted: str) -> str:
        if self.cache_only is not None:
            return f"the cache has no {wanted}, and {self.cache_only}"
        models = listed(model_names(self.files))
        return f"the repository has no {wanted}; its GGUF files: {models}"


def fetch(reference: str) -> tuple[Path, Path | None]:
    """Download what a reference means, or find it in the cache.

    There is no request when offline, nor for a GGUF file of a commit hash that is in the cache (the
    tokenizer.json is then the cached one, if any). Otherwise the Hub is asked which files there are
    and whether the cached ones are current; when it cannot be reached, the cache answers.

    Returns:
        The GGUF file (of a split one all parts are fetched; the first is returned), and the
        repository's tokenizer.json if it has one.
    Raises:
        SourceError: If the reference is malformed, means no file or several, or cannot be fetched.
    """
    ref = HubReference.parse(reference)
    with _one_line_errors(ref):
        snapshot = _snapshot(ref)
        parts = [snapshot.download(name) for name in split_parts(snapshot.select())]
        tokenizer = snapshot.download(TOKENIZER) if TOKENIZER in snapshot.files else None
    if len({part.parent for part in parts}) > 1:
        raise SourceError(f"{reference}: the repository changed during the download; run it again")
    return parts[0], tokenizer


def fetch_tokenizer(repo: str) -> Path | None:
    """The tokenizer.json of a repository, or None when it has none or cannot be read.

    A cached one is taken without a question, so that a Hub that does not answer is waited for
    once, for the model, and not twice.
    """
    ref = HubReference(f"hf:{repo}", repo)
    try:
        with _one_line_errors(ref):
            if cached := _cached_files(ref).get(TOKENIZER):
                return cached
            snapshot = _snapshot(ref)
            return snapshot.download(TOKENIZER) if TOKENIZER in snapshot.files else None
    except SourceError:
        return None


def cached_models() -> list[tuple[str, Path, int]]:
    """Every complete GGUF model in the Hub cache: reference, path of its first part, total bytes.

    A file of the branch `main` is referred to without a revision, any other by its commit.
    """
    models = []
    for repo, revision in _cached_revisions():
        files = _by_name(revision)
        at = "" if "main" in revision.refs else f"@{revision.commit_hash}"
        for name in model_names(files):
            parts = split_parts(name)
            if files.keys() >= set(parts):
                size_bytes = sum(files[part].size_on_disk for part in parts)
                models.append((f"hf:{repo}{at}/{name}", files[name].file_path, size_bytes))
    return sorted(models)


def _snapshot(ref: HubReference) -> _Snapshot:
    """List the files of a revision: on the Hub if needed and possible, else in the cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    if constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set; unset it to download"
        return _Snapshot(ref, _cached_files(ref), reason)
    cached = _cached_files(ref)
    found = ref.matches(cached)
    is_complete = len(found) == 1 and cached.keys() >= set(split_parts(found[0]))
    if is_complete and _COMMIT.fullmatch(ref.revision or "") and (ref.file or ref.tag):
        # A commit never changes, so files that are in the cache need no question.
        return _Snapshot(ref, cached, "the commit is cached")
    timeout_s: float = constants.HF_HUB_ETAG_TIMEOUT
    try:
        # Unlike `resolve_revision` and `list_repo_files`, this call takes a timeout.
        info = HfApi(library_name="phicore").model_info(
            ref.repo,
            revision=ref.revision,
            timeout=min(timeout_s, _CACHED_TIMEOUT_S) if is_complete else timeout_s,
        )
    except HTTPError as error:
        if not cached:
            raise
        return _Snapshot(ref, cached, _explain(error, ref))
    return _Snapshot(ref, {file.rfilename: None for file in info.siblings or ()})


def _cached_files(ref: HubReference) -> dict[str, Path]:
    """The files in the cached snapshot of a reference's revision, by name."""
    wanted = ref.revision or "main"
    for repo, revision in _cached_revisions():
        if repo == ref.repo and (wanted == revision.commit_hash or wanted in revision.refs):
            return {name: file.file_path for name, file in _by_name(revision).items()}
    return {}


def _by_name(revision: CachedRevisionInfo) -> dict[str, CachedFileInfo]:
    root = revision.snapshot_path
    return {file.file_path.relative_to(root).as_posix(): file for file in revision.files}


def _cached_revisions() -> Iterator[tuple[str, CachedRevisionInfo]]:
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        cache = scan_cache_dir()
    except (CacheNotFound, OSError, ValueError):  # none yet, or a file in its place
        return
    for repo in cache.repos:
        if repo.repo_type == "model":
            yield from ((repo.repo_id, revision) for revision in repo.revisions)


@contextmanager
def _one_line_errors(ref: HubReference) -> Iterator[None]:
    """Turn whatever `huggingface_hub` raises into a SourceError of one line."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: from hf_xet
        raise SourceError(f"{ref.text}: {_explain(error, ref)}") from error


def _explain(error: BaseException, ref: HubReference) -> str:
    """What went wrong and what to do, in one line without the reference."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # "not in the cache": the cause is why it was not fetched
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{ref.repo}"
            return f"the repository is gated; accept its terms at {page}, then {_SIGN_IN}"
        case errors.RepositoryNotFoundError():
            return f"no such repository, or a private one; check the name, or {_SIGN_IN}"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision '{ref.revision}'; check it, or leave it out"
        case errors.HfHubHTTPError(response=response) if response.status_code in (401, 403):
            return f"the Hub refused access (HTTP {response.status_code}); {_SIGN_IN}"
        case errors.HfHubHTTPError(response=response):
            where = f"{constants.ENDPOINT} answered HTTP {response.status_code}"
            return f"{where}; try again later, or check HF_ENDPOINT"
        case errors.HTTPError():
            where = f"{constants.ENDPOINT} ({first_line})"
            return f"cannot reach {where}; check the network, the proxy and HF_ENDPOINT"
        case OSError(errno=errno.ENOSPC):
            return f"the disk of {constants.HF_HUB_CACHE} is full; make room there or set HF_HOME"
        case OSError(strerror=str(reason)):
            return f"cannot write to {error.filename or constants.HF_HUB_CACHE}: {reason}"
        case _:
            return first_line
