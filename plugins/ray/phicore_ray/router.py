"""Sends the requests of a conversation to the replica that has read its beginning."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from phicore_ray.replica import SLOTS

LOST_S = 30.0
"""A request that was sent so long ago and did not arrive was given up."""
PATIENCE_S = 0.5
"""How long it may take to learn whether a replica is free, while other requests are on their way or
it does not answer. Then it is taken to be full."""
PAUSE_S = 0.005
"""The time between two questions to a replica."""


@dataclass
class _Sent:
    """A request that was sent to a replica."""

    at_s: float
    arrived_s: float = math.inf


class StickyRouter(ConsistentHashRouter):
    """Chooses a replica by the session of a request, as long as it has a free slot.

    The session is the header x-session-id, which `phicore_ray.front` adds to requests without it.
    Ray's consistent hashing ranks the replicas for a session, in the same order in every process.
    The first of them with a free slot computes the request. If none has one, or there is no
    session, the request goes where the fewest are under way, of two replicas chosen at random.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the settings, which are those of `ConsistentHashRouter`.

        Ray calls this once: what a later deployment changes, it tells with the replicas.
        """
        super().initialize_state(**{"num_fallback_replicas": 100, **kwargs})
        # What was sent to each replica lately, by the identifiers of the requests.
        self._sent: defaultdict[ReplicaID, dict[str, _Sent]] = defaultdict(dict)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return groups of replicas, the best group first. Ray takes the freest of a group."""
        if not candidate_replicas:
            return []
        any_two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [any_two]
        pending_request.routing_context.should_backoff = True
        if not pending_request.metadata.session_id:
            return [any_two, candidate_replicas]
        request_id = pending_request.metadata.internal_request_id
        self._forget(request_id)  # it may have been sent before, in vain
        for id in self._lookup_ranked_replicas(pending_request.metadata.session_id):
            replica = self._replicas.get(id)
            if replica is not None and await self._is_free(replica):
                self._sent[id][request_id] = _Sent(time.monotonic())
                return [[replica], any_two, candidate_replicas]
        return [any_two, candidate_replicas]

    async def _is_free(self, replica: RunningReplica) -> bool:
        """Return whether a replica has a free slot.

        The replica is asked, which takes about a millisecond. Ray's own count, which is kept here,
        is wrong for a while when answers end while others begin, and a request that waits behind
        a whole answer loses seconds. The replica may or may not have counted what was on its way
        when it was asked, and since. If that decides, or no answer comes, it is asked again.
        """
        sent = self._sent[replica.replica_id]
        slots = replica.replica_metadata.get(SLOTS, 1)
        end_s = time.monotonic() + PATIENCE_S
        while True:
            asked_s = time.monotonic()
            ((_, count),) = await self._probe_queue_lens([replica], 0)
            for id in [id for id, each in sent.items() if asked_s - each.at_s > LOST_S]:
                del sent[id]
            unsure = sum(each.arrived_s >= asked_s for each in sent.values())
            if count is not None and count + unsure < slots:
                return True
            is_full = count is not None and count >= slots
            if is_full or replica.replica_id not in self._replicas or asked_s > end_s:
                return False
            await asyncio.sleep(PAUSE_S)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """Take note that a request has arrived."""
        sent = self._sent[replica_id].get(pending_request.metadata.internal_request_id)
        if sent is not None:
            sent.arrived_s = time.monotonic()
        else:  # Ray chose another replica
            self._forget(pending_request.metadata.internal_request_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Take note that a request has ended, or that it was not taken."""
        super().on_request_completed(replica_id, internal_request_id)
        self._forget(internal_request_id)

    def _forget(self, request_id: str) -> None:
        for sent in self._sent.values():
            sent.pop(request_id, None)
