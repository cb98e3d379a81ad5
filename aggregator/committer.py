"""Committing updates in batches: what is new is verified, opened and added up, and one transaction makes it count.

For a batch, in this order: the senders' keys are read and every signature is verified; what was accepted before is
looked up; what is left is placed, opened and added to this worker's sums; the sums are stored as blobs; then one
transaction locks the rounds (they must still be open), adds the updates' rows and points to the new sums. Only after
that does anybody learn of it. If another worker was quicker with an update, or a round closed meanwhile, nothing of the
batch has happened and all of it is looked at again.

A worker's sums are `aggregator.worker_sums`. Rules that need single updates get the sealed bytes kept instead, which
open only as long as the round's private key is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection

from aggregator.errors import BlobError, ConflictError
from aggregator.exact_sum import MOST_UPDATES
from aggregator.ingest import (
    OPENER,
    Masked,
    NotNowError,
    Opener,
    Placed,
    TaskInForce,
    Whole,
    open_masked,
    open_sealed,
    place,
    verify_header,
)
from aggregator.partial_sums import SumKey
from aggregator.store.aggregator_store import AggregatorStore, RefusalCounts
from aggregator.store.devices import find_devices
from aggregator.store.updates import (
    AcceptedUpdate,
    NewUpdate,
    StoredPartial,
    accepted_updates,
    devices_that_counted,
    devices_that_sent,
)
from aggregator.worker_sums import WorkerSum, WorkerSums
from fl_protocol.errors import RefusalReason, RefusedError
from fl_protocol.messages import UpdateHeaderMsg

_ATTEMPTS = 5
"""How often a batch is looked at again before it is left for later."""
_LATE_ROUNDS = 2
"""Only updates of so many rounds before the open one count as late: older ones say nothing of how many take part."""
_MOST_LATE = 100_000
"""Devices whose late updates are counted in one round; memory is bounded by it."""


QUARANTINED = "the study's operator has put this device aside; it keeps its update"
"""What a quarantined device is told."""


class PendingUpdate(NamedTuple):
    """An update that has come whole, nothing of it verified.

    Args:
        parts: of its envelope, in order.
    """

    device: str
    update_id: bytes
    parts: Sequence[bytes | memoryview]

    @property
    def num_bytes(self) -> int:
        """Length of its envelope."""
        return sum(map(len, self.parts))

    @property
    def envelope(self) -> bytes | memoryview:
        """Its envelope."""
        return self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)


class Accepted(NamedTuple):
    """It is committed: `update` says what a receipt says; `is_new` whether just now."""

    update: AcceptedUpdate
    is_new: bool
    bytes_up: int = 0


Verdict = Accepted | RefusedError | None
"""None for an update that nothing is said about: its device asks again."""


@dataclass
class _Batch:
    """What a batch will change."""

    verdicts: dict[int, Verdict] = field(default_factory=dict)
    rows: list[NewUpdate] = field(default_factory=list)
    sums: dict[SumKey, WorkerSum] = field(default_factory=dict)
    kept: dict[SumKey, list[tuple[int, bytes | memoryview]]] = field(default_factory=dict)
    same_as: dict[int, int] = field(default_factory=dict)
    taken: set[tuple[str, int, str]] = field(default_factory=set)
    counted: set[tuple[str, int, str]] = field(default_factory=set)
    unreadable: set[str] = field(default_factory=set)
    counted_by_all: dict[tuple[str, int], int] = field(default_factory=dict)
    late: dict[tuple[str, int], set[str]] = field(default_factory=dict)


class Committer:
    """See the module docstring.

    Args:
        tenant: name on the wire.
        worker: this worker's name, unique among those that share the database.
        store: the database and its blobs.
        entropy: cryptographic source of bytes.
        now_s: Unix seconds.
        opener: verifies headers and opens seals.
    """

    def __init__(
        self,
        *,
        tenant: str,
        worker: str,
        store: AggregatorStore,
        entropy: Callable[[int], bytes],
        now_s: Callable[[], float],
        opener: Opener = OPENER,
    ) -> None:
        self._tenant, self._worker, self._store, self._opener = tenant, worker, store, opener
        self._now_s = now_s
        self._sums = WorkerSums(worker, store, entropy)
        self._refused: RefusalCounts = Counter()
        self._late: dict[tuple[str, int], set[str]] = {}  # devices that were late while a round was open

    def count_refusal(self, task: str, reason: RefusalReason) -> None:
        """Count a refusal; it is stored with the next commit."""
        self._refused[task, reason.value] += 1

    def store_counts(self) -> None:
        """Store the refusals that were counted since the last commit. Raises DatabaseError."""
        if self._refused:
            with self._store.database.transaction() as connection:
                self._store.count_refusals(connection, self._refused)
            self._refused.clear()

    def commit(self, pending: Sequence[PendingUpdate], tasks: Callable[[], list[TaskInForce]]) -> list[Verdict]:
        """Decide about updates and make those that count durable.

        Args:
            pending: a batch.
            tasks: what is served, read anew at each attempt.

        Returns:
            What to tell each sender, in the order of `pending`.

        Raises:
            DatabaseError: nothing, or in rare cases everything, of the batch was committed; try again with the same.
        """
        for attempt in range(_ATTEMPTS):
            try:
                return self._attempt(pending, {task.name: task for task in tasks()})
            except ConflictError:
                self._sums.forget()
                if attempt == _ATTEMPTS - 1:
                    raise
            except BaseException:
                self._sums.forget()  # what is durable is in the database
                raise
        raise AssertionError

    def keep_only(self, open_rounds: set[tuple[str, int]]) -> None:
        """Forget the sums of rounds, (task, number), that are closed."""
        self._sums.keep_only(open_rounds)

    def _attempt(self, pending: Sequence[PendingUpdate], tasks: Mapping[str, TaskInForce]) -> list[Verdict]:
        """One attempt; see `commit`."""
        batch = _Batch()
        self._late = {key: late for key, late in self._late.items() if _may_be_open(key, tasks)}
        wholes = self._verified(pending, batch)
        fresh = self._fresh(wholes, tasks, batch)
        for index, (whole, placed) in fresh.items():
            self._add(index, whole, placed, batch)
        replaced = self._make_durable(batch, tasks)
        self._store.discard(replaced)
        for index, other in batch.same_as.items():
            same = batch.verdicts[other]
            batch.verdicts[index] = same._replace(is_new=False) if isinstance(same, Accepted) else same
        return [batch.verdicts[index] for index in range(len(pending))]

    def _verified(self, pending: Sequence[PendingUpdate], batch: _Batch) -> dict[int, Whole]:
        """Those whose header is signed by its device, registered as of now."""
        with self._store.database.reading() as connection:
            keys = find_devices(connection, {update.device for update in pending})
        wholes, now_s = {}, self._now_s()
        for index, update in enumerate(pending):
            key = keys.get(update.device)
            if key is None or not key.holds_at(now_s):
                detail = "not registered, or not its time"
                batch.verdicts[index] = RefusedError(RefusalReason.UNKNOWN_DEVICE, detail)
                continue
            if key.is_quarantined:
                batch.verdicts[index] = RefusedError(RefusalReason.QUARANTINED, QUARANTINED)
                continue
            try:
                wholes[index] = verify_header(
                    update.envelope,
                    tenant=self._tenant,
                    device=update.device,
                    device_key=Ed25519PublicKey.from_public_bytes(key.public_key),
                    update_id=update.update_id,
                    opener=self._opener,
                )
            except RefusedError as refusal:
                batch.verdicts[index] = refusal
        return wholes

    def _fresh(
        self, wholes: dict[int, Whole], tasks: Mapping[str, TaskInForce], batch: _Batch
    ) -> dict[int, tuple[Whole, Placed]]:
        """Those that were not accepted before and have a place."""
        headers = [whole.header for whole in wholes.values()]
        with self._store.database.reading() as connection:
            ids, of_tasks = {header.update_id for header in headers}, {header.task for header in headers}
            known = accepted_updates(connection, ids, tasks=of_tasks)
            batch.taken = devices_that_sent(connection, {(one.task, one.round, one.device) for one in headers})
        fresh: dict[int, tuple[Whole, Placed]] = {}
        seen: dict[tuple[str, bytes], int] = {}
        for index, whole in wholes.items():
            header = whole.header
            other = seen.setdefault((header.task, header.update_id), index)
            try:
                if (before := known.get((header.task, header.update_id))) is not None:
                    batch.verdicts[index] = _again(before, whole)
                elif other != index:
                    _check_same(wholes[other], whole)
                    batch.same_as[index] = other
                else:
                    fresh[index] = (whole, place(header, tasks))
            except RefusedError as refusal:
                self._note_late(header, refusal, tasks, batch)
                batch.verdicts[index] = refusal
            except NotNowError:
                batch.verdicts[index] = None
        with self._store.database.reading() as connection:
            places = {(whole.header.task, placed.counted_in, whole.header.device) for whole, placed in fresh.values()}
            batch.counted = devices_that_counted(connection, places)
            masked = {(placed.task.name, placed.counted_in) for _, placed in fresh.values() if placed.task.is_masked}
            batch.counted_by_all = {key: self._store.updates.counted(connection, *key) for key in masked}
        return fresh

    def _note_late(
        self, header: UpdateHeaderMsg, refusal: RefusedError, tasks: Mapping[str, TaskInForce], batch: _Batch
    ) -> None:
        """Note that a device was late for its round, once in each round that is open then: later rounds go by it."""
        task = tasks.get(header.task)
        if refusal.reason is not RefusalReason.ROUND_CLOSED or task is None or task.open_round is None:
            return
        # Security: or one device could pretend, with as many old updates as it likes, that many take part.
        key, recent = (task.name, task.open_round), header.round >= task.open_round - _LATE_ROUNDS
        before, now = self._late.get(key, set()), batch.late.get(key, set())
        if recent and header.device not in before and header.device not in now and len(before) + len(now) < _MOST_LATE:
            batch.late.setdefault(key, set()).add(header.device)

    def _add(self, index: int, whole: Whole, placed: Placed, batch: _Batch) -> None:
        """Open one update and add it up, or keep it."""
        header = whole.header
        sender, counting = (header.task, header.round, header.device), (header.task, placed.counted_in, header.device)
        try:
            if sender in batch.taken:
                detail = f"{header.device} already has an update in round {header.round}"
                raise RefusedError(RefusalReason.SECOND_UPDATE, detail)
            # Security: the minimum cohort that devices are promised is one of devices; the next round may count it.
            if counting in batch.counted or header.task in batch.unreadable:
                batch.verdicts[index] = None
                return
            opened = (
                open_masked(whole, placed) if placed.task.is_masked else open_sealed(whole, placed, opener=self._opener)
            )
            key = (placed.task.name, placed.counted_in, placed.round.number)
            mine = batch.sums.get(key) or self._sums.of(key, placed)
            elsewhere = max(0, batch.counted_by_all.get(key[:2], mine.num_stored) - mine.num_stored)
            if mine.sum.count + elsewhere >= _most_updates(placed):
                raise RefusedError(RefusalReason.ROUND_CLOSED, f"round {placed.counted_in} takes no more updates")
        except RefusedError as refusal:
            batch.verdicts[index] = refusal
            return
        except BlobError:
            # A sum that is lost or damaged is its own task's trouble: its coordinator meets it, other tasks go on.
            batch.unreadable.add(header.task)
            batch.verdicts[index] = None
            return
        batch.taken.add(sender)
        batch.counted.add(counting)
        batch.sums[key] = mine
        if isinstance(opened, Masked):
            batch.kept.setdefault(key, []).append((len(batch.rows), opened.entry))
            mine.sum.add_masked(opened.vector)
        elif placed.task.keeps_updates:
            batch.kept.setdefault(key, []).append((len(batch.rows), whole.sealed))
            mine.sum.count += 1
        else:
            mine.sum.add(opened)
        accepted = AcceptedUpdate(
            header.task, header.update_id, header.device, header.round, header.sealed_digest, self._now_s()
        )
        batch.rows.append(
            NewUpdate(
                header.task,
                header.update_id,
                header.round,
                placed.counted_in,
                header.device,
                header.sealed_digest,
                accepted.accepted_s,
                whole.bytes_up,
            )
        )
        batch.verdicts[index] = Accepted(accepted, is_new=True, bytes_up=whole.bytes_up)

    def _make_durable(self, batch: _Batch, tasks: Mapping[str, TaskInForce]) -> list[str]:
        """Store sums and kept updates, then commit everything; blobs that nothing names any more."""
        rows, replaced = list(batch.rows), []
        stored: dict[SumKey, StoredPartial] = {}
        before: dict[SumKey, int] = {}
        for key, mine in batch.sums.items():
            task, counted_in, made_for = key
            if kept := batch.kept.get(key):
                segment = self._store.blobs.put(b"".join(sealed for _, sealed in kept), kind="segment")
                start = 0
                for row, sealed in kept:
                    rows[row] = rows[row]._replace(segment=segment, start=start, length=len(sealed))
                    start += len(sealed)
            if not tasks[task].keeps_updates:
                before_it = self._sums.put(key, mine, tasks[task].rounds[counted_in].sums_secret)
                replaced += [before_it] if before_it else []
            stored[key] = StoredPartial(made_for, self._worker, mine.blob or "", mine.sum.count)
            before[key], mine.num_stored = mine.num_stored, mine.sum.count
        if rows or batch.late:
            with self._store.database.transaction() as connection:
                self._lock_rounds(connection, {key[:2] for key in stored}, batch)
                if rows:
                    self._store.updates.add(connection, rows)
                for key, partial in stored.items():
                    self._store.updates.put_partial(
                        connection, key[0], counted_in=key[1], partial=partial, num_before=before[key]
                    )
                    self._check_room(connection, key, tasks)
                self._store.rounds.count_late(connection, {key: len(late) for key, late in batch.late.items()})
                self._store.count_refusals(connection, self._refused)
            self._refused.clear()
            for round_key, late in batch.late.items():
                self._late.setdefault(round_key, set()).update(late)
        return replaced

    def _lock_rounds(self, connection: Connection, counting: Set[tuple[str, int]], batch: _Batch) -> None:
        """Keep rounds as they are until the commit, in one order for all workers. Raises ConflictError: one closed."""
        for key in sorted(counting | batch.late.keys()):
            # Of a round of masked updates all workers together take so many: nobody else may count meanwhile.
            alone = key in batch.late or key in batch.counted_by_all
            is_open = self._store.rounds.is_open(connection, *key, alone=alone)
            if not is_open and key in counting:
                raise ConflictError(f"round {key[1]} of {key[0]} was closed while updates were opened")

    def _check_room(self, connection: Connection, key: SumKey, tasks: Mapping[str, TaskInForce]) -> None:
        """Whether a round of masked updates has no more of them than its modulus holds, of all workers together.

        Raises:
            ConflictError: others were quicker; those that find room have to be chosen anew.
        """
        task, counted_in, made_for = key
        secure = tasks[task].rounds[made_for].secure
        if secure is None:
            return
        # Security: helpers answer no longer list, and a sum of more would wrap around.
        counted, most = self._store.updates.counted(connection, task, counted_in), secure.fixed_point.most_updates
        if counted > most:
            raise ConflictError(f"round {counted_in} of {task} takes {most} updates, and {counted} would be in it")


def _most_updates(placed: Placed) -> int:
    """How many updates a round takes: of all workers where they are masked, else of one."""
    secure = placed.round.secure
    return MOST_UPDATES if secure is None else min(MOST_UPDATES, secure.fixed_point.most_updates)


def _may_be_open(key: tuple[str, int], tasks: Mapping[str, TaskInForce]) -> bool:
    """Whether a round is open, or may be again: none of its task is."""
    task = tasks.get(key[0])
    return task is not None and task.open_round in (None, key[1])


def _again(before: AcceptedUpdate, whole: Whole) -> Verdict:
    """About an update id that is committed: another receipt for the very same bytes."""
    header = whole.header
    # Security: of this device too, or a copy of another's sealed bytes would get a receipt that is not true.
    if (before.device, before.sealed_digest) == (header.device, header.sealed_digest):
        return Accepted(before, is_new=False)
    raise RefusedError(RefusalReason.REPLAYED, "this update id was accepted with other content")


def _check_same(first: Whole, whole: Whole) -> None:
    """Refuse an update whose id another one in its batch has, unless it is that one again."""
    one, other = first.header, whole.header
    if (one.device, one.sealed_digest) != (other.device, other.sealed_digest):
        raise RefusedError(RefusalReason.REPLAYED, "this update id came with other content")
