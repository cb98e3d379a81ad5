"""Whether a process is alive and ready, as it says beside its metrics."""

from __future__ import annotations

import urllib.error
import urllib.request
from contextlib import closing

import pytest

from aggregator.adapters.prometheus import CountingJournal, Probes, serve_metrics
from aggregator.heartbeat import LONGEST_TURN_S, Heartbeat
from tests.aggregator.test_prometheus import Lines
from tests.enrolments import broken_copy


def asked(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode().strip()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode().strip()


def check_probes(journal: CountingJournal) -> None:
    at = [100.0]
    heartbeat = Heartbeat(lambda: at[0])
    probes = Probes(heartbeat.why_not_alive, journal.why_not_ready)
    with closing(serve_metrics(journal.registry, 0, probes=probes)) as server:
        assert asked(server.port, "/healthz") == (200, "ok")
        assert asked(server.port, "/readyz") == (503, "not connected to the broker")
        journal.write("connected", at_s=1.0)
        assert asked(server.port, "/readyz") == (200, "ok")
        journal.write("degraded", at_s=1.0, worker="a", reason="away")
        assert asked(server.port, "/readyz") == (503, "the database does not answer")
        journal.write("recovered", at_s=1.0, worker="a")
        journal.write("disconnected", at_s=1.0, reason="gone")
        assert asked(server.port, "/readyz")[0] == 503
        at[0] += LONGEST_TURN_S
        assert asked(server.port, "/healthz") == (503, "the loop has not gone round for 120 s")
        heartbeat.beat()
        assert asked(server.port, "/healthz") == (200, "ok")
        assert asked(server.port, "/metrics")[0] == 200
        assert asked(server.port, "/else")[0] == 404
    with closing(serve_metrics(journal.registry, 0)) as server:  # the API's, which has its own
        assert asked(server.port, "/healthz")[0] == 404


def test_probes_say_whether_a_process_is_alive_and_ready() -> None:
    check_probes(CountingJournal(Lines()))


@pytest.mark.parametrize(
    "change",
    [
        ("self._is_connected = bool(connected)", "self._is_connected = True"),
        ("if any(self._failures.values()):", "if False:"),
    ],
)
def test_a_process_that_is_always_ready_is_caught(change: tuple[str, str]) -> None:
    broken = broken_copy("aggregator.adapters.prometheus", change)
    with pytest.raises(AssertionError):
        check_probes(broken.CountingJournal(Lines()))
