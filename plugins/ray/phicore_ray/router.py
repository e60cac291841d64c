"""Sends the requests of a conversation to the replica that has read its beginning."""

from __future__ import annotations

import random
from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

from phicore_ray.replica import SLOTS


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
        for id in self._lookup_ranked_replicas(pending_request.metadata.session_id):
            replica = self._replicas.get(id)
            if replica is not None and await self._is_free(replica):
                return [[replica], any_two, candidate_replicas]
        return [any_two, candidate_replicas]

    async def _is_free(self, replica: RunningReplica) -> bool:
        """Return whether a replica has a free slot.

        The replica is asked, which takes about a millisecond. Ray's own count, which is kept here,
        is too small for a while after answers have ended while others began, and a request that
        waits behind a whole answer loses seconds.
        """
        known = self.replica_queue_len_cache.get(replica.replica_id)
        ((_, count),) = await self._probe_queue_lens([replica], 0)
        slots = replica.replica_metadata.get(SLOTS, 1)
        return count is not None and max(count, known or 0) < slots
