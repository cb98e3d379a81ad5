"""Requests of the HTTP API as Prometheus metrics, by route: never by account, token or address."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class ApiMetrics:
    """What is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["route", "method", "status"]
        self._requests = Counter("covey_api_requests", "Requests answered.", labels, registry=self.registry)
        self._seconds = Histogram(
            "covey_api_seconds", "Time to an answer.", ["route", "method"], buckets=_BUCKETS_S, registry=self.registry
        )

    def answered(self, *, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: its path as declared, with names of parameters in place of values.
            method: of HTTP.
            status: of the answer; 0 for none.
            seconds: that it took, at least 0.
        """
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)
