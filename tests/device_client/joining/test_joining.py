"""A device joins by a token and renews: what it sends, what it believes, and what survives a kill at any write."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace
from sqlalchemy import select, update

from aggregator.enrolment.register import withdraw_tokens
from aggregator.store import schema
from device_client.errors import KeyStoreError
from device_client.joining import joiner as joiner_module
from device_client.joining.records import encode_state
from device_client.joining.words import refusal_words
from device_client.pseudonyms import Pseudonym
from device_client.tls_keys import SoftwareTlsKeys
from firmware_sim.faults.packets import PacketRates
from firmware_sim.virtual_flash import PowerCutError
from fl_protocol.enrolment import DAY_S
from fl_protocol.errors import ConfigError
from fl_protocol.joining import opened_request
from fl_protocol.signing import public_key_hex
from fl_protocol.topics import enrolment_topic
from tests.device_client.joining.rig import (
    DESK_KEY,
    STUDY,
    DeskRig,
    JoiningDevice,
    broken_joiner,
    join,
    run,
)
from tests.device_client.ports import MemoryStore
from tests.enrolments import AGGREGATOR, NOW_S, PERIOD_S, TASK, TENANT, broken_copy

YEAR_S = 365.25 * DAY_S
DESKS_OWN = Ed25519PrivateKey.from_private_bytes(b"\x66" * 32)
"""A key that is not the aggregator's."""


def requests_of(rig: DeskRig) -> list[tuple[str, bytes]]:
    """Digests of what came to the desk, with what was on the wire, from now on."""
    seen: list[tuple[str, bytes]] = []
    publish = rig.broker.publish

    def spy(topic: str, payload: bytes, *, retain: bool) -> None:
        if topic.endswith("/request"):
            client = topic.split("/")[4]
            _, digest = opened_request(payload, DESK_KEY, tenant=TENANT, task=TASK, client=client)
            seen.append((digest.hex(), payload))
        publish(topic, payload, retain=retain)

    rig.broker.publish = spy  # type: ignore[method-assign]
    return seen


def answers_lost(rig: DeskRig, count: int) -> None:
    """Lose the first answers."""
    left, publish = [count], rig.broker.publish

    def lose(topic: str, payload: bytes, *, retain: bool) -> None:
        if topic.endswith("/answer") and left[0]:
            left[0] -= 1
        else:
            publish(topic, payload, retain=retain)

    rig.broker.publish = lose  # type: ignore[method-assign]


def test_a_device_with_a_token_gets_names_and_forgets_the_requests_keys() -> None:
    rig = DeskRig()
    device = JoiningDevice(rig)
    token = join(rig, device)
    assert len(device.names.installed()) == 3
    assert isinstance(device.names.current(NOW_S), Pseudonym)
    state = device.joiner.state
    assert state is not None
    assert (state.request, state.refusal) == (None, None)
    assert state.membership is not None
    assert state.membership.pins == rig.office.desk.pins[TASK]
    assert not any(token.secret in blob for blob in device.store.blobs.values())


def check_the_same_bytes_are_sent_again(module: Any) -> None:
    """Sealed anew each time, ever more rarely, across restarts; and the desk enrols it once."""
    rig = DeskRig()
    seen = requests_of(rig)
    answers_lost(rig, 6)
    device = JoiningDevice(rig, module=module)
    device.joiner.open_claim(rig.claim, rig.token())
    run(rig, device, until=lambda: len(seen) == 3)
    device.restart()
    run(rig, device, until=lambda: not device.joiner.is_asking)
    assert len({digest for digest, _ in seen}) == 1
    assert len({wire for _, wire in seen}) == len(seen) == 7
    assert rig.outcomes() == ["enrolled"] * 7
    with rig.office.store.database.reading() as connection:
        assert len(connection.execute(select(schema.enrolments.c.enrolment)).all()) == 1


def test_the_same_bytes_are_sent_again_until_an_answer_opens() -> None:
    check_the_same_bytes_are_sent_again(joiner_module)


def check_it_asks_ever_more_rarely(session: Any) -> None:
    rig = DeskRig()
    seen = requests_of(rig)
    answers_lost(rig, 10**6)
    device = JoiningDevice(rig, module=session)
    device.joiner.open_claim(rig.claim, rig.token())
    with pytest.raises(AssertionError, match="not done"):
        run(rig, device, until=lambda: False, most_s=3600)
    assert 7 <= len(seen) <= 30


def test_it_asks_ever_more_rarely_while_nobody_answers() -> None:
    check_it_asks_ever_more_rarely(joiner_module)


