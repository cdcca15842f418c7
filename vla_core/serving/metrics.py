"""What a policy server tells Prometheus."""

from __future__ import annotations

LATENCIES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = own = CollectorRegistry()
        self.requests = Counter("vla_requests", "Observations that were answered with actions", registry=own)
        self.errors = Counter("vla_errors", "What was refused or failed, by reason", ["reason"], registry=own)
        self.clients = Gauge("vla_clients", "Open connections", registry=own)
        self.ready = Gauge("vla_ready", "1 once the policy is warmed up, until the server shuts down", registry=own)
        self.batch = Histogram("vla_batch_size", "Observations a model call", buckets=BATCHES, registry=own)
        self.queue = Histogram(
            "vla_queue_seconds", "From an observation's arrival to its model call", buckets=LATENCIES_S, registry=own
        )
        self.inference = Histogram("vla_inference_seconds", "A model call", buckets=LATENCIES_S, registry=own)

    def text(self) -> tuple[bytes, str]:
        """The page, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
