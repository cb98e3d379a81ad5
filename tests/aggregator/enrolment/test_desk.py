"""Each request gets its one outcome; a token is good once, for one study, in its time; broken desks are caught."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import msgspec
import pytest
from cryptography import x509
from msgspec import UNSET
from msgspec.structs import replace
from sqlalchemy import select, update

from aggregator.adapters.open_blobs import open_blobs
from aggregator.enrolment import desk as desk_module
from aggregator.enrolment.register import names_of, set_quota, withdraw_tokens
from aggregator.enrolment.revocation import change_state
from aggregator.store import schema
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from device_client.tls_keys import SoftwareTlsKeys
from fl_protocol.enrolment import DAY_S, PseudonymAnswer, decode_file
from fl_protocol.joining import EnrolmentAnswerMsg
from fl_protocol.renewal_proof import signed_proof
from tests.aggregator.enrolment.desks import PINS, Asking, DeskOffice
from tests.enrolments import BEGINS_S, NOW_S, PERIOD_S, TASK, TENANT, broken_copy


def audited(office: DeskOffice) -> list[dict[str, Any]]:
    with office.store.database.reading() as connection:
        rows = connection.execute(select(schema.audit_entries.c.entry).order_by(schema.audit_entries.c.number))
        return [msgspec.json.decode(row.entry) for row in rows]


def test_a_device_with_a_token_gets_names_and_what_it_has_to_pin() -> None:
    office, device = DeskOffice(), Asking("a")
    answer = office.ask(device, device.request(office.token()))
    assert answer.outcome == "enrolled"
    assert answer.pins == PINS
    assert answer.enrolment == device.enrolment
    device.install(answer)
    assert [one.period.begins_s for one in device.names.installed()] == [BEGINS_S + k * PERIOD_S for k in range(3)]
    assert set(office.store.devices.find(one.id for one in device.names.installed())) == {
        one.id for one in device.names.installed()
    }


def test_names_are_kept_with_their_serial_numbers_and_it_is_in_the_log() -> None:
    office, device = DeskOffice(), Asking("a")
    answer = office.ask(device, device.request(office.token()))
    certificates = [
        x509.load_pem_x509_certificate(one.certificate.encode())
        for one in decode_file(answer.names, PseudonymAnswer).certificates
    ]
    kept = office.change(names_of, device.enrolment)
    assert [int(one.serial, 16) for one in kept] == [one.serial_number for one in certificates]
    assert [one.not_after_s for one in kept] == [one.not_valid_after_utc.timestamp() for one in certificates]
    (entry,) = audited(office)
    assert (entry["actor"], entry["action"], entry["subject"]) == ("desk", "device.enrolled", device.enrolment)
    assert entry["detail"] == {"owner": "ward-3", "task": TASK, "names": 3}


def test_the_same_request_again_gets_the_same_answer_even_after_its_token_has_expired() -> None:
    office, device = DeskOffice(), Asking("a")
    request = device.request(office.token(days=1))
    first = office.ask(device, request)
    assert office.ask(device, request, now_s=NOW_S + 2 * DAY_S) == first
    assert len(audited(office)) == 1


def check_the_same_names_again_cost_nothing(module: ModuleType) -> None:
    """A device whose answer was lost, and whose name on the wire has changed since, has to sign its request anew."""
    office, device = DeskOffice(module), Asking("a")
    office.quota("ward-3", 1)
    claim = device.request(office.token(days=1))
    first = office.ask(device, claim)
    again = office.ask(device, replace(claim, client="c" + "0" * 32), now_s=NOW_S + 2 * DAY_S)
    assert again == replace(first, request_digest=again.request_digest)
    assert again.request_digest != first.request_digest
    device.install(again)
    renewal = device.request(None)
    late_s = BEGINS_S + 2 * PERIOD_S
    assert office.ask(device, renewal, now_s=late_s).outcome == "renewed"
    resent = office.ask(device, replace(renewal, client="c" + "1" * 32), now_s=late_s + 7 * DAY_S)
    assert resent.outcome == "renewed"
    device.install(resent)
    assert [entry["action"] for entry in audited(office)] == ["device.enrolled", "device.renewed"]


def check_a_token_is_good_once(module: ModuleType) -> None:
    office, thief = DeskOffice(module), Asking("thief")
    token, device = office.token(), Asking("a")
    assert office.ask(device, device.request(token)).outcome == "enrolled"
    assert office.ask(thief, thief.request(token)).outcome == "used_token"
    # Nor for the same device with other names.
    assert office.ask(device, device.request(token, anew=True)).outcome == "used_token"


def check_a_stolen_token_leaves_a_trace_and_no_place(module: ModuleType) -> None:
    """Whoever is quicker is in; the rightful device is told why it is not, and the thief is found and thrown out."""
    office, device, thief = DeskOffice(module), Asking("a"), Asking("thief")
    token = office.token()
    assert office.ask(thief, thief.request(token)).outcome == "enrolled"
    assert office.ask(device, device.request(token)).outcome == "used_token"
    (entry,) = audited(office)
    assert entry["subject"] == thief.enrolment
    office.change(
        change_state, thief.enrolment, "revoked", reason="its token was stolen", actor="local:op", now_s=NOW_S
    )
    assert office.ask(thief, thief.request(office.token())).outcome == "revoked"
    assert office.ask(device, device.request(office.token())).outcome == "enrolled"


def check_a_token_expires(module: ModuleType) -> None:
    office, device = DeskOffice(module), Asking("a")
    request = device.request(office.token(days=7))
    assert office.ask(device, request, now_s=NOW_S + 7 * DAY_S).outcome == "expired_token"
    assert office.ask(device, request, now_s=NOW_S + 7 * DAY_S - 1).outcome == "enrolled"


def check_a_token_can_be_withdrawn(module: ModuleType) -> None:
    office, device = DeskOffice(module), Asking("a")
    request = device.request(office.token())
    assert office.change(withdraw_tokens, owner="ward-3", now_s=NOW_S) == 1
    assert office.ask(device, request).outcome == "withdrawn_token"


def check_a_token_is_for_one_study(module: ModuleType) -> None:
    office, device = DeskOffice(module), Asking("a")
    assert office.ask(device, device.request(office.token(task="sleep"))).outcome == "unknown_token"


def check_a_guessed_token_is_none(module: ModuleType) -> None:
    office, device = DeskOffice(module), Asking("a")
    office.token()
    assert office.ask(device, device.request(bytes(16))).outcome == "unknown_token"


def check_a_quota_holds(module: ModuleType) -> None:
    office = DeskOffice(module)
    office.quota("ward-3", 2)
    tokens = [office.token() for _ in range(3)]
    devices = [Asking(name) for name in "abc"]
    outcomes = [office.ask(one, one.request(token)).outcome for one, token in zip(devices, tokens, strict=True)]
    assert outcomes == ["enrolled", "enrolled", "quota_exhausted"]
    office.quota("ward-3", 3)
    assert office.ask(devices[2], devices[2].request(tokens[2])).outcome == "enrolled"  # it was not used up


def check_who_is_out_gets_nothing(module: ModuleType) -> None:
    for state in ("revoked", "quarantined"):
        office, device = DeskOffice(module), Asking("a")
        request = device.request(office.token())
        assert office.ask(device, request).outcome == "enrolled"
        with office.store.database.transaction() as connection:
            connection.execute(update(schema.enrolments).values(state=state, reason="lost"))
        for asked in (request, device.request(office.token(), anew=True), device.request(None)):
            answer = office.ask(device, asked)
            assert answer.outcome == "revoked"
            assert "lost" in answer.detail


def check_a_renewal_needs_its_key(module: ModuleType) -> None:
    office, device, thief = DeskOffice(module), Asking("a"), Asking("thief")
    device.install(office.ask(device, device.request(office.token())))
    late_s = BEGINS_S + 2 * PERIOD_S
    assert office.ask(thief, thief.request(None), now_s=late_s).outcome == "not_enrolled"
    assert office.ask(thief, thief.request(None, enrolment=device.enrolment), now_s=late_s).outcome == "not_enrolled"
    assert office.ask(device, device.request(None), now_s=late_s).outcome == "renewed"


def check_a_renewal_needs_a_tls_key_that_it_has(module: ModuleType) -> None:
    """Whoever has copied all of a device's files, but cannot use its TLS keys, gets no name."""
    office, device = DeskOffice(module), Asking("a")
    device.install(office.ask(device, device.request(office.token())))
    thief, other = Asking("thief"), Asking("b")
    other.install(office.ask(other, other.request(office.token())))
    thief.renewal = device.renewal
    late_s, own = BEGINS_S + 2 * PERIOD_S, thief.request(None)
    said = {"tenant": TENANT, "task": TASK, "enrolment": device.enrolment}
    name, made_up = device.names.installed()[-1].id, SoftwareTlsKeys().make(thief.entropy).key
    seen = device.proof(device.request(None, anew=True).names)
    for proof, reason in (
        (UNSET, "got one without"),
        (signed_proof(name, made_up, names=own.names, **said), "not signed by the TLS key"),
        (seen, "not signed by the TLS key"),
        (other.proof(own.names, enrolment=device.enrolment), "names that were granted last"),
    ):
        answer = office.ask(thief, replace(own, proof=proof), now_s=late_s)
        assert answer.outcome == "refused"
        assert reason in answer.detail
    assert office.ask(device, device.request(None), now_s=late_s).outcome == "renewed"


