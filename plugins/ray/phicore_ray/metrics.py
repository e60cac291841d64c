"""The metrics of a replica as metrics of Ray, which has those of all replicas in one place."""

from __future__ import annotations

from ray.util.metrics import Gauge

from phicore.server.service import Service


class Exporter:
    """Copies what a server counts to Ray.

    Each series keeps its name and labels, with "_" in place of ":", and gets the label `replica`.
    Ray puts "ray_" in front of the name. Counters and histograms are exported as their current
    values, to which `rate` and `histogram_quantile` of Prometheus apply as usual.
    """

    def __init__(self, service: Service, replica: str | None = None) -> None:
        """Prepare to export.

        Args:
            service: The server.
            replica: The name of the replica. None takes that of the actor that calls.
        """
        if replica is None:
            from ray import serve

            replica = serve.get_replica_context().replica_id.unique_id
        self._service = service
        self._replica = replica
        self._gauges: dict[str, Gauge] = {}

    def export(self) -> None:
        """Copy all values."""
        metrics = self._service.metrics
        metrics.text(self._service.worker_or_none)  # which looks at the worker
        for family in metrics.registry.collect():
            for sample in family.samples:
                name = sample.name.replace(":", "_")
                labels = {**sample.labels, "replica": self._replica}
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, family.documentation, tuple(labels))
                self._gauges[name].set(sample.value, labels)
