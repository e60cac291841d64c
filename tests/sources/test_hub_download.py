"""Tests of `hf:` references with a Hub on loopback: downloads, the cache and failures."""

from __future__ import annotations

import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from sources.conftest import HANG_S, Client
from sources.hub_server import Hub, Repository, serve
from tokenizer.vocabularies import LLAMA_TOKENS, llama

from phicore.sources import ALIASES
from phicore.text.tokenizer import Tokenizer

COMMIT = "c0" * 20
TOKENIZER = b'{"version": "1.0"}'
PHI_3 = "microsoft/Phi-3-mini-4k-instruct"


def model(size_bytes: int = 100, seed: int = 0) -> bytes:
    return b"GGUF" + random.Random(seed).randbytes(size_bytes - 4)


def test_file_is_downloaded_with_the_tokenizer_of_its_repository(hub: Hub, client: Client) -> None:
    hub.repositories["o/r"] = Repository({"sub/m.gguf": model(), "tokenizer.json": TOKENIZER})
    path, tokenizer = client.files("hf:o/r/sub/m.gguf")
    assert path.read_bytes() == model()
    assert path.name == "m.gguf"
    assert tokenizer is not None
    assert tokenizer.read_bytes() == TOKENIZER


def test_second_run_gets_no_file_again(hub: Hub, client: Client) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": model(), "tokenizer.json": TOKENIZER})
    first = client.files("hf:o/r")
    hub.requests.clear()
    assert client.files("hf:o/r") == first
    assert hub.seen("HEAD", "/m.gguf")
    assert not hub.seen("GET", "/m.gguf")
    assert not hub.seen("GET", "/tokenizer.json")


def test_commit_in_the_cache_makes_no_request(hub: Hub, client: Client) -> None:
    hub.repositories["o/r"] = Repository({"m-Q4_K_M.gguf": model(), "tokenizer.json": TOKENIZER})
    first = client.files("hf:o/r")
    hub.requests.clear()
    by_file, by_tag = client.answers(f"hf:o/r@{COMMIT}/m-Q4_K_M.gguf", f"hf:o/r@{COMMIT}:q4_k_m")
    assert by_file == by_tag == [str(path) for path in first]
    assert not hub.requests