def check_a_renewal_is_not_for_hoarding(module: ModuleType) -> None:
    office, device = DeskOffice(module), Asking("a")
    device.install(office.ask(device, device.request(office.token(), count=4)))
    early = office.ask(device, device.request(None), now_s=NOW_S)
    assert early.outcome == "too_early"
    assert NOW_S + early.retry_after_s == BEGINS_S + 2 * PERIOD_S
    assert office.ask(device, device.request(None), now_s=NOW_S + early.retry_after_s).outcome == "renewed"


CHECKS: list[tuple[Callable[[ModuleType], None], tuple[str, str]]] = [
    (check_the_same_names_again_cost_nothing, ("and _is_for(given, request)", "and False")),
    (check_a_token_is_good_once, ("if token.used_s is not None:", "if False:")),
    (check_a_stolen_token_leaves_a_trace_and_no_place, ("if token.used_s is not None:", "if False:")),
    (check_a_stolen_token_leaves_a_trace_and_no_place, ('known.state != "active":', "False:")),
    (check_a_token_expires, ("if now_s >= token.expires_s:", "if False:")),
    (check_a_token_can_be_withdrawn, ("if token.withdrawn_s is not None:", "if False:")),
    (check_a_token_is_for_one_study, ("if token is None or token.task != task:", "if token is None:")),
    (check_a_quota_holds, (">= quota:", "> quota:")),
    (check_who_is_out_gets_nothing, ('if known is not None and known.state != "active":', "if False:")),
    (check_who_is_out_gets_nothing, ('known.state != "active":', 'known.state == "revoked":')),
    (check_a_renewal_needs_its_key, ("enrolment_id(request.renewal_key), lock", "request.enrolment or '', lock")),
    (check_a_renewal_needs_a_tls_key_that_it_has, ("        _check_proof(request", "        (request")),
    (check_a_renewal_is_not_for_hoarding, ("if now_s < due_s:", "if False:")),
]