def check_only_the_aggregators_answer_counts(session: Any) -> None:
    """Not that of whoever has the desk's key alone, and not rubbish."""
    rig = DeskRig(signs=DESKS_OWN)
    device = JoiningDevice(rig, module=session)
    device.joiner.open_claim(rig.claim, rig.token())
    for _ in range(30):
        rig.broker.publish(enrolment_topic(TENANT, device.client, "answer"), b"rubbish", retain=False)
        device.step()
        rig.service.step()
        rig.clock.time_s += 1.0
    assert device.joiner.is_asking
    assert device.names.installed() == ()
    assert device.joiner.session is not None
    assert device.joiner.session.dropped


def test_only_the_aggregators_answer_counts() -> None:
    check_only_the_aggregators_answer_counts(joiner_module)


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("expired_token", "ask the study's operator for another one"),
        ("withdrawn_token", "ask the study's operator for another one"),
        ("quota_exhausted", "with the same token"),
        ("used_token", "this one was used"),
    ],
)
def test_a_refusal_stops_it_with_a_sentence_and_keeps_everything(outcome: str, words: str) -> None:
    rig = DeskRig()
    device, token = JoiningDevice(rig), rig.token(days=1)
    if outcome == "expired_token":
        rig.clock.time_s += 2 * DAY_S
    elif outcome == "withdrawn_token":
        rig.office.change(withdraw_tokens, owner="ward-3", now_s=NOW_S)
    elif outcome == "quota_exhausted":
        rig.office.quota("ward-3", 0)
    else:
        join(rig, JoiningDevice(rig, "another"), token)
    join(rig, device, token)
    state = device.joiner.state
    assert device.outcome == outcome
    assert state is not None
    assert state.request is not None
    assert state.refusal is not None
    text = refusal_words(STUDY, state.refusal)
    assert text.startswith(STUDY)
    assert words in text
    assert device.names.waiting == 3
    # A token that is good makes the same names good: what was made is not thrown away.
    rig.office.quota("ward-3", 100)
    before = state.request.renewal_key
    join(rig, device)
    assert device.outcome == ""
    assert device.joiner.state is not None
    assert device.joiner.state.membership is not None
    assert device.joiner.state.membership.renewal_key == before


def test_an_answer_that_was_lost_before_the_wearer_came_with_another_token_is_found() -> None:
    rig = DeskRig()
    device = JoiningDevice(rig)
    answers_lost(rig, 1)
    device.joiner.open_claim(rig.claim, rig.token())
    for _ in range(2):
        device.step()
        rig.service.step()
    rig.office.quota("ward-3", 1)
    assert rig.outcomes() == ["enrolled"]
    join(rig, device)
    assert device.outcome == ""
    assert len(device.names.installed()) == 3


def test_a_busy_desk_is_asked_again_when_it_says() -> None:
    rig = DeskRig(a_minute=1)
    first, second = JoiningDevice(rig, "a"), JoiningDevice(rig, "b")
    for device in (first, second):
        device.joiner.open_claim(rig.claim, rig.token())
    seen = requests_of(rig)
    run(rig, first, second, until=lambda: not first.joiner.is_asking and not second.joiner.is_asking)
    assert [one.outcome for one in (first, second)] == ["", ""]
    assert len(seen) == 3
    assert rig.outcomes() == ["enrolled", "busy", "enrolled"]


def test_a_wait_that_a_clock_ahead_has_noted_ends_when_it_is_set_back() -> None:
    rig = DeskRig(a_minute=1)
    join(rig, JoiningDevice(rig, "other"))
    device = JoiningDevice(rig, ahead_s=20 * YEAR_S)
    device.joiner.open_claim(rig.claim, rig.token())
    for _ in range(3):
        device.step()
        rig.service.step()
    assert rig.outcomes()[-1] == "busy"
    device.ahead_s = 0.0
    run(rig, device, until=lambda: not device.joiner.is_asking, most_s=600)
    assert device.outcome == ""


def renew(rig: DeskRig, device: JoiningDevice) -> None:
    device.joiner.open_renewal()
    run(rig, device, until=lambda: not device.joiner.is_asking)


def test_a_renewal_adds_names_and_an_early_one_is_sent_again_later() -> None:
    rig = DeskRig()
    device = JoiningDevice(rig)
    join(rig, device)
    device.joiner.open_renewal()
    run(rig, device, until=lambda: "too_early" in rig.outcomes(), most_s=60)
    assert device.joiner.is_asking
    rig.clock.time_s += 2 * PERIOD_S
    run(rig, device, until=lambda: not device.joiner.is_asking, most_s=2 * DAY_S)
    assert rig.outcomes()[-1] == "renewed"
    assert len(device.names.installed()) == 6


