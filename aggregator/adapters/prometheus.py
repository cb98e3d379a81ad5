"""What the journal is told, as metrics that Prometheus can scrape from this machine; on prometheus-client.

Each process counts what it did itself since it started. Names of devices never become labels: there is no bound on how
many there are, and who takes part in a study is nobody's business who only watches a service. Labels are tasks, workers
and outcomes, which the operator named, and reasons of refusals, of which there are a fixed number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from aggregator.errors import AggregatorError
from fl_protocol.adapters.journal import Journal
from fl_protocol.errors import RefusalReason

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LOOPBACK = "127.0.0.1"
_OPEN_BUCKETS_S = (10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 86400.0, 3 * 86400.0, 7 * 86400.0)
_REASONS = frozenset(reason.value for reason in RefusalReason)
_OTHER = "other"


class CountingJournal:
    """A journal that counts what it hands on.

    Args:
        inner: the journal that is written to first.
        registry: where the metrics are kept; by default one of its own.
    """

    def __init__(self, inner: Journal, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._inner = inner
        self._is_connected = False
        self._opened_s: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._make_metrics()
        self._counted: dict[str, Callable[[float, dict[str, Any]], None]] = {
            "update_accepted": self._on_accepted,
            "update_refused": self._on_refused,
            "update_dropped": lambda _at_s, _fields: self._dropped.inc(),
            "device_throttled": lambda _at_s, _fields: self._throttled.inc(),
            "round_opened": self._on_opened,
            "round_committed": self._on_closed,
            "round_aborted": self._on_closed,
            "model_rolled_back": lambda _at_s, fields: self._set_version(fields),
            "task_paused": lambda _at_s, fields: self._set_running(fields, 0),
            "task_finished": self._on_finished,
            "task_aborted": lambda _at_s, fields: self._set_running(fields, 0),
            "degraded": lambda _at_s, fields: self._count_failures(fields, 1),
            "recovered": lambda _at_s, fields: self._count_failures(fields, -1),
            "shards_changed": lambda _at_s, fields: self._shards.labels(_worker(fields)).set(fields.get("shards", 0)),
            "connected": lambda _at_s, _fields: self._set_connected(1),
            "disconnected": lambda _at_s, _fields: self._set_connected(0),
        }

    def write(self, event: str, /, *, at_s: float, **fields: Any) -> None:
        """Hand an event on, then count it; events without a metric are only handed on."""
        self._inner.write(event, at_s=at_s, **fields)
        count = self._counted.get(event)
        if count is not None:
            count(at_s, fields)

    def why_not_ready(self) -> str:
        """Why the process cannot do its work now, in words; empty if it can."""
        if any(self._failures.values()):
            return "the database does not answer"
        return "" if self._is_connected else "not connected to the broker"

    def _make_metrics(self) -> None:
        """Register every metric, and every reason of a refusal at 0."""
        kept = self.registry
        self._accepted = Counter("covey_updates_accepted", "Updates committed and counted.", ["task"], registry=kept)
        self._bytes_up = Counter("covey_bytes_up", "Sealed bytes of updates accepted.", ["task"], registry=kept)
        self._refused = Counter("covey_updates_refused", "Updates not taken, by reason.", ["reason"], registry=kept)
        self._dropped = Counter(
            "covey_updates_dropped", "Updates left to be sent again, for want of room.", registry=kept
        )
        self._throttled = Counter(
            "covey_devices_throttled", "Times that a device was told to slow down.", registry=kept
        )
        self._rounds = Counter("covey_rounds", "Rounds closed, by outcome.", ["task", "outcome"], registry=kept)
        self._open_seconds = Histogram(
            "covey_round_open_seconds",
            "How long closed rounds were open.",
            ["task"],
            buckets=_OPEN_BUCKETS_S,
            registry=kept,
        )
        self._version = Gauge("covey_model_version", "Newest version of the model.", ["task"], registry=kept)
        self._running = Gauge(
            "covey_task_running", "1 while rounds are opened; 0: paused, finished, aborted.", ["task"], registry=kept
        )
        self._degraded = Gauge(
            "covey_degraded", "Parts of the process that cannot reach the database; 0: well.", ["worker"], registry=kept
        )
        self._shards = Gauge("covey_shards", "Shards that the worker serves, of 64.", ["worker"], registry=kept)
        self._connected = Gauge("covey_broker_connected", "1 while connected to the broker.", registry=kept)
        for reason in sorted(_REASONS):
            self._refused.labels(reason)  # so that the first refusal is a rise from 0, which alerts can see

    def _on_accepted(self, _at_s: float, fields: dict[str, Any]) -> None:
        self._accepted.labels(_task(fields)).inc()
        self._bytes_up.labels(_task(fields)).inc(fields.get("bytes", 0))

    def _on_refused(self, _at_s: float, fields: dict[str, Any]) -> None:
        reason = fields.get("reason")
        # Security: only reasons of our own become labels, never what a peer could choose.
        repeated = fields.get("repeated", 0)  # since the last line about the same
        self._refused.labels(reason if reason in _REASONS else _OTHER).inc(1 + int(repeated))

    def _on_opened(self, at_s: float, fields: dict[str, Any]) -> None:
        self._opened_s[_task(fields)] = at_s
        self._set_version(fields)
        self._set_running(fields, 1)

    def _on_closed(self, at_s: float, fields: dict[str, Any]) -> None:
        """A round was committed (``seconds`` says how long it was open) or given up."""
        task = _task(fields)
        self._rounds.labels(task, fields.get("outcome", "committed")).inc()
        opened_s = self._opened_s.pop(task, None)
        seconds = fields.get("seconds", None if opened_s is None else at_s - opened_s)
        if seconds is not None:
            self._open_seconds.labels(task).observe(max(0.0, seconds))  # a clock that was put back
        self._set_version(fields)

    def _on_finished(self, _at_s: float, fields: dict[str, Any]) -> None:
        self._set_version(fields)
        self._set_running(fields, 0)

    def _set_connected(self, connected: int) -> None:
        self._is_connected = bool(connected)
        self._connected.set(connected)

    def _set_version(self, fields: dict[str, Any]) -> None:
        """Evaluations and statistics have none."""
        if "version" in fields:
            self._version.labels(_task(fields)).set(fields["version"])

    def _set_running(self, fields: dict[str, Any], running: int) -> None:
        self._running.labels(_task(fields)).set(running)

    def _count_failures(self, fields: dict[str, Any], change: int) -> None:
        """A worker and the coordinator of one process have one name, and fail and recover each by itself."""
        worker = _worker(fields)
        self._failures[worker] = max(0, self._failures.get(worker, 0) + change)
        self._degraded.labels(worker).set(self._failures[worker])


class Probes(NamedTuple):
    """What tells whether a process is alive, and ready; each says why not, in words, and nothing if it is."""

    why_not_alive: Callable[[], str]
    why_not_ready: Callable[[], str]


class MetricsServer:
    """Answers scrapes and probes on loopback, from threads of its own, until closed.

    Args:
        server: that listens.
    """

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(registry: CollectorRegistry, port: int, *, probes: Probes | None = None) -> MetricsServer:
    """Let this machine's Prometheus scrape ``http://127.0.0.1:port/metrics``; nobody else can reach it.

    Args:
        registry: of a `CountingJournal`.
        port: TCP; 0 takes one that is free.
        probes: for ``/healthz`` and ``/readyz``; None where something else answers those.

    Raises:
        AggregatorError: the port is taken or may not be opened.
    """
    try:
        # Security: there is no access control, so it is never bound to anything but loopback.
        server = make_server(LOOPBACK, port, _app(registry, probes), _ThreadingServer, handler_class=_SilentHandler)
    except OSError as error:
        raise AggregatorError(
            f"metrics_port {port}: {LOOPBACK} cannot be listened on there ({error.strerror}); choose another port"
        ) from error
    return MetricsServer(server)


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """A scrape that takes its time keeps no probe waiting."""

    daemon_threads = True


class _SilentHandler(WSGIRequestHandler):
    """Writes no line for each request."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _app(registry: CollectorRegistry, probes: Probes | None) -> WSGIApplication:
    """Metrics and probes by path."""
    metrics = make_wsgi_app(registry)
    asked = {} if probes is None else {"/healthz": probes.why_not_alive, "/readyz": probes.why_not_ready}

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            scraped: Iterable[bytes] = metrics(environ, start_response)
            return scraped
        if path in asked:
            reason = asked[path]()
            status, text = ("503 Service Unavailable", reason) if reason else ("200 OK", "ok")
        else:
            status, text = "404 Not Found", "expected /metrics, /healthz or /readyz"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
        return [f"{text}\n".encode()]

    return answer


def _task(fields: dict[str, Any]) -> str:
    return str(fields.get("task", ""))


def _worker(fields: dict[str, Any]) -> str:
    return str(fields.get("worker", ""))
