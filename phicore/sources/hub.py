"""Finds GGUF files on the Hugging Face Hub, downloads them, and lists those in its cache.

`huggingface_hub` does the work, so its settings apply: `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`,
`HF_HUB_OFFLINE` and the rest. It is imported inside the functions, because the import takes half a
second, and local files do not need it.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from phicore.errors import SourceError

TOKENIZER = "tokenizer.json"

# The order in which a quantization is chosen if a reference names only the repository: first
# llama.cpp's default, then by size.
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
_CACHED_TIMEOUT_S = 3.0  # how long to wait for the Hub if the cache has the files
_SIGN_IN = "set HF_TOKEN or run `hf auth login`"


def split_parts(name: str) -> list[str]:
    """Return the names of all parts of a split model, in order, or the name itself if not split.

    `m-00002-of-00003.gguf` gives `m-00001-of-00003.gguf` and its two successors. llama.cpp's
    gguf-split names parts in this way.
    """
    split = _SPLIT.search(name)
    if split is None or int(split[1]) == 0:
        return [name]
    stem, count = name[: split.start()], split[1]
    return [f"{stem}-{part:05d}-of-{count}.gguf" for part in range(1, int(count) + 1)]


def model_names(names: Iterable[str]) -> list[str]:
    """Return the GGUF models among file names, sorted, with a split model as its first part."""
    models = (n for n in names if n.lower().endswith(".gguf") and not _NOT_A_MODEL.search(n))
    return sorted(n for n in models if split_parts(n)[0] == n)


def choose(models: Sequence[str], tag: str | None) -> list[str]:
    """Return the models with a quantization tag; without a tag, those with the most preferred one.

    A tag must match a whole word, in any case: `q4_k` does not match `model-Q4_K_M.gguf`. The
    choice is unambiguous if there is one result.
    """
    if tag is None and len(models) == 1:
        return list(models)
    for wanted in PREFERENCE if tag is None else (tag,):
        word = re.compile(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9_])", re.IGNORECASE)
        if found := [name for name in models if word.search(name)]:
            return found
    return [] if tag else list(models)


def listed(names: Sequence[str], limit: int = 12) -> str:
    """List file names for an error message: up to `limit` of them, and the number of the rest."""
    shown = ", ".join(names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@dataclass(frozen=True)
class HubReference:
    """A reference `hf:owner/repo`, with an optional `@revision`, then `/file.gguf` or `:TAG`."""

    text: str
    repo: str
    revision: str | None = None
    file: str | None = None
    tag: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """Parse a reference.

        Raises:
            SourceError: If the reference does not have this form.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise SourceError(
                f"{text}: not a Hub reference; expected hf:owner/repo, hf:owner/repo/file.gguf or "
                "hf:owner/repo:Q4_K_M, with an optional @revision after the repository"
            )
        return cls(text, **match.groupdict())

    def matches(self, files: Iterable[str]) -> list[str]:
        """Return the models among a repository's files that match this reference, by first part."""
        if self.file is None:
            return choose(model_names(files), self.tag)
        first = split_parts(self.file)[0]
        return [first] if first in files else []