def check_names_that_have_ended_and_kills_do_not_keep_it_out(module: Any) -> None:
    """The key of the last name signs for the next, long after the name has ended."""
    rig = DeskRig()
    device = JoiningDevice(rig, module=module)
    join(rig, device)
    rig.clock.time_s += 3 * PERIOD_S + 90 * DAY_S
    device.names.forget_expired(rig.clock.time_s)
    device.restart()
    renew(rig, device)
    assert device.outcome == ""
    device.names.forget_expired(rig.clock.time_s)
    assert len(device.names.installed()) == 3
    # And by a name of that row, when the first is forgotten.
    rig.clock.time_s += 2 * PERIOD_S
    device.restart()
    renew(rig, device)
    assert device.outcome == ""


def test_names_that_have_ended_and_kills_do_not_keep_it_out() -> None:
    check_names_that_have_ended_and_kills_do_not_keep_it_out(joiner_module)


@pytest.mark.parametrize(
    "change",
    [
        ("Prepared(names, self._proof(names))", "Prepared(names)"),
        ("self._proof(names))", "self._proof(b'others'))"),
        ("known[-1].id, key", "self.names.installed()[0].id, key"),
    ],
)
def test_a_joiner_whose_renewals_prove_nothing_gets_no_names(change: tuple[str, str]) -> None:
    broken = broken_copy("device_client.joining.joiner", change)
    with pytest.raises(AssertionError):
        check_names_that_have_ended_and_kills_do_not_keep_it_out(broken)


class AwayKeys(SoftwareTlsKeys):
    """Those of a TPM that is away, or that the configuration no longer names."""

    def load(self, stored: bytes) -> ec.EllipticCurvePrivateKey:
        raise KeyStoreError(f"a TLS key of {len(stored)} bytes: set tls_keys")


def check_without_its_tls_keys_nothing_is_sent_until_they_are_back(module: Any) -> None:
    rig = DeskRig()
    device = JoiningDevice(rig, module=module)
    join(rig, device)
    rig.clock.time_s += 2 * PERIOD_S
    seen, keys = requests_of(rig), device.names._tls_keys
    device.names._tls_keys = AwayKeys()
    device.joiner.open_renewal()
    for _ in range(3600):
        device.step()
        rig.clock.time_s += 1.0
    assert seen == []
    reasons = [fields["reason"] for name, fields in device.journal.events if name == "store_failed"]
    assert {reason.rpartition(": ")[2] for reason in reasons} == {"set tls_keys"}
    # A try makes a dozen keys, in a TPM as many processes: not once a second.
    assert len(reasons) <= 6
    device.names._tls_keys = keys
    run(rig, device, until=lambda: not device.joiner.is_asking)
    assert len(device.names.installed()) == 6


def test_without_its_tls_keys_nothing_is_sent_and_it_says_why_until_they_are_back() -> None:
    check_without_its_tls_keys_nothing_is_sent_until_they_are_back(joiner_module)


@pytest.mark.parametrize(
    "change", [("KEYS_AGAIN_S = 600.0", "KEYS_AGAIN_S = 0.001"), ("KEYS_AGAIN_S = 600.0", "KEYS_AGAIN_S = 1e9")]
)
def test_a_joiner_that_asks_a_tpm_again_and_again_or_never_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check_without_its_tls_keys_nothing_is_sent_until_they_are_back(
            broken_copy("device_client.joining.joiner", change)
        )


def test_names_that_came_by_file_since_do_not_keep_it_out() -> None:
    """The desk knows those that it has granted, and no others."""
    rig = DeskRig()
    device = JoiningDevice(rig)
    join(rig, device)
    rig.clock.time_s += 2 * PERIOD_S
    device.names.prepare(count=3, entropy=rig.office._entropy)
    by_file: list[bytes] = []
    rig.office.admitter.admit(
        device.names.prepare(entropy=os.urandom), now_s=NOW_S + 3 * PERIOD_S, deliver=by_file.append
    )
    device.names.install(by_file[0], aggregator_key=AGGREGATOR.public_key())
    assert len(device.names.installed()) == 6
    renew(rig, device)
    assert device.outcome == ""
    assert len(device.names.installed()) == 9