def test_interrupted_download_resumes_where_it_stopped(hub: Hub, client: Client) -> None:
    # huggingface_hub writes pieces of 10 MiB and resumes after the last complete piece.
    piece = 10 * 2**20
    content = model(piece + 2**20)
    hub.repositories["o/r"] = Repository({"m.gguf": content}, cut_after=piece + 2**19)
    path, _ = client.files("hf:o/r")
    assert path.read_bytes() == content
    ranges = [request.headers.get("range") for request in hub.seen("GET", "/m.gguf")]
    assert ranges == [None, f"bytes={piece}-"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_interrupt_key_stops_and_leaves_no_partial_file(hub: Hub, client: Client) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": model()}, stall=threading.Event())
    process = subprocess.Popen(
        [*client.command, "hf:o/r"],
        env=client.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + HANG_S
    while not hub.seen("GET", "/m.gguf") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=HANG_S)
    hub.repositories["o/r"].stall.set()  # type: ignore[union-attr]
    assert "KeyboardInterrupt" in stderr
    assert "SourceError" not in stderr
    assert not list(client.home.rglob("*.incomplete"))


def test_token_goes_to_the_hub_and_not_to_its_storage(hub: Hub, client: Client) -> None:
    hub.repositories["o/gated"] = Repository({"m.gguf": model()}, token="hf_secret")
    path, _ = client.files("hf:o/gated", HF_TOKEN="hf_secret")
    assert path.read_bytes() == model()
    (head,) = hub.seen("HEAD", "/m.gguf")
    (get,) = hub.seen("GET", "/m.gguf")
    assert head.headers["authorization"] == "Bearer hf_secret"
    assert "authorization" not in get.headers


FAILURES = {
    "hf:o/none": "no such repository, or a private one; check the name, or set HF_TOKEN or run",
    "hf:o/r@dev/m.gguf": "no revision 'dev'",
    "hf:o/r/x.gguf": "the repository has no x.gguf; its GGUF files: m.gguf",
    "hf:o/gated/m.gguf": "the repository is gated; accept its terms at http://127.0.0.1:",
    "hf:o/refused": "refused access (HTTP 403); set HF_TOKEN or run `hf auth login`",
    "hf:o/broken": "answered HTTP 500; try again later",
    "hf:o/bad--name": "Cannot have -- or .. in repo_id: 'o/bad--name'",
    "hf:o/two": "several files match; name one as hf:o/two/FILE: a.gguf, b.gguf",
    "hf:o/two:Q8_0": "has no GGUF file tagged Q8_0; its GGUF files: a.gguf, b.gguf",
    "hf:o/empty": "has no GGUF file; its GGUF files: none",
    "hf:o/part": "has no m-00002-of-00002.gguf",
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Resolve all references of FAILURES in one process and return the answers."""
    repositories = {
        "o/r": Repository({"m.gguf": model()}),
        "o/gated": Repository({"m.gguf": model()}, token="hf_secret"),
        "o/refused": Repository({"m.gguf": model()}, file_status=403),
        "o/broken": Repository({}, status=500),
        "o/two": Repository({"a.gguf": model(), "b.gguf": model()}),
        "o/empty": Repository({"mmproj-F16.gguf": model(), "README.md": b""}),
        "o/part": Repository({"m-00001-of-00002.gguf": model()}),
    }
    with serve(Hub(repositories)) as hub:
        client = Client(hub, tmp_path_factory.mktemp("failures"))
        yield dict(zip(FAILURES, client.answers(*FAILURES), strict=True))


@pytest.mark.parametrize("reference", FAILURES)
def test_failure_is_one_line_that_says_what_to_do(failures: dict[str, Any], reference: str) -> None:
    message = failures[reference]
    assert isinstance(message, str)
    assert message.startswith(f"{reference}: ")
    assert FAILURES[reference] in message
    assert "\n" not in message


def test_cache_that_cannot_be_written_is_named(hub: Hub, client: Client) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": model()})
    (client.home / "file").touch()
    message = client.error("hf:o/r", HF_HOME=str(client.home / "file"))
    assert "cannot write to" in message
    assert str(client.home / "file") in message


def test_offline_takes_the_cache_and_makes_no_request(hub: Hub, client: Client) -> None:
    hub.repositories["o/r"] = Repository({"m-Q4_0.gguf": model(), "tokenizer.json": TOKENIZER})
    first = client.files("hf:o/r")
    hub.requests.clear()
    whole, file, tag, absent, unknown = client.answers(
        *("hf:o/r", "hf:o/r/m-Q4_0.gguf", "hf:o/r:q4_0", "hf:o/r/x.gguf", "hf:o/none"),
        HF_HUB_OFFLINE="1",
    )
    assert whole == file == tag == [str(path) for path in first]
    advice = "HF_HUB_OFFLINE is set; unset it to download"
    assert absent == f"hf:o/r/x.gguf: the cache has no x.gguf, and {advice}"
    assert unknown == f"hf:o/none: the cache has no GGUF file, and {advice}"
    assert not hub.requests


def test_unreachable_hub_leaves_the_cache(tmp_path: Path) -> None:
    with serve(Hub({"o/r": Repository({"m.gguf": model(), "tokenizer.json": TOKENIZER})})) as hub:
        client = Client(hub, tmp_path)
        first = client.files("hf:o/r")
    cached, absent, unknown = client.answers("hf:o/r", "hf:o/r:Q8_0", "hf:o/none")
    assert cached == [str(path) for path in first]
    assert f"the cache has no GGUF file tagged Q8_0, and cannot reach {hub.url}" in absent
    assert f"hf:o/none: cannot reach {hub.url}" in unknown
    assert "check the network" in unknown


def test_hub_that_never_answers_is_waited_for_once(tmp_path: Path) -> None:
    gguf = Repository({"Phi-3-mini-4k-instruct-q4.gguf": model()})
    base = Repository({"tokenizer.json": TOKENIZER}, commit="d1" * 20)
    with serve(Hub({f"{PHI_3}-gguf": gguf, PHI_3: base})) as hub:
        first = Client(hub, tmp_path).files("phi-3-mini")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the system accepts, nobody answers
        client = Client(Hub(port=silent.getsockname()[1]), tmp_path)
        # Files in the cache are worth a wait of seconds alone: a wait as long as for a download
        # would outlast the client's. And telemetry would make one more request a day.
        options = {"HF_HUB_ETAG_TIMEOUT": str(10 * HANG_S), "HF_HUB_DISABLE_TELEMETRY": "1"}
        assert client.files("phi-3-mini", **options) == first
        silent.settimeout(0)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_failing_hub_leaves_the_cache(hub: Hub, client: Client) -> None:
    hub.repositories["o/r"] = Repository({"m.gguf": model()})
    first = client.files("hf:o/r")
    hub.repositories["o/r"].status = 503
    assert client.files("hf:o/r") == first


def test_quantization_tag_chooses_the_file(hub: Hub, client: Client) -> None:
    names = ("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-Q4_K_S.gguf")
    hub.repositories["o/r"] = Repository({name: model(seed=i) for i, name in enumerate(names)})
    answers = client.answers("hf:o/r", "hf:o/r:q4_k_s", f"hf:o/r@{COMMIT}:Q8_0")
    assert [Path(path).name for path, _ in answers] == [names[1], names[2], names[0]]


def test_all_parts_of_a_split_file_are_downloaded(hub: Hub, client: Client) -> None:
    parts = {f"Q6_K/m-0000{i}-of-00003.gguf": model(seed=i) for i in (1, 2, 3)}
    hub.repositories["o/r"] = Repository(parts)
    whole, second = client.answers("hf:o/r", "hf:o/r/Q6_K/m-00002-of-00003.gguf")
    assert whole == second
    first = Path(whole[0])
    assert first.name == "m-00001-of-00003.gguf"
    for name, content in parts.items():
        assert (first.parent / Path(name).name).read_bytes() == content


def test_repository_that_changes_between_parts_is_an_error(hub: Hub, client: Client) -> None:
    parts = {f"m-0000{i}-of-00002.gguf": model(seed=i) for i in (1, 2)}
    hub.repositories["o/r"] = Repository(parts, next_commit="d1" * 20)
    assert "changed during the download; run it again" in client.error("hf:o/r")
    first, _ = client.files("hf:o/r")
    assert sorted(path.name for path in first.parent.iterdir()) == sorted(parts)


def test_alias_takes_the_tokenizer_of_the_base_repository(hub: Hub, client: Client) -> None:
    hub.repositories[f"{PHI_3}-gguf"] = Repository({"Phi-3-mini-4k-instruct-q4.gguf": model()})
    hub.repositories[PHI_3] = Repository({"tokenizer.json": TOKENIZER}, commit="d1" * 20)
    path, tokenizer = client.files("phi-3-mini")
    assert path.read_bytes() == model()
    assert tokenizer is not None
    assert tokenizer.read_bytes() == TOKENIZER


@pytest.mark.parametrize(
    "base",
    [None, Repository({"tokenizer.json": TOKENIZER}, token="hf_secret"), Repository({})],
    ids=["missing", "gated", "without"],
)
def test_alias_without_the_base_tokenizer_does_without(
    hub: Hub, client: Client, base: Repository | None
) -> None:
    hub.repositories[f"{PHI_3}-gguf"] = Repository({"Phi-3-mini-4k-instruct-q4.gguf": model()})
    if base is not None:
        hub.repositories[PHI_3] = base
    assert client.files("phi-3-mini")[1] is None


def test_known_models_finds_what_the_cache_holds(hub: Hub, client: Client) -> None:
    gguf = f"{PHI_3}-gguf"
    hub.repositories[gguf] = Repository({"Phi-3-mini-4k-instruct-q4.gguf": model(123)})
    hub.repositories["o/split"] = Repository(
        {f"m-0000{i}-of-00002.gguf": model(50 * i, i) for i in (1, 2)}
    )
    hub.repositories["o/r"] = Repository({"m.gguf": model(), "tokenizer.json": TOKENIZER})
    before, alias, split, commit, after = client.answers(
        "known", "phi-3-mini", "hf:o/split", f"hf:o/r@{COMMIT}/m.gguf", "known"
    )
    phi = f"hf:{gguf}/Phi-3-mini-4k-instruct-q4.gguf"
    assert [phi, None, None] in before
    assert [phi, alias[0], 123] in after
    assert after[-2:] == [
        [f"hf:o/r@{COMMIT}/m.gguf", commit[0], 100],
        ["hf:o/split/m-00001-of-00002.gguf", split[0], 150],
    ]
    assert len(after) == len(before) + 2


def test_known_models_without_a_usable_cache_are_the_aliases(client: Client) -> None:
    (client.home / "file").touch()
    (known,) = client.answers("known", HF_HUB_CACHE=str(client.home / "file"))
    assert len(known) == len(ALIASES)


# ---- the tokenizer of the model that a file was made from --------------------------------------


def tokenized(client: Client, reference: str, **variables: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "phicore", "tokenize", "-m", reference, "--json", "ab"],
        env=client.environment(**variables),
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def placeholder(hub: Hub, tmp_path: Path) -> bytes:
    """Serve a model whose scores are placeholders, and the model that it was made from."""
    right = tmp_path / "right.json"
    Tokenizer.from_gguf(llama())._backend.save(str(right))
    scores = [-1000.0] * len(LLAMA_TOKENS)
    metadata = llama(scores=scores, bos_token_id=1, add_bos_token=True)
    metadata["general.base_model.0.repo_url"] = "https://huggingface.co/base/model"
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if isinstance(value, (str, bool, int)):
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        else:
            writer.add_array(key, np.asarray(value).tolist())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.repositories["o/r"] = Repository({"m.gguf": path.read_bytes()})
    hub.repositories["base/model"] = Repository(
        {"tokenizer.json": right.read_bytes()}, commit="e2" * 20
    )
    return path.read_bytes()


@pytest.mark.usefixtures("placeholder")
def test_unusable_vocabulary_is_replaced_by_the_one_of_the_base_model(
    hub: Hub, client: Client
) -> None:
    code, out, err = tokenized(client, "hf:o/r")
    assert (code, err) == (0, "")
    assert [token["piece"] for token in json.loads(out)] == ["<s>", "▁ab"]
    assert hub.seen("GET", "tokenizer.json")


def test_unusable_vocabulary_of_a_local_file_asks_for_a_tokenizer(
    hub: Hub, client: Client, placeholder: bytes, tmp_path: Path
) -> None:
    (tmp_path / "local.gguf").write_bytes(placeholder)
    code, _, err = tokenized(client, str(tmp_path / "local.gguf"))
    assert code == 1
    assert err.startswith("phicore: local.gguf: tokenizer.ggml.scores: ")
    assert "(the file names https://huggingface.co/base/model)" in err
    assert not hub.seen("GET", "tokenizer.json")


@pytest.mark.usefixtures("placeholder")
def test_unusable_vocabulary_where_the_base_model_has_no_tokenizer_is_an_error(
    hub: Hub, client: Client
) -> None:
    del hub.repositories["base/model"]
    code, _, err = tokenized(client, "hf:o/r")
    assert code == 1
    assert "a placeholder, so the file does not say how text is split" in err
