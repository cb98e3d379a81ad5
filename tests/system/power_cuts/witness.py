"""Watches a device from the outside and writes down each broken promise: on the wire, on the medium, in its answers.

It is told of what happened in the moment it happens, and looks at what is durable in that moment. It knows the formats
(`medium`), and none of the device's reasons.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from device_client.device import Device
from device_client.ports import Float32
from fl_protocol.errors import ProtocolError, RefusalReason
from fl_protocol.messages import ChunkMsg, NackMsg, ReceiptMsg, SignedMsg, UpdateHeaderMsg, decode
from fl_protocol.topics import parse_upload_topic
from tests.system.power_cuts.counterpart import OpenedRound
from tests.system.power_cuts.medium import Medium, UnreadableError, study_blob

Promise = Literal["budget", "one update", "not lost", "store", "records", "coin", "kept", "consent"]
ALL_PROMISES: frozenset[Promise] = frozenset(get_args(Promise))

_GRACE_S = 3600.0
_FINAL = set(RefusalReason) - {
    RefusalReason.TRUNCATED,
    RefusalReason.MALFORMED,
    RefusalReason.OVERSIZED,
    RefusalReason.BAD_SIGNATURE,
    RefusalReason.UNSEALABLE,
}


@dataclass(frozen=True)
class Fault:
    """A broken promise."""

    promise: Promise
    text: str


@dataclass
class SeenUpdate:
    """A sealed update that was on the medium or on the wire.

    Args:
        digest: SHA-256 of the whole envelope.
        deadline_s: of its round.
        ended: why it may be gone from the outbox; empty while it has to be there.
    """

    round: int
    digest: bytes
    deadline_s: float
    was_sent: bool = False
    ended: set[str] = field(default_factory=set)


@dataclass
class StoredRecord:
    """A record that was handed to the device: whether it said that it is stored, and when that was."""

    number: int
    at_s: float
    is_acknowledged: bool = False
    side: str = ""


@dataclass
class Witness:
    """See the module docstring.

    Args:
        durable: what is sure to be on the flash if the power goes now, by file.
        visible: what a process finds there.
        rounds: as they were announced.
        maximum_count, maximum_age_s: of records.
        counts_records: whether each round begins with a count that is charged.
        watches: promises whose breach is written down.
    """

    study: str
    store_key: bytes
    durable: Callable[[], dict[str, bytes]]
    visible: Callable[[], dict[str, bytes]]
    rounds: dict[int, OpenedRound]
    maximum_count: int
    maximum_age_s: float
    counts_records: bool = False
    watches: frozenset[Promise] = ALL_PROMISES
    faults: list[Fault] = field(default_factory=list)
    updates: dict[str, SeenUpdate] = field(default_factory=dict)
    accepted: dict[int, str] = field(default_factory=dict)
    records: list[StoredRecord] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    under_a_wrong_clock_s: float = 0.0
    _lines: set[str] = field(default_factory=set)
    _lines_before_boot: set[str] = field(default_factory=set)
    _sent_for: dict[int, str] = field(default_factory=dict)
    _epsilon: float = 0.0
    _latest_clock_s: float = 0.0
    _session: dict[str, Any] = field(default_factory=dict)
    _counting: int = 0
    _given_up: set[int] = field(default_factory=set)
    _kept: dict[str, set[bytes | None]] = field(default_factory=dict)
    _consent: Literal["given", "unsure", "withdrawn"] = "given"
    _is_erasing: bool = False
    _device: Device | None = None

    def fault(self, promise: Promise, text: str) -> None:
        """Write a broken promise down, if it is one that is watched."""
        if promise in self.watches:
            self.faults.append(Fault(promise, text))

    # What goes over the air.

    def sent(self, topic: str, payload: bytes) -> None:
        """The broker gets a message of the device's."""
        try:
            update_id = parse_upload_topic(topic).update_id.hex()
        except ProtocolError:
            return
        self.seen["chunks sent"] += 1
        medium, chunk = self._medium(), decode(payload, ChunkMsg)
        releases = [line for line in medium.ledger() if line["kind"] == "release" and line["update_id"] == update_id]
        if len(releases) != 1:
            self.fault("budget", f"update {update_id} is sent, and {len(releases)} durable lines say that it is")
            return
        number = int(releases[0]["round"])
        self._check_is_charged(medium, number, f"update {update_id} of round {number} is sent")
        entry = medium.outbox().get(update_id)
        if entry is None or entry["type"] != "sealed":
            self.fault("not lost", f"update {update_id} of round {number} is sent and not durably in the outbox")
        else:
            start = chunk.index * chunk.cut_bytes
            if hashlib.sha256(entry["envelope"]).digest() != chunk.digest or (
                entry["envelope"][start : start + len(chunk.data)] != chunk.data
            ):
                self.fault("one update", f"update {update_id} of round {number}: other bytes are sent than are kept")
        known = self.updates.setdefault(update_id, SeenUpdate(number, chunk.digest, self._deadline_s(number)))
        if (known.round, known.digest) != (number, chunk.digest):
            self.fault("one update", f"update {update_id} is sent with other bytes than before")
        if self._sent_for.setdefault(number, update_id) != update_id:
            self.fault("one update", f"round {number} has two updates: {self._sent_for[number]} and {update_id}")
        if self._consent == "withdrawn" or "withdrawn" in known.ended:
            self.fault("consent", f"update {update_id} of round {number} is sent after the consent was withdrawn")
        if "erased" in known.ended and not self._is_erasing:
            self.fault("consent", f"update {update_id} of round {number} is sent after the data were erased")
        if known.was_sent:
            self.seen["chunks sent again"] += 1
        else:
            self.seen["updates sent"] += 1
            self._look_at_epsilon()
        known.was_sent = True

    def asked_for(self, topic_filter: str) -> None:
        """The device asks for a topic; for a model's chunks that shows that it takes part."""
        for number, opened in self.rounds.items():
            if any(f"/model/{digest.hex()}/" in topic_filter for digest in opened.digests):
                if number in self._given_up:
                    self.fault("coin", f"round {number} is taken part in, though it was decided not to")
                if self.counts_records and not self._charges(self._medium(), number, "count"):
                    self.fault("budget", f"round {number} is taken part in by a count that is not charged")

    def answered(self, topic: str, payload: bytes) -> None:
        """The aggregator made an answer: from now on the update may be gone."""
        signed = decode(payload, SignedMsg)
        if topic.endswith("/receipt"):
            receipt = decode(signed.payload, ReceiptMsg)
            self._end(receipt.update_id, "receipted")
            return
        nack = decode(signed.payload, NackMsg)
        self.seen[f"NACK {nack.reason.value}"] += 1
        if nack.reason in _FINAL:
            self._end(nack.update_id, f"refused: {nack.reason.value}")

    def took(self, header: UpdateHeaderMsg, values: Float32) -> None:
        """The aggregator committed an update."""
        del values
        self.seen["updates accepted"] += 1
        update_id = header.update_id.hex()
        if self.accepted.setdefault(header.round, update_id) != update_id:
            self.fault("one update", f"round {header.round} has two decrypted updates")

    # What the device computes and keeps.

    def computes(self, params: Float32) -> None:
        """A gradient is about to be computed; the first of a round starts from the round's model."""
        number = next((n for n, one in self.rounds.items() if np.array_equal(params[: len(one.params)], one.params)), 0)
        if not number:
            self.seen["later steps"] += 1
            return
        self.seen["first steps"] += 1
        self._check_is_charged(self._medium(), number, f"round {number} is trained")
        if number in self._sent_for:
            self.fault("one update", f"round {number} is trained again after its update was sent")

    def keeps(self, name: str, data: bytes) -> None:
        """The device writes a blob."""
        folder = name.partition("/")[0]
        if folder in ("personal", "control"):
            self._kept.setdefault(name, {None}).add(data)
        elif folder == "session":
            self._check_session(msgspec.msgpack.decode(data))

    def clock_says(self, now_s: float) -> None:
        """What the device takes for the time."""
        self._latest_clock_s = max(self._latest_clock_s, now_s)

    # What the wearer does.

    def offers(self, number: int, at_s: float) -> None:
        """A record is handed over."""
        self.records.append(StoredRecord(number, at_s))

    def acknowledged(self) -> None:
        """The last one handed over is stored, the device says."""
        self.records[-1].is_acknowledged = True

    def refused(self) -> None:
        """The last one handed over is not stored, the device says."""
        self.records.pop()

    def withdraws(self) -> None:
        """The wearer begins to withdraw consent."""
        self._learn_updates(self._medium())
        self._consent = "unsure"

    def withdrew(self) -> None:
        """The device said that it is done."""
        self._consent = "withdrawn"
        for update in self.updates.values():
            update.ended.add("withdrawn")

    def grants(self) -> None:
        """The wearer begins to grant it again."""
        self._consent = "given"

    def erases(self) -> None:
        """The wearer begins to erase the data."""
        self._learn_updates(self._medium())
        self._is_erasing = True

    def erased(self) -> None:
        """The device said that it is done."""
        self._is_erasing = False
        self.records.clear()
        self._kept.clear()
        for update in self.updates.values():
            update.ended.add("erased")

    # What is there after a cut.

    def before_boot(self) -> None:
        """Look at the medium that the next life begins with."""
        # Also at what is not durable: a process that was killed may have left it in the system's memory.
        medium, self._device, self._counting = Medium(self.visible(), self.store_key), None, 0
        self._lines_before_boot = _line_names(medium)
        try:
            self._check_ledger(medium)
            self._check_outbox(medium)
            self._check_kept(medium)
        except UnreadableError as error:
            self.fault("store", str(error))

    def booted(self, device: Device) -> None:
        """The device has started; what it has found is durable, and has to stay."""
        medium, self._device = self._medium(), device
        self._look_at_epsilon()
        self._check_records(device)
        try:
            self._lines = _line_names(medium)
            if lost := self._lines_before_boot - self._lines:
                self.fault("budget", f"starting took {len(lost)} lines from the ledger")
            self._learn_updates(medium)
            self.seen.update(f"boots with {entry['type']}" for entry in medium.outbox().values())
            if not self._is_erasing:
                self._kept = {name: {medium.blob(name)} for name in self._kept_names()}
            consent = medium.of_study("consent", self.study)
            session = medium.of_study("session", self.study)
        except UnreadableError as error:
            self.fault("store", str(error))
            return
        if self._consent == "unsure" and consent is not None and consent["withdrawn_s"] is not None:
            self.withdrew()
        if session is not None:
            self._session, number = session, session["decided_round"]
            if number and session["willing_round"] != number and not self._charges(medium, number, "update"):
                self._given_up.add(number)

    def after_turn(self, device: Device) -> None:
        """A yes of the coin that was kept is not forgotten."""
        number = self._session.get("willing_round", 0)
        for runner in device.studies.running if number else ():
            doing = runner.session.view().doing
            if doing.startswith(f"not in round {number}:"):
                self.fault("coin", f"it was decided to take part in round {number}, and the device says: {doing}")

    def at_the_end(self, device: Device) -> None:
        """All was quiet for a while: nothing is left, and nothing was lost."""
        self._check_records(device)
        for pending in device.outbox:
            self.fault("not lost", f"update {pending.update_id.hex()} of round {pending.round} was never delivered")
        for update_id, update in self.updates.items():
            if not self._has_ended(update):
                self.fault("not lost", f"update {update_id} of round {update.round} is gone without an answer")
        for number, update_id in self._sent_for.items():
            if "receipted" in self.updates[update_id].ended and self.accepted.get(number) != update_id:
                self.fault("not lost", f"update {update_id} has a receipt and is not in the database")

    def _check_ledger(self, medium: Medium) -> None:
        """No line is lost, none there twice, and each update that was sent was paid for."""
        lines = medium.ledger()
        if lost := self._lines - _line_names(medium):
            self.fault("budget", f"the ledger lost {len(lost)} lines")
        for kind in ("reservation", "release"):
            keys = [(line["task"], line["round"], line.get("purpose")) for line in lines if line["kind"] == kind]
            if len(keys) != len(set(keys)):
                self.fault("budget", f"the ledger has two {kind} lines for one round")
        charged: Counter[tuple[float, float]] = Counter()
        for line in lines:
            if line["kind"] == "reservation" and line["purpose"] == "update":
                charged[line["sampling_rate"], line["noise_multiplier"]] += line["steps"]
        published: Counter[tuple[float, float]] = Counter()
        for number in self._sent_for:
            plan = self.rounds[number].manifest.plan
            published[plan.sampling_rate, plan.noise_multiplier] += plan.local_steps
        if published - charged:
            self.fault("budget", f"noisy steps that were sent and not charged: {dict(published - charged)}")

    def _check_outbox(self, medium: Medium) -> None:
        """What waits for its receipt is there, as it was."""
        if self._is_erasing and "store/.data-key" not in medium.files:
            for update in self.updates.values():
                update.ended.add("erased")
        entries = medium.outbox()
        for update_id, entry in entries.items():
            known = self.updates.get(update_id)
            if entry["type"] == "sealed" and known is not None:
                digest = hashlib.sha256(entry["envelope"]).digest()
                if (known.round, known.digest) != (entry["round"], digest):
                    self.fault("one update", f"update {update_id} is kept with other bytes than before")
        for update_id, update in self.updates.items():
            if entries.get(update_id, {}).get("type") != "sealed" and not self._has_ended(update):
                self.fault("not lost", f"update {update_id} of round {update.round} is not in the outbox any more")

    def _check_kept(self, medium: Medium) -> None:
        """Personal layers and control variates are as they were kept at some time."""
        for name in self._kept_names():
            value, known = medium.blob(name), self._kept.setdefault(name, {None})
            if value not in known and not (value is None and self._is_erasing):
                self.fault("kept", f"{name} has a value that was never kept")

    def _learn_updates(self, medium: Medium) -> None:
        """What waits for its receipt, whether or not it was ever sent, has to stay until it has one."""
        for update_id, entry in medium.outbox().items():
            if entry["type"] == "sealed":
                digest = hashlib.sha256(entry["envelope"]).digest()
                self.updates.setdefault(update_id, SeenUpdate(entry["round"], digest, entry["deadline_s"]))

    def _kept_names(self) -> list[str]:
        """Blobs that hold what this device keeps to itself."""
        return [study_blob(kind, self.study) for kind in ("personal", "control")]

    def _check_records(self, device: Device) -> None:
        """Each record that was acknowledged is there once, within the limits, on the side it was on."""
        found = [(int(row), side) for side, rows in _sides(device) for row in rows]
        present = {number for number, _ in found}
        if len(present) != len(found):
            self.fault("records", f"{len(found) - len(present)} records are there twice")
        if self._is_erasing and not present:
            self.records.clear()
        self.records = [one for one in self.records if one.is_acknowledged or one.number in present]
        if unknown := present - {one.number for one in self.records}:
            self.fault("records", f"records that should not be there: {sorted(unknown)[:5]}")
        self._check_retention(present)
        sides = dict(found)
        for one in self.records:
            one.is_acknowledged = True
            side = sides.get(one.number, one.side)
            if one.side and side != one.side:
                self.fault("records", f"record {one.number} changed from {one.side} to {side}")
            one.side = side

    def _check_retention(self, present: set[int]) -> None:
        """Of the newest `maximum_count` none is missing that is young enough, and no older one is there."""
        newest = self.records[-self.maximum_count :]
        # Time under a clock that stands in 1970 is counted once as it passes, and again when the clock is set.
        oldest_s = self._latest_clock_s - self.maximum_age_s + self.under_a_wrong_clock_s
        missing = [one for one in newest if one.number not in present and one.at_s > oldest_s]
        if missing:
            self.fault("records", f"{len(missing)} acknowledged records are gone: {missing[:3]}")
        if len(self.records) > len(newest) and present & {one.number for one in self.records[: -self.maximum_count]}:
            self.fault("records", "records beyond the limit are there")

    def _check_session(self, now: dict[str, Any]) -> None:
        """A coin is tossed once a round, and its yes is given up for a reason only."""
        before, self._session = self._session, now
        if not before or self._device is None:
            return
        number = before["decided_round"]
        if now["decided_round"] < number:
            self.fault("coin", f"the decision about round {number} is forgotten")
        if now["decided_round"] != number:
            return
        if now["counted_round"] != before["counted_round"]:
            self._counting = number  # until its outcome the round is left out
        if now["willing_round"] not in (before["willing_round"], 0) and self._counting != number:
            self.fault("coin", f"round {number} was decided twice")
        if before["willing_round"] and not now["willing_round"]:
            over = self._latest_clock_s >= self._deadline_s(number)
            began = now["participated_s"] != before["participated_s"]
            if not (over or began or self._counting == number):
                self.fault("coin", f"the decision to take part in round {number} is given up without a reason")

    def _look_at_epsilon(self) -> None:
        """What the device says is spent never becomes less."""
        if self._device is None:
            return
        epsilon = self._device.ledger.spent_epsilon_ever
        if epsilon < self._epsilon:
            self.fault("budget", f"epsilon fell from {self._epsilon} to {epsilon}")
        self._epsilon = epsilon

    def _check_is_charged(self, medium: Medium, number: int, what: str) -> None:
        """Whether a round is durably charged, for the plan that was announced."""
        charges, plan = self._charges(medium, number, "update"), self.rounds[number].manifest.plan
        expected = [(plan.sampling_rate, plan.noise_multiplier, plan.local_steps)]
        if [(one["sampling_rate"], one["noise_multiplier"], one["steps"]) for one in charges] != expected:
            self.fault("budget", f"{what}; charged for it are {charges}")

    def _charges(self, medium: Medium, number: int, purpose: str) -> list[dict[str, Any]]:
        """Durable lines that charge for a round."""
        lines = [line for line in medium.ledger() if line["kind"] == "reservation"]
        return [one for one in lines if (one["task"], one["round"], one["purpose"]) == (self.study, number, purpose)]

    def _has_ended(self, update: SeenUpdate) -> bool:
        """Whether an update may be gone."""
        is_expired = self._latest_clock_s > update.deadline_s + _GRACE_S
        return bool(update.ended) or self._consent != "given" or self._is_erasing or is_expired

    def _end(self, update_id: bytes, why: str) -> None:
        """An update may be gone from now on."""
        known = self.updates.get(update_id.hex())
        if known is None:
            self.fault("one update", f"an answer to an update that was never seen: {update_id.hex()}")
        else:
            known.ended.add(why)

    def _deadline_s(self, number: int) -> float:
        return self.rounds[number].manifest.deadline_s

    def _medium(self) -> Medium:
        return Medium(self.durable(), self.store_key)


def _line_names(medium: Medium) -> set[str]:
    """What tells the ledger's lines apart."""
    return {line["previous"] + line["kind"] + str(line.get("round")) for line in medium.ledger()}


def _sides(device: Device) -> list[tuple[str, Float32]]:
    """The numbers of the records that the device would train on, and of those it holds out."""
    stream = device.streams["default"]
    parts = (("training", stream.training()), ("held out", stream.held_out()))
    return [(side, np.array([one.flat[0] for one in records.x])) for side, records in parts]