def test_a_renewal_from_software_that_proved_nothing_is_prepared_anew_once_it_was_refused() -> None:
    rig = DeskRig()
    device = JoiningDevice(
        rig,
        module=broken_copy("device_client.joining.joiner", ("Prepared(names, self._proof(names))", "Prepared(names)")),
    )
    join(rig, device)
    rig.clock.time_s += 2 * PERIOD_S
    renew(rig, device)
    state = device.joiner.state
    assert state is not None
    assert state.refusal is not None
    assert device.outcome == "refused"
    assert "bring the device's software up to date" in refusal_words(STUDY, state.refusal)
    assert state.membership is not None
    # As it was stored before names were kept.
    device.store.write(
        device.joiner._blob, encode_state(replace(state, membership=replace(state.membership, names=())))
    )
    device.module = joiner_module
    device.restart()
    device.joiner.ask_again()
    run(rig, device, until=lambda: not device.joiner.is_asking)
    assert device.outcome == ""
    assert len(device.names.installed()) == 6


def test_names_that_a_restored_desk_does_not_know_give_way_to_those_of_another_token() -> None:
    """The backup was made before they were granted, so nothing that is sent under them counts."""
    rig = DeskRig()
    device = JoiningDevice(rig)
    join(rig, device)
    with rig.office.store.database.reading() as connection:
        before = dict(connection.execute(select(schema.enrolments)).mappings().one())
    rig.clock.time_s += 2 * PERIOD_S
    renew(rig, device)
    lost = {one.id for one in device.names.installed()[3:]}
    rig.office.change(lambda c: c.execute(update(schema.enrolments).values(**before)))
    rig.clock.time_s += 2 * PERIOD_S
    device.names.forget_expired(rig.clock.time_s)
    renew(rig, device)
    assert device.outcome == "refused"
    current = device.names.current(rig.clock.time_s)
    assert isinstance(current, Pseudonym)
    assert current.id in lost
    join(rig, device, rig.token(days=365))
    current = device.names.current(rig.clock.time_s)
    assert isinstance(current, Pseudonym)
    assert current.id not in lost


def test_who_was_thrown_out_is_told_so_and_comes_back_when_it_is_restored() -> None:
    rig = DeskRig()
    device = JoiningDevice(rig)
    join(rig, device)
    rig.clock.time_s += 2 * PERIOD_S
    rig.office.change(lambda c: c.execute(update(schema.enrolments).values(state="quarantined", reason="a test")))
    renew(rig, device)
    state = device.joiner.state
    assert state is not None
    assert state.is_out
    assert state.refusal is not None
    assert "a test" in refusal_words(STUDY, state.refusal)
    assert len(device.names.installed()) == 3
    rig.office.change(lambda c: c.execute(update(schema.enrolments).values(state="active", reason="")))
    device.joiner.ask_again()
    run(rig, device, until=lambda: not device.joiner.is_asking)
    assert len(device.names.installed()) == 6


def test_who_was_thrown_out_for_good_joins_anew_and_its_old_names_give_way() -> None:
    rig = DeskRig()
    device = JoiningDevice(rig)
    join(rig, device)
    old = {one.id for one in device.names.installed()}
    rig.office.change(lambda c: c.execute(update(schema.enrolments).values(state="revoked", reason="lost")))
    rig.clock.time_s += PERIOD_S
    renew(rig, device)
    assert device.outcome == "revoked"
    join(rig, device, rig.token(days=60))
    assert device.outcome == ""
    current = device.names.current(rig.clock.time_s)
    assert isinstance(current, Pseudonym)
    assert current.id not in old


def test_a_request_by_file_that_is_open_is_not_thrown_away() -> None:
    rig = DeskRig()
    device = JoiningDevice(rig)
    device.names.prepare(count=2, entropy=rig.office._entropy)
    with pytest.raises(ConfigError, match="--anew"):
        device.joiner.open_claim(rig.claim, rig.token())
    assert device.names.waiting == 2
    join(rig, device, anew=True)
    assert len(device.names.installed()) == 3


def journey(module: ModuleType, *, cut_at: int | None, after: bool) -> int:
    """A device joins and renews, its power cut once; how many writes it made. It has all its names in the end."""
    rig = DeskRig()
    token, store = rig.token(), MemoryStore(cut_at=cut_at, cut_after=after)
    device = JoiningDevice(rig, store=store, module=module)
    for _ in range(400):
        try:
            state = device.joiner.state
            if state is None:
                device.joiner.open_claim(rig.claim, token)
            elif state.request is None and len(device.names.installed()) == 3:
                rig.clock.time_s = NOW_S + 2 * PERIOD_S
                device.joiner.open_renewal()
            device.step()
            rig.service.step()
        except PowerCutError:
            device.restart()
        rig.clock.time_s += 1.0
        if not device.joiner.is_asking and len(device.names.installed()) == 6:
            break
    state = device.joiner.state
    assert device.outcome == "", f"refused after a cut at write {cut_at}"
    assert len(device.names.installed()) == 6, f"names are missing after a cut at write {cut_at}"
    assert state is not None
    assert state.request is None
    with rig.office.store.database.reading() as connection:
        assert len(connection.execute(select(schema.enrolments.c.enrolment)).all()) == 1
    return len(store.operations)