@dataclass(frozen=True)
class _Snapshot:
    """The files of one revision of a repository, listed by the Hub or found in the cache."""

    reference: HubReference
    files: Mapping[str, Path | None]  # the paths in the cache by name; None if listed by the Hub
    cache_only: str | None = None  # the reason if only the cache was searched

    def select(self) -> str:
        """Return the model that the reference means, by first part.

        Raises:
            SourceError: If the reference matches no model, or several.
        """
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
        """Return the local path of a file, and download it if the cache does not have it."""
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
    """Download the model of a reference, or find it in the cache.

    No request is made when offline, or if the reference names a commit hash and a file or a tag and
    the cache has the GGUF file; the tokenizer.json is then the cached one, if any. Otherwise the
    Hub is asked for the list of files and whether the cached files are current. If the Hub cannot
    be reached, the cached files are used.

    Returns:
        The path of the GGUF file, and the path of the repository's tokenizer.json or None. All
        parts of a split model are fetched, and the path of the first part is returned.
    Raises:
        SourceError: If the reference is malformed, matches no file or several, or cannot be
            fetched.
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
    """Return the tokenizer.json of a repository, or None if there is none or it cannot be fetched.

    A cached file is taken without a request. So if the Hub does not answer, the user waits once,
    for the model, and not a second time for the tokenizer.
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
    """List the complete GGUF models in the Hub cache.

    Returns:
        For each model its reference, the path of its first part, and its size in bytes. The
        reference has no revision if the file is of the branch `main`; otherwise it has the commit.
    """
    models = []
    for cached in _cached_revisions():
        at = "" if "main" in cached.refs else f"@{cached.commit}"
        for name in model_names(cached.files):
            parts = split_parts(name)
            if cached.files.keys() >= set(parts):
                size_bytes = sum(cached.files[part].stat().st_size for part in parts)
                models.append((f"hf:{cached.repo}{at}/{name}", cached.files[name], size_bytes))
    return sorted(models)


def _snapshot(ref: HubReference) -> _Snapshot:
    """List the files of a revision on the Hub, or in the cache if that is enough or all there is.

    `fetch` says when the Hub is asked.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    if constants.is_offline_mode():
        reason = "HF_HUB_OFFLINE is set; unset it to download"
        return _Snapshot(ref, _cached_files(ref), reason)
    cached = _cached_files(ref)
    found = ref.matches(cached)
    is_complete = len(found) == 1 and cached.keys() >= set(split_parts(found[0]))
    if is_complete and _COMMIT.fullmatch(ref.revision or "") and (ref.file or ref.tag):
        # A commit never changes, so cached files need no request.
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
    """Return the files in the cached snapshot of a reference's revision, by name."""
    wanted = ref.revision or "main"
    for cached in _cached_revisions():
        if cached.repo == ref.repo and (wanted == cached.commit or wanted in cached.refs):
            return dict(cached.files)
    return {}


@dataclass(frozen=True)
class _Cached:
    """A revision of a repository in the cache.

    Attributes:
        repo: The repository, owner/name.
        commit: The hash of the commit.
        refs: The branches and tags that point to it.
        files: The paths of the complete files, by name.
    """

    repo: str
    commit: str
    refs: frozenset[str]
    files: Mapping[str, Path]


def _cached_revisions() -> Iterator[_Cached]:
    """Yield the revisions in the cache.

    `huggingface_hub.scan_cache_dir` leaves out a repository in which a process that was killed has
    left the temporary file of a branch, so the folders are read here.
    """
    from huggingface_hub import constants

    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots")):
        repo = folder.parent.name.removeprefix("models--").replace("--", "/")
        refs: dict[str, set[str]] = {}
        for path in _files_below(folder.parent / "refs"):
            with suppress(OSError, ValueError):
                if path.suffix != ".tmp":
                    name = path.relative_to(folder.parent / "refs").as_posix()
                    refs.setdefault(path.read_text().strip(), set()).add(name)
        for snapshot in sorted(folder.iterdir()):
            files = {p.relative_to(snapshot).as_posix(): p for p in _files_below(snapshot)}
            names = frozenset(refs.get(snapshot.name, ()))
            yield _Cached(repo, snapshot.name, names, files)


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder. A link counts if there is a file at its end."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


@contextmanager
def _one_line_errors(ref: HubReference) -> Iterator[None]:
    """Turn every error of `huggingface_hub` into a SourceError of one line."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: from hf_xet
        raise SourceError(f"{ref.text}: {_explain(error, ref)}") from error


def _explain(error: BaseException, ref: HubReference) -> str:
    """Describe an error and what the user can do, in one line without the reference."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the error says "not in the cache"; its cause says why no download
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