@pytest.mark.parametrize("check", [*dict.fromkeys(check for check, _ in CHECKS), check_a_guessed_token_is_none])
def test_it_holds(check: Callable[[ModuleType], None]) -> None:
    check(desk_module)


@pytest.mark.parametrize(("check", "change"), CHECKS)
def test_a_desk_that_does_not_check_is_caught(check: Callable[[ModuleType], None], change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check(broken_copy("aggregator.enrolment.desk", change))


def test_renewed_names_follow_the_old_ones_without_a_gap_and_without_an_overlap() -> None:
    office, device = DeskOffice(), Asking("a")
    device.install(office.ask(device, device.request(office.token(), count=2)))
    device.install(office.ask(device, device.request(None, count=2), now_s=NOW_S + PERIOD_S))
    periods = [one.period for one in device.names.installed()]
    assert [one.begins_s for one in periods] == [BEGINS_S + k * PERIOD_S for k in range(4)]


def test_a_device_that_comes_long_after_its_last_name_has_ended_is_renewed_from_now_on() -> None:
    office, device = DeskOffice(), Asking("a")
    device.install(office.ask(device, device.request(office.token(), count=1)))
    device.install(office.ask(device, device.request(None, count=1), now_s=BEGINS_S + 7.5 * PERIOD_S))
    assert device.names.installed()[-1].period.begins_s == BEGINS_S + 7 * PERIOD_S


def test_a_row_with_anothers_name_is_refused_and_uses_no_token_up() -> None:
    office, device, victim = DeskOffice(), Asking("a"), Asking("victim")
    token = office.token()
    theirs = victim.request(office.token())
    assert office.ask(victim, theirs).outcome == "enrolled"
    stolen = office.ask(device, replace(device.request(token), names=theirs.names))
    assert stolen.outcome == "refused"
    assert "admitted before" in stolen.detail
    for rubbish in (b"{}", b"\xff", theirs.names.replace(b"BEGIN", b"BEGUN")):
        assert office.ask(device, replace(device.request(token), names=rubbish)).outcome == "refused"
    assert office.ask(device, device.request(token)).outcome == "enrolled"
    assert len(audited(office)) == 2


def at_once(office: DeskOffice, asked: list[tuple[Asking, Any]]) -> list[str]:
    """Outcomes of requests that come at the same moment."""
    outcomes: list[str] = []
    gate = threading.Barrier(len(asked))

    def ask(device: Asking, request: Any) -> None:
        gate.wait()
        outcomes.append(office.ask(device, request).outcome)

    threads = [threading.Thread(target=ask, args=one) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(outcomes)


@pytest.fixture
def shared(database_url: str) -> DeskOffice:
    """A desk on a database that several connections reach."""
    blobs = open_blobs("memory://desks")
    store = AggregatorStore(Database(database_url, blobs=blobs), blobs)
    about: dict[str, Any] = {
        "spec": "",
        "bundle": "",
        "validation": None,
        "graph_digest": bytes(32),
        "probability": 1.0,
    }
    with store.database.transaction() as connection:
        store.tasks.create(connection, TASK, **about, now_s=NOW_S)
    return DeskOffice(store=store)


def test_of_two_devices_with_one_token_one_comes_second(shared: DeskOffice) -> None:
    token, devices = shared.token(), [Asking("a"), Asking("b"), Asking("c"), Asking("d")]
    outcomes = at_once(shared, [(one, one.request(token)) for one in devices])
    assert outcomes == ["enrolled", "used_token", "used_token", "used_token"]


def test_of_two_devices_for_the_last_place_of_a_quota_one_comes_second(shared: DeskOffice) -> None:
    shared.change(set_quota, "ward-3", 1, now_s=NOW_S)
    devices = [Asking("a"), Asking("b"), Asking("c")]
    outcomes = at_once(shared, [(one, one.request(shared.token())) for one in devices])
    assert outcomes == ["enrolled", "quota_exhausted", "quota_exhausted"]


def test_the_same_request_twice_at_once_makes_one_enrolment(shared: DeskOffice) -> None:
    device = Asking("a")
    request = device.request(shared.token())
    assert at_once(shared, [(device, request)] * 3) == ["enrolled"] * 3
    assert len(audited(shared)) == 1


def test_an_answer_decodes_as_it_was_kept() -> None:
    office, device = DeskOffice(), Asking("a")
    answer = office.ask(device, device.request(office.token()))
    with office.store.database.reading() as connection:
        kept = connection.execute(select(schema.enrolments.c.answer)).scalar_one()
    assert msgspec.msgpack.decode(kept, type=EnrolmentAnswerMsg) == answer
