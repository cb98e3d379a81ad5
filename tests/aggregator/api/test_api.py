"""What the HTTP API answers: pages, decisions on old pages, two operators at once, limits, a database that fails."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aggregator.api.shield import MOST_BODY_BYTES
from aggregator.api_client import ApiClient, ApiProblemError
from aggregator.audit.log import AuditLog
from aggregator.errors import DatabaseError
from aggregator.store import schema
from aggregator.store.leases import COORDINATOR
from benchmarks.operations.api_cases import SPARE_TASKS, run_cases
from fl_protocol.errors import ConfigError
from tests.aggregator.api.seeded_study import MASKED, NOW_S, OPEN, SeededStudy
from tests.aggregator.api.served import MANY, Desk, Served, served
from tests.enrolments import broken_copy


@pytest.fixture
def study(database_url: str) -> Iterator[SeededStudy]:
    made = SeededStudy(database_url, masked_rounds=2)
    yield made
    made.store.close()


@pytest.fixture
def server(study: SeededStudy) -> Iterator[Served]:
    with served(Desk(study)) as found:
        yield found


@pytest.fixture
def operator(server: Served) -> Iterator[ApiClient]:
    with server.client(server.desk.study.tokens["operator"]) as client:
        yield client


def problem(call: Any, *arguments: Any, **options: Any) -> tuple[int, str]:
    """Status and code of what has to fail."""
    with pytest.raises(ApiProblemError) as caught:
        call(*arguments, **options)
    return caught.value.status, caught.value.problem.code


def test_pages_have_everything_once(server: Served, operator: ApiClient) -> None:
    devices = [one.device for one in ApiClient.every(operator.devices, limit=7)]
    assert devices == [f"w-{number:05}" for number in range(30)]
    assert [one.number for one in ApiClient.every(operator.rounds, OPEN, limit=5)] == list(range(12, 0, -1))
    assert [one.version for one in ApiClient.every(operator.models, OPEN, limit=5)] == list(range(12, -1, -1))
    assert [one.name for one in ApiClient.every(operator.tasks, limit=1)] == [MASKED, OPEN]
    assert [one.task for one in ApiClient.every(operator.privacy, limit=1)] == [MASKED, OPEN]
    size = AuditLog(server.desk.study.store.database).size()
    assert [one.number for one in ApiClient.every(operator.audit, limit=4)] == list(range(size - 1, -1, -1))
    with server.client(server.desk.study.tokens["admin"]) as admin:
        assert [one.account for one in ApiClient.every(admin.accounts, limit=2)] == ["admin", "operator", "viewer"]
        made = {admin.create_token("viewer", scopes=["tasks:read"]).token.token for _ in range(3)}
        assert made < {one.token for one in ApiClient.every(admin.tokens, "viewer", limit=2)}


def test_devices_are_chosen_by_owner_state_and_name(operator: ApiClient) -> None:
    quarantined = operator.devices(state="quarantined").items
    assert [one.device for one in quarantined] == ["w-00000", "w-00010", "w-00020"]
    assert quarantined == operator.devices(owner="owner-0").items
    assert quarantined[0].not_before_s == NOW_S
    assert len(operator.devices(state="active").items) == 27
    assert operator.devices(state="revoked").items == []
    assert [one.device for one in operator.devices(prefix="w-0002", limit=2).items] == ["w-00020", "w-00021"]
    found = operator.device("w-00012")
    assert found.device.owner is None
    assert {one.round for one in found.counted if one.task == OPEN} == {6, 10}  # 7 n + 0..4 modulo 30
    assert problem(operator.device, "w-99999") == (404, "not_found")


def test_a_device_is_put_aside_taken_back_and_thrown_out(operator: ApiClient, server: Served) -> None:
    server.desk.study.add_enrolled("here", "active")
    assert operator.put_device("here", "quarantine", reason="odd updates").state == "quarantined"
    assert problem(operator.put_device, "here", "quarantine", reason="again") == (409, "same_state")
    assert operator.put_device("here", "restore", reason="it was the strap").state == "active"
    assert operator.put_device("here", "revoke", reason="lost on a train").state == "revoked"
    for action in ("revoke", "restore", "quarantine"):
        assert problem(operator.put_device, "here", action, reason="too late") == (409, "revoked")
    assert problem(operator.put_device, "w-00012", "revoke", reason="by hand") == (409, "not_enrolled")
    assert problem(operator.put_device, "nobody", "revoke", reason="?") == (404, "not_found")
    newest = operator.audit(limit=1).items[0]
    assert (newest.actor, newest.action, newest.subject) == ("operator", "device.revoked", "e-here")
    assert newest.detail["reason"] == "lost on a train"
    assert newest.detail["token"]


def test_a_task_its_rounds_and_models_are_shown(operator: ApiClient) -> None:
    task = operator.task(OPEN)
    assert (task.state.round, task.state.phase, task.settings["name"]) == (12, "paused", OPEN)
    assert operator.round(OPEN, 3).arrived == 5
    model = operator.model(OPEN, 3)
    assert model.lineage == [3, 2, 1, 0]
    assert model.model.record_epsilon is not None
    assert model.model.record_epsilon < (operator.model(OPEN, 9).model.record_epsilon or 0)
    spent = operator.spent(MASKED)
    assert (spent.sums, spent.budget, spent.budget_against) == (2, 6.0, "aggregator")
    assert (spent.device_aggregator or 0) > 0
    assert operator.overview().devices == 30
    fleet = operator.fleet()
    assert (fleet.active, fleet.unheard, fleet.quarantined, fleet.online) == (27, 27, 3, 0)
    for call, arguments in (
        (operator.task, ("nothing",)),
        (operator.round, (OPEN, 99)),
        (operator.model, (OPEN, 99)),
        (operator.order, (OPEN, 99)),
        (operator.entry, (9999,)),
    ):
        assert problem(call, *arguments) == (404, "not_found")


def decides_once(operator: ApiClient) -> None:
    """Of two operators with the same page, one decides."""
    seen = operator.task(OPEN).etag
    first = operator.resume(OPEN, etag=seen)
    assert (first.state, operator.order(OPEN, first.order).name) == ("left", "resume")
    assert problem(operator.resume, OPEN, etag=seen) == (412, "stale")
    assert problem(operator.pause, OPEN, etag=seen) == (412, "stale")


def test_two_operators_press_the_same_button(operator: ApiClient) -> None:
    decides_once(operator)
    assert problem(operator.resume, OPEN) == (409, "already_asked")
    assert operator.pause(OPEN, etag=operator.task(OPEN).etag).state == "left"
    assert operator.abort(OPEN, reason="the strap was redesigned", etag="*").state == "left"


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("requests", ("if expected is not None and", "if False and")),
        ("requests", ("now.is_over, now.is_paused, now.pausing, now.last_order", "now.is_over")),
    ],
)
def test_an_old_page_that_decides_is_caught(study: SeededStudy, module: str, change: tuple[str, str]) -> None:
    broken = broken_copy(f"aggregator.api.{module}", change)
    imported = (f"from aggregator.api.{module} import", f"from {broken.__name__} import")
    whole = broken_copy("aggregator.api.application")
    whole.tasks = broken_copy("aggregator.api.tasks", imported)  # type: ignore[attr-defined]
    desk = Desk(study)
    caught = pytest.raises((pytest.fail.Exception, AssertionError))
    with (
        served(desk, whole.make_api(desk.services)) as server,
        server.client(study.tokens["operator"]) as operator,
        caught,
    ):
        decides_once(operator)


def test_a_version_is_tagged_and_gone_back_to_from_a_page_that_is_new(server: Served, operator: ApiClient) -> None:
    seen = operator.models(OPEN).etag
    assert operator.tag(OPEN, 3, "good", etag=seen).model.tags == ("good",)
    assert problem(operator.tag, OPEN, 4, "good", etag=seen) == (412, "stale")
    assert problem(operator.rollback, OPEN, 4, etag=seen) == (412, "stale")
    with server.desk.study.store.database.transaction() as connection:
        connection.execute(schema.models.update().where(schema.models.c.version == 5).values(params=None))
    assert problem(operator.rollback, OPEN, 5) == problem(operator.tag, OPEN, 5, "good") == (409, "pruned")
    assert problem(operator.rollback, OPEN, 77) == problem(operator.tag, OPEN, 77, "good") == (404, "not_found")
    assert operator.rollback(OPEN, 4, etag=operator.models(OPEN).etag).state == "left"


def test_an_order_is_refused_by_the_coordinator_or_since_the_task_is_over(server: Served, operator: ApiClient) -> None:
    store = server.desk.study.store
    with store.database.transaction() as connection:
        connection.execute(schema.tasks.update().where(schema.tasks.c.task == MASKED).values(phase="finished"))
    assert problem(operator.resume, MASKED) == (409, "task_is_over")
    store.leases.take([COORDINATOR], "aggregator", until_s=NOW_S + 60, now_s=NOW_S)
    assert "has not answered yet" in operator.resume(OPEN).reason


def test_what_changes_something_is_in_the_audit_log_with_account_and_token(server: Served, operator: ApiClient) -> None:
    size, token = AuditLog(server.desk.study.store.database).size(), operator.whoami().token
    operator.resume(OPEN)
    operator.tag(OPEN, 2, "good")
    operator.remove_device("w-00003")
    problem(operator.remove_device, "w-00003")
    problem(operator.resume, OPEN)
    problem(operator.accounts)
    operator.devices()
    told = [one for one in ApiClient.every(operator.audit) if one.number >= size]
    assert [one.action for one in reversed(told)] == ["order.resume", "model.tagged", "device.removed"]
    assert {(one.actor, one.detail["token"]) for one in told} == {("operator", token)}
    assert operator.entry(size).subject == OPEN
    refused = [fields for event, fields in server.desk.journal.events if event == "use_refused"]
    assert [(one["code"], one["route"]) for one in refused] == [("not_allowed", "/v1/accounts")]
    assert server.desk.study.tokens["operator"].split("_", 2)[2] not in str(server.desk.journal.events)


def test_nobody_gives_more_than_they_have(server: Served) -> None:
    study = server.desk.study
    narrow = study.add_token("admin", scopes=["accounts:read", "accounts:write"])
    with server.client(narrow) as admin:
        admin.create_account("mallory", "admin")
        assert problem(admin.create_token, "mallory", scopes=["tasks:write"]) == (403, "beyond_own")
        made = admin.create_token("mallory", days=1.0, note="for herself")
        assert made.token.scopes == ("accounts:read", "accounts:write")
        assert problem(admin.disable_account, "admin") == (409, "own_account")
        assert problem(admin.create_account, "mallory", "admin") == (409, "account_exists")
        admin.disable_account("mallory")
        assert problem(admin.disable_account, "mallory") == (409, "account_disabled")
        with server.client(made.secret) as mallory:
            assert problem(mallory.whoami) == (401, "disabled_account")
        assert admin.revoke_token(made.token.token).revoked_s == NOW_S
        assert problem(admin.revoke_token, made.token.token) == (409, "token_revoked")
        assert problem(admin.revoke_token, "0" * 16) == (404, "unknown_token")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422), (b"{", 422), (b"[]", 422), (b'{"reason": 5}', 422), (b'{"reason": ""}', 422), (b"\xff", 422),
        (b'{"reason": "a\\u0000b"}', 422), (b'{"reason": "\\ud800"}', 422), (b'{"reason": "x", "y": 1}', 422),
        (b"[" * 60_000, 422), (b'{"reason": "' + b"x" * 501 + b'"}', 422), (b"x" * (MOST_BODY_BYTES + 1), 413),
    ],
)  # fmt: skip
def test_a_body_that_is_not_as_described_changes_nothing(server: Served, body: bytes, status: int) -> None:
    token = server.desk.study.tokens["operator"]
    found, _, problem = server.ask("POST", f"/v1/tasks/{OPEN}/abort", token=token, body=body)
    assert (found, problem["code"]) == (status, "too_long" if status == 413 else "invalid")
    assert server.desk.study.store.tasks.orders(OPEN) == []


def test_what_is_not_there_or_cannot_be_done_there_says_so(server: Served) -> None:
    token = server.desk.study.tokens["admin"]
    assert server.ask("GET", "/nothing", token=token)[0] == 404
    assert server.ask("GET", "/v1/devices/", token=token)[0] == 404
    status, headers, found = server.ask("PATCH", "/v1/devices", token=token)
    assert (status, headers["allow"], found["code"]) == (405, "GET", "not_here")
    status, _, found = server.ask("GET", "/v1/devices?limit=201", token=token)
    assert (status, found["faults"][0]["where"]) == (422, "query.limit")
    assert server.ask("GET", "/v1/tasks/UPPER", token=token)[0] == 422
    assert server.ask("GET", "/v1/audit/99999999999999999999999", token=token)[0] == 422


def test_every_answer_has_security_headers_and_is_counted(server: Served) -> None:
    for path, token in (("/healthz", None), ("/v1/whoami", None), ("/nothing", None), ("/v1/openapi.json", None)):
        _, headers, _ = server.ask("GET", path, token=token)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers
    counted = server.desk.metrics.registry.get_sample_value
    labels = {"route": "/v1/whoami", "method": "GET", "status": "401"}
    assert counted("covey_api_requests_total", labels) == 1
    assert counted("covey_api_seconds_count", {"route": "none", "method": "GET"}) == 1


def test_requests_are_limited_by_token_by_address_and_in_guesses(study: SeededStudy) -> None:
    viewer, admin = study.tokens["viewer"], study.tokens["admin"]
    with served(Desk(study, limits=(3, MANY, MANY))) as server:
        assert [server.ask("GET", "/v1/whoami", token=viewer)[0] for _ in range(4)] == [200, 200, 200, 429]
        assert server.ask("GET", "/v1/whoami", token=admin)[0] == 200
        status, headers, found = server.ask("GET", "/v1/whoami", token=viewer)
        assert (status, headers["retry-after"], found["code"]) == (429, "20", "too_many_requests")
        server.desk.now_s += 20.0
        assert server.ask("GET", "/v1/whoami", token=viewer)[0] == 200
    with served(Desk(study, limits=(MANY, 2, MANY))) as server:
        assert [server.ask("GET", "/v1/whoami")[0] for _ in range(3)] == [401, 401, 429]
        assert server.ask("GET", "/healthz")[0] == 429
    with served(Desk(study, limits=(MANY, MANY, 3))) as server:
        assert server.ask("GET", "/v1/whoami", token=admin)[0] == 200
        guesses = [server.ask("GET", "/v1/whoami", token=f"covey_{number:016x}_{'A' * 43}")[0] for number in range(4)]
        assert guesses == [401, 401, 429, 429]
        assert server.ask("GET", "/v1/whoami", token=admin)[0] == 200  # it is known already


def test_a_database_that_fails_is_a_503_that_says_nothing_of_it(
    server: Served, operator: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.whoami()

    def fails(*_: object) -> None:
        raise DatabaseError("the database cannot be read: secret.example:5432 refused")

    monkeypatch.setattr(server.desk.study.store.database, "reading", fails)
    for path in ("/readyz", "/v1/whoami", "/v1/devices"):
        status, headers, found = server.ask("GET", path, token=server.desk.study.tokens["operator"])
        assert (status, found["code"], headers["retry-after"]) == (503, "unavailable", "5")
        assert "secret.example" not in str(found)
    assert "secret.example" in str(server.desk.journal.events)
    assert server.ask("GET", "/healthz")[0] == 200


def test_a_client_keeps_its_token_from_the_open_and_says_what_it_missed() -> None:
    for url in ("http://study.example", "ftp://study.example", "study"):
        with pytest.raises(ConfigError, match="https://"):
            ApiClient(url, "covey")
    with ApiClient("http://127.0.0.1:1", "covey") as client, pytest.raises(Exception, match="no answer from the API"):
        client.whoami()


def test_a_long_body_is_not_read_to_its_end(server: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("POST", f"/v1/tasks/{OPEN}/abort")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_cases_of_the_openapi_are_answered_as_declared(tmp_path: Path) -> None:
    study = SeededStudy(f"sqlite:///{tmp_path / 'study.db'}", masked_rounds=1)
    for number in range(SPARE_TASKS):
        study.add_task(f"spare-{number}", 1)
    with served(Desk(study)) as server:
        found = run_cases(server, 300, seeded=2)
    study.store.close()
    assert found.count >= 300
    assert found.failures == []
    assert {200, 401, 403, 404, 422} <= set(found.statuses)
