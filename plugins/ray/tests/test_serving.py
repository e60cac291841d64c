"""Replicas on a real cluster: texts, streams, clients that leave, deaths, scaling, routing."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import phicore_ray
import pytest
from phicore_ray.running import reason_of
from ray import serve
from ray_clusters import ENDLESS, HI, Cluster, wait_until

import phicore

SHORT = {"max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}


class Reader:
    """Reads a stream in a thread.

    Attributes:
        replica: The name of the replica that answers.
        count: The number of pieces so far.
        error: The error with which it ended; None as long as it goes on.
    """

    def __init__(self, cluster: Cluster, session: str | None = None) -> None:
        self._stream, self.replica = cluster.ask(session, stream=True, **ENDLESS)
        self.count = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for _ in self._stream:
                self.count += 1
        except Exception as error:  # noqa: BLE001 - it is looked at
            self.error = error

    def close(self) -> None:
        """Leave, as a client that closes the connection."""
        self._stream.response.close()

    def goes_on(self) -> bool:
        """Return whether more pieces come."""
        before = self.count
        wait_until(lambda: self.count > before + 3 or self.error, "more of the answer")
        return self.error is None


@contextmanager
def reading(cluster: Cluster, count: int, session: str | None = None) -> Iterator[list[Reader]]:
    """Begin to read some streams, and leave them at the end."""
    readers: list[Reader] = []
    try:
        for _ in range(count):
            readers.append(Reader(cluster, session))
        yield readers
    finally:
        for reader in readers:
            reader.close()


REQUESTS = [
    {
        "messages": [{"role": "user", "content": f"Tell me {i}"}],
        "seed": 7 * i,
        "max_tokens": 16,
        "temperature": 0.9,
    }
    for i in range(32)
]


def texts(cluster: Cluster) -> tuple[list[str], set[str]]:
    """Return the answers to the requests, half of them streamed, and who answered."""
    by: set[str] = set()

    def ask(i: int) -> str:
        found, replica = cluster.ask(
            f"session {i}", model="tiny", stream=bool(i % 2), **REQUESTS[i]
        )
        by.add(replica)
        if not i % 2:
            return found.choices[0].message.content
        return "".join(each.choices[0].delta.content or "" for each in found if each.choices)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, range(32))), by


@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.complete)])
def test_seeded_requests_give_the_texts_of_one_process_from_one_replica_and_from_two(
    cluster: Cluster, tiny_path: Path, name: str
):
    reference = tiny_path if name == "tiny" else name
    with phicore.load(reference, "jax") as model:
        requests = [
            model.request(each["messages"], **{k: v for k, v in each.items() if k != "messages"})
            for each in REQUESTS
        ]
        expected = {answer.index: answer.text for answer in model.generate_many(requests)}
    options: dict[str, Any] = {"names": ["tiny"], "backend": "jax", "num_cpus": 0.75}
    cluster.deploy(phicore_ray.app(reference, replicas=1, **options))
    one, by = texts(cluster)
    assert one == [expected[i] for i in range(32)]
    assert len(by) == 1
    cluster.deploy(phicore_ray.app(reference, replicas=2, **options))
    two, by = texts(cluster)
    assert two == one
    assert len(by) == 2


@pytest.fixture(scope="module")
def both(cluster: Cluster, endless_path: Path) -> Cluster:
    """Serve an endless model from two replicas that compute two answers at a time."""
    cluster.deploy(
        phicore_ray.app(endless_path, replicas=2, num_cpus=0.75, backend="numpy", max_sequences=2)
    )
    wait_until(lambda: len(cluster.replicas) == 2, "two replicas")
    return cluster


@pytest.fixture
def two(both: Cluster) -> Cluster:
    """Wait until both replicas have nothing to do, after the tests before."""
    wait_until(lambda: both.is_idle, "the end of the streams")
    return both


def test_session_stays_and_goes_elsewhere_when_its_replica_is_full(two: Cluster):
    names = {two.ask("a session", **SHORT)[1] for _ in range(6)}
    assert len(names) == 1
    wait_until(lambda: two.is_idle, "the end of the answer")  # the client had it before
    with reading(two, 4, "a session") as readers:
        assert [reader.replica in names for reader in readers] == [True, True, False, False]


def test_requests_that_come_at_once_take_no_more_than_the_slots(two: Cluster):
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool, ExitStack() as stack:
            opened = pool.map(lambda _: stack.enter_context(reading(two, 1, "a crowd")), range(4))
            counts = Counter(reader.replica for (reader,) in opened)
            assert sorted(counts.values()) == [2, 2]
        wait_until(lambda: two.is_idle, "the end of the streams")


def test_requests_that_come_at_once_stay_together_where_slots_are_free(two: Cluster):
    for i in range(12):
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(two.ask, f"pair {i}", **SHORT) for _ in range(2)]
            assert len({each.result()[1] for each in asked}) == 1
        wait_until(lambda: two.is_idle, "the end of the answers")


def test_turns_of_a_conversation_without_a_session_stay(two: Cluster):
    for first in ("Hi", "Who are you?", "What is it?", "Why?"):
        turns = [{"role": "user", "content": first}]
        by = set()
        for _ in range(3):
            answer, replica = two.ask(messages=turns, **SHORT)
            by.add(replica)
            turns += [
                {"role": "assistant", "content": answer.choices[0].message.content or "?"},
                {"role": "user", "content": "Go on"},
            ]
        assert len(by) == 1
        assert answer.usage.prompt_tokens_details.cached_tokens > 0


def test_client_that_leaves_frees_its_slot(two: Cluster):
    for _ in range(3):  # all slots, three times over
        with reading(two, 4) as readers:
            assert all(reader.goes_on() for reader in readers)
        wait_until(lambda: two.is_idle, "the end of the streams")
    answer, _ = two.ask(**SHORT)
    assert answer.usage.completion_tokens == 12


def test_replica_that_is_killed_ends_its_answers_with_an_error_and_comes_back(two: Cluster):
    before = two.replicas
    texts = {
        two.ask(f"session {i}", seed=5, temperature=0.9, max_tokens=20)[1]: two.ask(
            f"session {i}", seed=5, temperature=0.9, max_tokens=20
        )[0]
        .choices[0]
        .message.content
        for i in range(12)
    }
    assert len(texts) == 2
    assert len(set(texts.values())) == 1
    with reading(two, 4) as readers:
        assert all(reader.goes_on() for reader in readers)
        killed = readers[0].replica
        os.kill(before[killed], signal.SIGKILL)
        for reader in readers:
            if reader.replica == killed:
                wait_until(lambda reader=reader: reader.error, "the error")
                assert isinstance(reader.error, openai.APIError)
                assert "the replica that computed the answer is gone" in str(reader.error)
            else:
                assert reader.goes_on()
        assert {reader.replica for reader in readers} == set(before)
    wait_until(lambda: len(two.replicas) == 2 and killed not in two.replicas, "a new replica")
    again = {}
    for i in range(24):
        answer, replica = two.ask(f"session {i}", seed=5, temperature=0.9, max_tokens=20)
        again[replica] = answer.choices[0].message.content
    assert set(again) == set(two.replicas)
    assert set(again.values()) == set(texts.values())


def test_killed_replica_is_an_error_for_whole_answers(two: Cluster):
    results: list[Any] = []

    def ask() -> None:
        try:
            results.append(two.ask("whole", **ENDLESS))
        except openai.APIError as error:
            results.append(error)

    _, replica = two.ask("whole", **SHORT)
    wait_until(lambda: two.is_idle, "the end of the answer")  # the client had it before
    thread = threading.Thread(target=ask)
    thread.start()
    with reading(two, 1, "whole") as (reader,):  # computed beside it
        assert reader.replica == replica
        assert reader.goes_on()
        os.kill(two.replicas[replica], signal.SIGKILL)
        thread.join()
    assert isinstance(results[0], openai.InternalServerError)
    assert results[0].status_code == 503
    assert results[0].code == "replica_gone"
    wait_until(lambda: len(two.replicas) == 2 and replica not in two.replicas, "a new replica")


def test_answer_has_the_id_of_its_request_once(two: Cluster):
    client = two.client()
    body: dict[str, Any] = {"model": "endless", "messages": HI, **SHORT}
    found = client.chat.completions.create(**body, extra_headers={"X-Request-Id": "an-id"})
    assert found._request_id == "an-id"
    assert client.chat.completions.create(**body)._request_id.count("-") == 4  # a UUID


def test_errors_of_requests_are_those_of_phicore_serve(two: Cluster):
    with pytest.raises(openai.NotFoundError, match="this server has endless"):
        two.ask(model="absent")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        two.ask(temperature=-1)


def test_model_that_cannot_be_loaded_is_told_in_a_line(cluster: Cluster, tmp_path: Path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF but not really")
    application = phicore_ray.app(path, num_cpus=0.1)
    serve.run_many(
        [serve.RunTarget(application, name="broken", route_prefix="/broken")],
        wait_for_applications_running=False,
    )

    def failed() -> Any:
        found = serve.status().applications["broken"]
        return found if found.status == "DEPLOY_FAILED" else None

    reason = reason_of(wait_until(failed, "the failure"))
    assert reason is not None
    assert reason.startswith("broken.gguf: ")
    serve.delete("broken")


def test_replicas_follow_the_answers_under_way(cluster: Cluster, endless_path: Path):
    cluster.deploy(
        phicore_ray.app(
            *(endless_path,),
            replicas="1..2",
            num_cpus=0.75,
            target=1,
            up_after=1,
            down_after=2,
            backend="numpy",
            max_sequences=2,
        )
    )
    wait_until(lambda: len(cluster.replicas) == 1, "one replica")
    with reading(cluster, 2):  # all slots of one replica
        wait_until(lambda: len(cluster.replicas) == 2, "two replicas")
        by = {cluster.ask(f"session {i}", **SHORT)[1] for i in range(6)}
        assert by & set(cluster.replicas)
    wait_until(lambda: len(cluster.replicas) == 1, "one replica again")
    answer, _ = cluster.ask(messages=HI, **SHORT)
    assert answer.usage.completion_tokens == 12
