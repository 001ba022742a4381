"""What the service counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class ServiceMetrics:
    """The counters of one server, kept over reloads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("deepfm_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram(
            "deepfm_request_seconds", "From headers to answer.", ["path"], buckets=_SECONDS, registry=self.registry
        )
        self.batch_rows = Histogram(
            "deepfm_batch_rows",
            "Rows scored together.",
            buckets=[2**power for power in range(14)],
            registry=self.registry,
        )
        self.waiting = Gauge("deepfm_waiting_rows", "Rows that wait for the model.", registry=self.registry)
        self.reloads = Counter("deepfm_reloads", "SIGHUPs by outcome.", ["result"], registry=self.registry)
        self.model = Gauge("deepfm_model_info", "1 for the model that answers.", ["sha256"], registry=self.registry)
