"""Metrics of the study as a whole; the page, the dashboard for Grafana and the alerts name none that there is not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aggregator.adapters.prometheus import CountingJournal
from aggregator.adapters.study_metrics import NAMES, StudyMetrics
from aggregator.api.audit_book import AuditBook
from aggregator.api.metrics import ApiMetrics
from tests.aggregator.api.seeded_study import MASKED, NOW_S, SeededStudy
from tests.aggregator.test_prometheus import Lines

DOCS = Path(__file__).resolve().parents[2] / "docs"
HELPER = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()


@pytest.fixture
def study(database_url: str) -> Iterator[SeededStudy]:
    made = SeededStudy(database_url, masked_rounds=3)
    yield made
    made.store.close()


def registry_of(study: SeededStudy) -> CollectorRegistry:
    registry = CollectorRegistry()
    book = AuditBook(
        study.store.database, tenant="clinic", aggregator=None, helpers={"helper-a": HELPER}, now_s=lambda: NOW_S
    )
    registry.register(StudyMetrics(study.store, tenant="clinic", audit=book.state, now_s=lambda: NOW_S))
    return registry


def test_what_is_scraped_is_what_the_database_says(study: SeededStudy) -> None:
    registry = registry_of(study)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    assert value("covey_database_up") == 1
    assert value("covey_devices", state="active") == 27
    assert value("covey_devices", state="quarantined") == 3
    assert value("covey_devices_waiting", reason="charger") == 0
    assert value("covey_rounds_committed", task=MASKED) == 3
    assert value("covey_budget_epsilon_limit", task=MASKED) == 6.0
    spent = value("covey_budget_epsilon", task=MASKED)
    assert spent is not None
    assert 0 < spent < 6
    assert value("covey_audit_cosigned", helper="helper-a") == 0
    assert value("covey_problems") == 2  # nobody coordinates, nobody takes uploads


def test_a_database_that_fails_is_a_metric(study: SeededStudy) -> None:
    registry = registry_of(study)
    with study.store.database.transaction() as connection:
        connection.exec_driver_sql("DROP TABLE presence")
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert [(one.name, one.samples[0].value) for one in families] == [("covey_database_up", 0.0)]


def known() -> set[str]:
    """Every metric that a process of ours can have, with the endings of counters and histograms."""
    found = set(NAMES)
    for registry in (CountingJournal(Lines()).registry, ApiMetrics().registry):
        for family in registry.collect():
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
            found |= {family.name + ending for ending in endings}
    return found


def named(text: str) -> set[str]:
    return set(re.findall(r"\bcovey_[a-z_]+", text))


def test_grafana_and_the_alerts_name_metrics_that_there_are() -> None:
    board = json.loads((DOCS / "grafana" / "covey.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(asked) >= 15
    alerts = re.findall(r"expr: (.*)", (DOCS / "grafana" / "alerts.yml").read_text())
    assert len(alerts) >= 9
    for expr in (*asked, *alerts):
        assert named(expr), expr
        assert named(expr) <= known(), expr


def test_the_page_lists_every_metric_and_no_other() -> None:
    page = (DOCS / "operations.md").read_text()
    table = page[page.index("| metric | labels |") :].split("\n\n", 1)[0]
    listed = set(re.findall(r"^\| `(covey_[a-z_]+)`", table, re.M))
    assert listed == {re.sub("_(bucket|sum|count)$", "", name) for name in known()}
