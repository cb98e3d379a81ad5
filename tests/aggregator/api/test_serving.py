"""``covey-aggregator api`` as a process: over TLS with its own certificate, and what it refuses to start with."""

from __future__ import annotations

import http.client
import os
import signal
import ssl
import subprocess
import sys
import time

import msgspec
import pytest

from aggregator.api_client import ApiClient, ApiProblemError
from aggregator.config import ApiSection
from aggregator.errors import AggregatorError
from tests.aggregator.operator_desk import ROOT, Operator, one_sentence, operator

__all__ = ["operator"]
WITHIN_S = 60.0


def test_the_api_is_served_over_tls_to_who_has_a_token(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    operator.says("task", "create", "./watch.toml", "CONFIG")
    operator.says("account", "create", "maria", "--role", "viewer", "CONFIG")
    token = operator.says("token", "create", "maria", "CONFIG").strip()
    operator.says("ca", "init", "--ca", "./ca")
    operator.says("ca", "server", "--ca", "./ca", "--host", "localhost", "--out", "./tls")
    text = operator.config.read_text()
    section = '\n[api]\nport = 0\ncertificate = "tls/broker.pem"\nkey = "tls/broker.key"\n'
    operator.config.write_text(text + section)
    command = [sys.executable, "-m", "aggregator.cli", "api", "--config", str(operator.config)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        started = msgspec.json.decode(process.stdout.readline())
        port = int(started["api"].rpartition(":")[2])
        with ApiClient(f"https://localhost:{port}", token, ca=operator.folder / "ca" / "ca.pem") as api:
            _wait(api)
            assert [one.name for one in api.tasks().items] == ["watch"]
            with pytest.raises(ApiProblemError, match="tasks:write"):
                api.pause("watch")
        old = ssl.create_default_context(cafile=str(operator.folder / "ca" / "ca.pem"))
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError):
            http.client.HTTPSConnection("localhost", port, context=old, timeout=30).request("GET", "/healthz")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(WITHIN_S) == 0


def _wait(api: ApiClient) -> None:
    """Until the process takes connections."""
    ends_s = time.monotonic() + WITHIN_S
    while True:
        try:
            api.whoami()
        except ApiProblemError:
            raise
        except AggregatorError:
            assert time.monotonic() < ends_s
            time.sleep(0.05)
        else:
            return


def test_what_it_cannot_be_started_with_is_one_sentence(operator: Operator) -> None:
    operator.says("init", "CONFIG")
    one_sentence(operator.run("api", "CONFIG"), 2, "[api]")
    for section, words in (
        ('host = "0.0.0.0"', "only loopback"),
        ('certificate = "tls/missing.pem"', "go together"),
        ('certificate = "tls/missing.pem"\nkey = "tls/missing.key"\nport = 0', "expected PEM files"),
    ):
        text = operator.config.read_text()
        operator.config.write_text(f"{text}\n[api]\n{section}\n")
        one_sentence(operator.run("api", "CONFIG"), 2, words)
        operator.config.write_text(text)


def test_defaults_keep_to_loopback() -> None:
    assert ApiSection().host == "127.0.0.1"
