"""The helper's daemon on a broker that does as it likes: one answer a round, durable before it is sent."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event

from aggregator.helper.answering import IgnoredError, Study
from aggregator.helper.service import HelperService
from firmware_sim.virtual_broker import VirtualBroker, VirtualTransport
from firmware_sim.virtual_flash import PowerCutError
from fl_protocol.limits import CHUNK_HEADER_BYTES, PACKET_RESERVE_BYTES
from fl_protocol.messages import ChunkMsg, RoundManifestMsg, encode
from fl_protocol.secagg.errors import UnmaskRefusal
from fl_protocol.secagg.messages import MaskSumMsg, UnmaskRefusalMsg
from fl_protocol.secagg.packing import unpack
from fl_protocol.secagg.parties import sum_of_masks, unmask
from fl_protocol.secagg.terms import secure_round
from fl_protocol.topics import helper_topic, helper_transfer_topic
from fl_protocol.transport import Received
from tests.aggregator.helper.helper_desk import (
    DEVICES,
    HELPER,
    OTHER,
    STUDY,
    TENANT,
    Desk,
    bodies_of,
    entries_of,
    read_reply,
    request_for,
    rounds_reply,
)
from tests.enrolments import broken_copy
from tests.fl_protocol.examples import round_key
from tests.fl_protocol.secagg.rounds import device_key, update_id


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def unmasked(manifest: RoundManifestMsg, answer: MaskSumMsg, devices: list[str]) -> np.ndarray:  # type: ignore[type-arg]
    """What the aggregator learns: the sum of the updates."""
    terms, bodies = secure_round(manifest), bodies_of(secure_round(manifest), devices)
    total = terms.masks.zeros()
    for body in bodies.values():
        total += unpack(body.masked, terms.fixed_point.length, terms.fixed_point.bits).astype(total.dtype)
    other = sum_of_masks(
        terms,
        entries_of(terms, devices, OTHER),
        helper=OTHER,
        key=round_key("x25519", seed=ord(OTHER[-1])),
        device_keys={device: device_key(device).public_key() for device in devices},
    )
    return unmask(terms, total, [answer, other], update_ids=[update_id(device) for device in devices])


def test_the_answer_unmasks_the_sum_of_the_list(desk: Desk) -> None:
    manifest = desk.manifest()
    answer = rounds_reply(desk.ask(request_for(manifest, DEVICES[:4])))
    assert isinstance(answer, MaskSumMsg)
    found = unmasked(manifest, answer, DEVICES[:4])
    assert 0 < float(np.linalg.norm(found)) < 4
    (told,) = desk.journal.named("unmask_answered")
    assert (told["updates"], told["round"], told["tenant"]) == (4, manifest.round, TENANT)


def test_a_second_list_is_refused_and_the_first_gets_the_same_bytes_for_ever(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    manifest = desk.manifest(terms={"helper_noise_sigma": 50.0, "bits": 24})
    first = desk.ask(request_for(manifest, DEVICES[:5]))
    for _ in range(2):
        refusal = rounds_reply(desk.ask(request_for(manifest, DEVICES[:4])))
        assert isinstance(refusal, UnmaskRefusalMsg)
        assert refusal.reason is UnmaskRefusal.SECOND_LIST
        assert desk.ask(request_for(manifest, DEVICES[:5])) == first
        desk.close()
        desk = Desk(tmp_path)
    # Its key may be long gone: what was answered was answered.
    desk.now_s += 20 * 86_400
    desk.settle()
    assert all(one.secret is None for one in desk.store.keys.all()[:-1])
    assert desk.ask(request_for(manifest, DEVICES[:5])) == first
    desk.now_s += 11 * 86_400
    desk.settle()
    late = rounds_reply(desk.ask(request_for(manifest, DEVICES[:5])))
    assert isinstance(late, UnmaskRefusalMsg)
    assert late.reason is UnmaskRefusal.SECOND_LIST
    assert "not kept any more" in late.detail


def test_a_refusal_is_kept_and_the_round_can_still_be_answered(desk: Desk) -> None:
    manifest = desk.manifest()
    refusal = rounds_reply(desk.ask(request_for(manifest, DEVICES[:2])))
    assert isinstance(refusal, UnmaskRefusalMsg)
    assert refusal.reason is UnmaskRefusal.TOO_FEW
    (kept,) = desk.store.refusals.all()
    assert (kept.reason, kept.round, kept.detail) == ("too_few", manifest.round, refusal.detail)
    assert isinstance(rounds_reply(desk.ask(request_for(manifest, DEVICES[:3]))), MaskSumMsg)


# Killed at any instruction.


class Cut(VirtualTransport):
    """Power is cut at the n-th message that is sent after `left` was set."""

    left = -1

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            raise PowerCutError
        super().publish(topic, payload, retain=retain, expires_s=expires_s)


@contextmanager
def cut_at_statement(desk: Desk, number: int) -> Any:
    """The helper loses power at its n-th SQL statement, or at the commit after it, from now on."""
    left = itertools.count(1)

    def before(*_arguments: object) -> None:
        if next(left) == number:
            raise PowerCutError

    engine = desk.store.database.engine
    for name in ("before_cursor_execute", "commit"):
        event.listen(engine, name, before)
    try:
        yield
    finally:
        for name in ("before_cursor_execute", "commit"):
            event.remove(engine, name, before)


def after_power_cut(folder: Path, desk: Desk, **changes: Any) -> Desk:
    """The same store and broker, a new process."""
    desk.transport.drop("power cut")
    desk.store.close()
    return Desk(folder, broker=desk.broker, **changes)


def test_killed_at_any_statement_a_helper_answers_no_second_list(tmp_path: Path) -> None:
    cuts = 0
    for number in range(1, 60):
        folder = tmp_path / str(number)
        folder.mkdir()
        desk = Desk(folder)
        manifest = desk.manifest(terms={"helper_noise_sigma": 50.0, "bits": 24})
        with cut_at_statement(desk, number):
            desk.post(request_for(manifest, DEVICES[:5]))
            try:
                desk.settle()
            except PowerCutError:
                cuts += 1
            else:
                assert desk.hear()
                break
        sent = desk.hear()
        assert not sent, "it was cut, and had sent something"
        desk = after_power_cut(folder, desk)
        desk.hear()
        was_answered = desk.store.answers.find(TENANT, manifest.task, manifest.round) is not None
        first = desk.ask(request_for(manifest, DEVICES[:5]))
        assert isinstance(rounds_reply(first), MaskSumMsg)
        assert desk.ask(request_for(manifest, DEVICES[:5])) == first
        assert len(desk.journal.named("unmask_repeated")) == 1 + was_answered
        assert isinstance(rounds_reply(desk.ask(request_for(manifest, DEVICES[:4]))), UnmaskRefusalMsg)
        desk.store.answers.check(desk.service._helper.identity.public_key())
        desk.close()
    assert cuts >= 8


def check_killed_while_sending(folder: Path, kind: Callable[..., HelperService], at: int = 2) -> None:
    """None or part of the answer is out when power is cut: what is sent then is the same, and there is no other."""
    desk = Desk(folder, kind=kind, transport=Cut, maximum_packet_bytes=PACKET_RESERVE_BYTES + CHUNK_HEADER_BYTES + 256)
    manifest = desk.manifest(num_parameters=400, terms={"helper_noise_sigma": 50.0, "bits": 24})
    assert isinstance(desk.transport, Cut)
    desk.transport.left = at
    desk.post(request_for(manifest, DEVICES[:5]))
    with pytest.raises(PowerCutError):
        desk.settle()
    assert not desk.hear()
    begun = {one.topic for one in desk.heard if "/answer/" in one.topic}
    assert len(begun) == at - 1
    desk = after_power_cut(folder, desk)
    refusal = rounds_reply(desk.ask(request_for(manifest, DEVICES[:4])))
    assert isinstance(refusal, UnmaskRefusalMsg)
    assert isinstance(rounds_reply(desk.ask(request_for(manifest, DEVICES[:5]))), MaskSumMsg)
    assert begun <= {one.topic for one in desk.heard}, "another answer"


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_answer_that_was_cut_short_is_sent_again_the_same(tmp_path: Path, at: int) -> None:
    check_killed_while_sending(tmp_path, HelperService, at)


def test_a_helper_that_sends_before_it_is_durable_is_caught(tmp_path: Path) -> None:
    hasty = broken_copy(
        "aggregator.helper.answerer",
        (
            "chain = self._store.answers.add(record, answer, self._helper.identity)",
            "chain = b''; self.later = lambda: self._store.answers.add(record, answer, self._helper.identity)",
        ),
    )
    service = broken_copy(
        "aggregator.helper.service",
        ("from aggregator.helper.answerer import Answerer", f"from {hasty.__name__} import Answerer"),
    )
    with pytest.raises(AssertionError):
        check_killed_while_sending(tmp_path, service.HelperService)


def check_a_full_disk_answers_nothing(folder: Path, kind: Callable[..., HelperService]) -> None:
    desk = Desk(folder, kind=kind)
    manifest = desk.manifest(num_parameters=30_000)
    with desk.store.database.engine.connect() as connection:
        raw = connection.connection.cursor()
        raw.execute("PRAGMA page_count")
        (pages,) = raw.fetchone() or (0,)
        raw.execute(f"PRAGMA max_page_count={pages}")
    assert desk.ask(request_for(manifest, DEVICES[:4])) == []
    (told,) = desk.journal.named("degraded")
    assert "full" in told["reason"]
    assert desk.ask(request_for(manifest, DEVICES[:3])) == []
    with desk.store.database.engine.connect() as connection:
        connection.connection.cursor().execute("PRAGMA max_page_count=1000000")
    assert isinstance(rounds_reply(desk.ask(request_for(manifest, DEVICES[:4]))), MaskSumMsg)
    assert desk.journal.named("recovered")


def test_on_a_full_disk_nothing_is_answered_and_the_journal_says_why(tmp_path: Path) -> None:
    check_a_full_disk_answers_nothing(tmp_path, HelperService)


def test_a_helper_that_answers_what_it_could_not_keep_is_caught(tmp_path: Path) -> None:
    careless = broken_copy(
        "aggregator.helper.answerer",
        (
            "        chain = self._store.answers.add(record, answer, self._helper.identity)\n",
            "        try:\n            chain = self._store.answers.add(record, answer, self._helper.identity)\n"
            "        except Exception:\n            chain = b''\n",
        ),
    )
    service = broken_copy(
        "aggregator.helper.service",
        ("from aggregator.helper.answerer import Answerer", f"from {careless.__name__} import Answerer"),
    )
    with pytest.raises(AssertionError):
        check_a_full_disk_answers_nothing(tmp_path, service.HelperService)


# A broker that does as it likes.


def test_chunks_may_come_in_any_order_repeated_and_two_requests_at_once(desk: Desk) -> None:
    manifests = [desk.manifest(round=number) for number in (5, 6)]
    chunks: list[tuple[str, bytes]] = []

    def keep(topic: str, payload: bytes, *, retain: bool) -> None:
        assert not retain
        chunks.append((topic, payload))

    really, desk.broker.publish = desk.broker.publish, keep  # type: ignore[method-assign]
    for manifest in manifests:
        desk.post(request_for(manifest, DEVICES[:5]), data_bytes=300)
    desk.broker.publish = really  # type: ignore[method-assign]
    assert len(chunks) > 20
    order = np.random.default_rng(1).permutation(len(chunks))
    for topic, payload in [chunks[place] for place in [*order[:5], *order]]:
        desk.broker.publish(topic, payload, retain=False)
        desk.service.step()
    found = [read_reply(one) for one in desk.hear()]
    assert sorted(one.round for one in found) == [5, 6]
    assert all(isinstance(one, MaskSumMsg) for one in found)


def test_garbage_on_any_topic_changes_nothing(desk: Desk) -> None:
    noise = np.random.default_rng(2)
    chunk = ChunkMsg(transfer_id=bytes(16), index=0, count=1, total_bytes=3, digest=bytes(32), data=b"abc")
    transfer = helper_transfer_topic(TENANT, HELPER, "request", bytes(16), 0)
    topics = [transfer, helper_transfer_topic(TENANT, HELPER, "request", bytes(16), 9), transfer[:-1] + "x"]
    for topic in topics:
        for payload in (b"", b"\x80", noise.bytes(2000), encode(chunk)):
            desk.transport.deliver(topic, payload)
    for topic in (helper_topic(TENANT, HELPER, "key"), "", "fl/v1/clinic/helper/helper-b/request/" + "0" * 32 + "/0"):
        desk.transport._events.append(Received(topic, encode(chunk)))
    desk.post(noise.bytes(5000))
    assert desk.ask(noise.bytes(600)) == []
    assert desk.store.refusals.all() == []
    # One line of each kind, the rest is counted: or anybody could fill the journal.
    told = [one["reason"] for one in desk.journal.named("request_ignored")]
    assert 1 <= len(told) <= 4
    desk.now_s += 61
    desk.settle()
    assert sum(1 + one.get("repeated", 0) for one in desk.journal.named("request_ignored")) >= 12
    assert isinstance(rounds_reply(desk.ask(request_for(desk.manifest(), DEVICES[:3]))), MaskSumMsg)


def test_half_a_request_is_forgotten_after_a_while(desk: Desk) -> None:
    data = request_for(desk.manifest(), DEVICES[:5])
    desk.post(data, order=lambda chunks: chunks[1:])
    desk.settle()
    desk.now_s += 700
    desk.settle()
    assert desk.ask(data, order=lambda chunks: chunks[:1]) == []
    assert isinstance(rounds_reply(desk.ask(data, order=lambda chunks: chunks[1:])), MaskSumMsg)


def test_answers_are_cut_to_what_the_broker_takes(tmp_path: Path) -> None:
    most = PACKET_RESERVE_BYTES + CHUNK_HEADER_BYTES + 300
    desk = Desk(tmp_path, maximum_packet_bytes=most)
    answer = rounds_reply(desk.ask(request_for(desk.manifest(num_parameters=3000), DEVICES[:3])))
    assert isinstance(answer, MaskSumMsg)
    answers = [one for one in desk.heard if "/answer/" in one.topic]
    assert len(answers) > 20
    assert max(len(one.payload) for one in answers) <= most - PACKET_RESERVE_BYTES


def test_a_broker_that_lost_everything_has_the_key_again_and_brings_requests(desk: Desk) -> None:
    key = desk.key()
    desk.broker.restart(keep_retained=False)
    desk.settle()
    assert desk.key() == key
    assert [one["event"] for one in desk.journal.told if one["event"] == "disconnected"]
    for topic_filter in ("fl/v1/clinic/helper/+/refusal", "fl/v1/clinic/helper/+/answer/+/+"):
        desk.ears.subscribe(topic_filter)
    assert isinstance(rounds_reply(desk.ask(request_for(desk.manifest(), DEVICES[:3]))), MaskSumMsg)


def test_a_helper_starts_while_its_broker_is_away(tmp_path: Path) -> None:
    class Away(VirtualTransport):
        def open(self) -> None:
            if not hasattr(self, "tried"):
                self.tried = True
                return
            super().open()

    desk = Desk(tmp_path, transport=Away)
    assert desk.broker.retained == {}
    desk.transport.open()
    desk.settle()
    assert isinstance(rounds_reply(desk.ask(request_for(desk.manifest(), DEVICES[:3]))), MaskSumMsg)


def test_every_study_has_its_own_broker_aggregator_and_register(tmp_path: Path) -> None:
    other = Ed25519PrivateKey.from_private_bytes(b"\x08" * 32)
    desk = Desk(tmp_path)
    desk.close()
    brokers = {TENANT: desk.broker, "hospital": VirtualBroker()}
    transports = {tenant: VirtualTransport(broker) for tenant, broker in brokers.items()}
    desk = Desk(
        tmp_path, broker=desk.broker, transports=transports, studies=[STUDY, Study("hospital", other.public_key())]
    )
    assert brokers["hospital"].retained == {helper_topic("hospital", HELPER, "key"): desk.key()}
    manifest = desk.manifest(tenant="hospital", round=5)
    theirs = request_for(manifest, DEVICES[:3], key=other, manifest_key=other)
    answer = desk.service.answerer.answer

    def reason_of(tenant: str, data: bytes) -> UnmaskRefusal:
        told = read_reply(answer(tenant, data).data)
        assert isinstance(told, UnmaskRefusalMsg)
        return told.reason

    assert reason_of("hospital", theirs) is UnmaskRefusal.UNSIGNED  # its register is empty
    desk.store.devices.add_all(
        "hospital", [(device, device_key(device).public_key().public_bytes_raw()) for device in DEVICES]
    )
    assert answer("hospital", theirs).is_answer
    assert answer(TENANT, request_for(desk.manifest(round=5), DEVICES[:3])).is_answer  # the same task and round
    for tenant in (TENANT, "nobody"):
        with pytest.raises(IgnoredError):
            answer(tenant, theirs)
    # An aggregator cannot have another study's round answered.
    foreign = request_for(desk.manifest(round=6), DEVICES[:3], key=other, manifest_key=other)
    assert reason_of("hospital", foreign) is UnmaskRefusal.BAD_MANIFEST
