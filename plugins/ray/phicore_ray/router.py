"""Sends the requests of a conversation to the replica that has read its beginning."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from typing import Any

from ray.serve._private.common import ReplicaID
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from phicore_ray.replica import SLOTS

LOST_S = 30.0
"""A request that was sent so long ago and did not arrive was given up."""
TRIES = 3
"""How often a replica is asked whether it is free, while other requests come and go."""


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
        # When requests were sent that have not arrived, by their identifiers, for each replica.
        self._sent: defaultdict[ReplicaID, dict[str, float]] = defaultdict(dict)

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
        self._forget(pending_request)  # it may have been sent before, in vain
        for id in self._lookup_ranked_replicas(pending_request.metadata.session_id):
            replica = self._replicas.get(id)
            if replica is not None and await self._is_free(replica):
                self._sent[id][pending_request.metadata.internal_request_id] = time.monotonic()
                return [[replica], any_two, candidate_replicas]
        return [any_two, candidate_replicas]

    async def _is_free(self, replica: RunningReplica) -> bool:
        """Return whether a replica has a free slot.

        The replica is asked, which takes about a millisecond. Ray's own count, which is kept here,
        is wrong for a while when answers end while others begin, and a request that waits behind
        a whole answer loses seconds. What was sent and has not arrived is added. If a request is
        sent or arrives meanwhile, the replica may have counted it or not, so it is asked again, and
        is taken to be full rather than free after some times.
        """
        sent, now_s = self._sent[replica.replica_id], time.monotonic()
        for id in [id for id, sent_s in sent.items() if now_s - sent_s > LOST_S]:
            del sent[id]
        slots = replica.replica_metadata.get(SLOTS, 1)
        for _ in range(TRIES):
            before = set(sent)
            ((_, count),) = await self._probe_queue_lens([replica], 0)
            if count is None or before == sent.keys():
                break
        return count is not None and count + len(before | sent.keys()) < slots

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """Take note that a request has arrived, wherever that is."""
        self._forget(pending_request)

    def _forget(self, request: PendingRequest) -> None:
        for sent in self._sent.values():
            sent.pop(request.metadata.internal_request_id, None)