def cut_at_every_write(module: ModuleType, *, after: bool) -> None:
    """Killed before or after each of its writes in turn."""
    writes = journey(module, cut_at=None, after=after)
    assert writes >= 14
    for cut_at in range(writes):
        journey(module, cut_at=cut_at, after=after)


def cut_after_every_write(module: Any) -> None:
    cut_at_every_write(module, after=True)


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_loses_no_name_and_no_token(after: bool) -> None:
    cut_at_every_write(joiner_module, after=after)


def check_a_full_disk_only_delays(session: Any) -> None:
    rig = DeskRig()
    device = JoiningDevice(rig, module=session)
    device.joiner.open_claim(rig.claim, rig.token())
    for full in (True, False, True):
        device.store.full = full
        for _ in range(6):
            device.step()
            rig.service.step()
            rig.clock.time_s += 1.0
    device.store.full = False
    run(rig, device, until=lambda: not device.joiner.is_asking)
    assert device.outcome == ""
    assert len(device.names.installed()) == 3


def test_a_full_disk_only_delays() -> None:
    check_a_full_disk_only_delays(joiner_module)


def check_a_bad_network_only_delays(session: Any) -> None:
    for number in range(8):
        rig = DeskRig(faults=PacketRates(drop=0.4, repeat=0.3, reorder=0.3, corrupt=0.5))
        device = JoiningDevice(rig, f"device {number}", module=session)
        join(rig, device)
        assert device.outcome == ""
        assert len(device.names.installed()) == 3


def test_messages_that_are_lost_repeated_reordered_or_damaged_only_delay() -> None:
    check_a_bad_network_only_delays(joiner_module)


def check_nothing_is_sent_before_it_is_kept(session: Any) -> None:
    """Whatever reaches the desk is in the device's store at that moment."""
    rig = DeskRig()
    device = JoiningDevice(rig, module=session)
    kept: list[bool] = []
    publish = rig.broker.publish

    def look(topic: str, payload: bytes, *, retain: bool) -> None:
        if topic.endswith("/request"):
            _, digest = opened_request(payload, DESK_KEY, tenant=TENANT, task=TASK, client=device.client)
            found = JoiningDevice(rig, "looker", store=device.store.after_restart()).joiner.state
            request = found.request if found is not None else None
            kept.append(request is not None and hashlib.sha256(request.signed).digest() == digest)
        publish(topic, payload, retain=retain)

    rig.broker.publish = look  # type: ignore[method-assign]
    join(rig, device)
    assert kept
    assert all(kept)


def test_nothing_is_sent_before_it_is_kept() -> None:
    check_nothing_is_sent_before_it_is_kept(joiner_module)


BROKEN_SESSIONS: list[tuple[Callable[[Any], None], tuple[str, str]]] = [
    (
        check_nothing_is_sent_before_it_is_kept,
        ("return [*actions, publish, Note(", "return [publish, *actions, Note("),
    ),
    (
        check_the_same_bytes_are_sent_again,
        (
            "self._client, self._sent_s = event.client, None",
            "self._client, self._sent_s, was = event.client, None, self.state.request\n"
            "        self.state = replace(self.state, request=replace(was, names=b''))",
        ),
    ),
    (check_it_asks_ever_more_rarely, ("SHORTEST_PAUSE_S * self._back_off.ended(now_s)", "SHORTEST_PAUSE_S")),
    (cut_after_every_write, ("if request.granted:", "if False:")),
    (
        check_a_bad_network_only_delays,
        (
            'return [Note("enrolment_answer_dropped", {"reason": self.dropped})]',
            'return self._stop("refused", self.dropped, now_s)',
        ),
    ),
    (
        check_only_the_aggregators_answer_counts,
        (
            "public_key_from_hex(claim.aggregator_key)",
            f"public_key_from_hex({public_key_hex(DESKS_OWN.public_key())!r})",
        ),
    ),
]


@pytest.mark.parametrize(("check", "change"), BROKEN_SESSIONS)
def test_a_session_that_does_not_hold_to_it_is_caught(check: Callable[[Any], None], change: tuple[str, str]) -> None:
    with pytest.raises(AssertionError):
        check(broken_joiner(change))
