"""The outbox: one entry a participation, from before it is charged until its receipt. Durable; bounded.

An entry is `Work` until the update is sealed and `PendingUpdate` from then on, under one name that is replaced in one
atomic write. So after a power cut there is work to go on with or an update to send, never both: a second update with
other noise cannot come from one charge.

Work that is given up is out of use at once, whether or not the disk lets go of it; see `Outbox.give_up`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import msgspec

from device_client.errors import DeviceError, StoreError
from device_client.events import PendingUpdate
from device_client.local_optimiser import Control, LocalProgress
from device_client.ports import Float32, Store
from device_client.work_vectors import IN_ENTRY, WorkVectors
from fl_protocol.errors import ProtocolError
from fl_protocol.limits import MAX_TRANSFER_BYTES
from fl_protocol.messages import RoundManifestMsg, TrainingPlanMsg, decode

PREFIX = "outbox/"
_SEALING_BYTES = 8192
"""More than sealing, signing and the entry itself add to an update."""


class OutboxFullError(DeviceError):
    """The updates that wait for their receipts leave no room for another."""


class Work(msgspec.Struct, frozen=True, tag="work", kw_only=True):
    """A participation that is charged for and computed, or about to be; vectors are as `WorkVectors` packed them.

    Args:
        device: the name on the wire that it will be sealed under.
        manifest: the verified round manifest, encoded.
        start: parameters that training starts from, the personal ones at the end, as they were before the round; of an
            evaluation those that are evaluated; of statistics empty.
        server_control, own_control: SCAFFOLD's c and c_i; empty in a plan without.
        progress: how far it came; None before the first step.
    """

    update_id: bytes
    study: str
    device: str
    manifest: bytes
    start: bytes
    server_control: bytes = b""
    own_control: bytes = b""
    progress: LocalProgress | None = None

    def decoded_manifest(self) -> RoundManifestMsg:
        """The manifest. Raises StoreError."""
        try:
            return decode(self.manifest, RoundManifestMsg)
        except ProtocolError as error:
            raise StoreError(f"the work in the outbox names a manifest that cannot be read ({error})") from error

    def largest_bytes(self) -> int:
        """What its entry takes at most; the sealed update takes less. Raises StoreError."""
        manifest = self.decoded_manifest()
        plan = manifest.plan
        if isinstance(plan, TrainingPlanMsg):
            # Progress is float64: the parameters, and with momentum their velocity.
            progress = max(len(self.start), 4 * manifest.num_parameters) * (4 if plan.momentum else 2)
        else:
            progress = 8 * plan.length
        entry = len(self.manifest) + len(self.start) + len(self.server_control) + len(self.own_control)
        return entry + progress + _SEALING_BYTES

    def start_params(self, vectors: WorkVectors = IN_ENTRY) -> Float32:
        """What training starts from, float32 [d]. Raises StoreError."""
        return vectors.unpack(self.start)

    def control(self, vectors: WorkVectors = IN_ENTRY) -> Control | None:
        """SCAFFOLD's control variates. Raises StoreError."""
        if not self.server_control:
            return None
        return vectors.unpack(self.server_control), vectors.unpack(self.own_control)


class GivenUp(msgspec.Struct, frozen=True, tag="given up", kw_only=True):
    """In the place of work that was given up and that the disk would not delete."""

    update_id: bytes
    study: str


Entry = Work | PendingUpdate | GivenUp


class Outbox:
    """All entries of this device, in its store.

    Args:
        store: where they are.
        maximum_bytes: of all entries together.
    """

    def __init__(self, store: Store, *, maximum_bytes: int = 4 * MAX_TRANSFER_BYTES) -> None:
        self._store, self._maximum_bytes = store, maximum_bytes
        self._sizes: dict[bytes, int] = {}
        self._given_up: set[bytes] = set()
        self._entries: dict[bytes, Entry] = {entry.update_id: entry for entry in self._load()}
        self._given_up.update(name for name, entry in self._entries.items() if isinstance(entry, GivenUp))

    def __iter__(self) -> Iterator[PendingUpdate]:
        """Updates that wait for their receipts, in the order of their names."""
        entries = (entry for name, entry in sorted(self._entries.items()) if name not in self._given_up)
        return (entry for entry in entries if isinstance(entry, PendingUpdate))

    def of(self, study: str) -> list[PendingUpdate]:
        """A study's updates that wait for their receipts."""
        return [pending for pending in self if pending.study == study]

    def work(self, study: str) -> Work | None:
        """A study's work in progress; there is at most one."""
        entries = (entry for name, entry in self._entries.items() if name not in self._given_up)
        return next((entry for entry in entries if isinstance(entry, Work) and entry.study == study), None)

    def __contains__(self, update_id: bytes) -> bool:
        """Whether the store has an entry of this update, whatever became of it."""
        return update_id in self._entries

    @property
    def has_work(self) -> bool:
        """Whether the store has work in progress, whatever became of it."""
        return any(isinstance(entry, Work) for entry in self._entries.values())

    @property
    def size_bytes(self) -> int:
        """Of all entries."""
        return sum(self._sizes.values())

    def begin(self, work: Work) -> None:
        """Durably note what is about to be charged and trained; call before the charge.

        Raises:
            OutboxFullError: no room for its progress, or the update that will come of it.
            StoreError: the disk does not take it.
        """
        needed = work.largest_bytes()
        if needed > self._maximum_bytes:
            raise OutboxFullError(
                f"maximum_outbox_bytes is {self._maximum_bytes}, and a participation with this model takes up to "
                f"{needed}"
            )
        if self.size_bytes + needed > self._maximum_bytes:
            raise OutboxFullError(
                f"{len(self._entries)} update(s) of {self.size_bytes} bytes wait for their receipts, and "
                f"maximum_outbox_bytes is {self._maximum_bytes}: nothing is trained until some are delivered"
            )
        self.put(work)

    def put(self, entry: Entry) -> None:
        """Durably replace an entry: progress, or the sealed update. Raises StoreError, the old entry untouched."""
        data = msgspec.msgpack.encode(entry)
        self._store.write(_name(entry.update_id), data)
        self._entries[entry.update_id], self._sizes[entry.update_id] = entry, len(data)

    def discard(self, update_id: bytes) -> None:
        """Durably forget an entry. Raises StoreError."""
        self._store.delete(_name(update_id))
        self._entries.pop(update_id, None)
        self._sizes.pop(update_id, None)
        self._given_up.discard(update_id)

    def give_up(self, update_id: bytes) -> None:
        """Never use an entry again, and durably forget it.

        Security: work that failed must not be tried again from earlier progress, nor what was dropped be sent. For
        this process the entry is out of use in any case. A disk that cannot delete it may still take a short mark in
        its place. One that does neither keeps it: `sweep` tries again, and only if the process ends before the disk
        takes anything does the next one find the entry as it was.

        Raises:
            StoreError: the disk does not let go of it.
        """
        entry = self._entries.get(update_id)
        if entry is None:
            return
        self._given_up.add(update_id)
        try:
            self.discard(update_id)
        except StoreError:
            if not isinstance(entry, GivenUp):
                with suppress(StoreError):
                    self.put(GivenUp(update_id=update_id, study=entry.study))
            raise

    def sweep(self) -> None:
        """Delete what was given up and is still on the disk. Raises StoreError; call it again later."""
        for update_id in sorted(self._given_up):
            self.give_up(update_id)

    def drop(self, study: str) -> int:
        """Give up a study's work and updates, because the wearer left it; how many. Raises StoreError."""
        entries = [entry for entry in self._entries.values() if entry.study == study]
        self._given_up.update(entry.update_id for entry in entries)
        self.sweep()
        return sum(not isinstance(entry, GivenUp) for entry in entries)

    def forget(self) -> None:
        """Use nothing of it any more, because it is to be erased; the disk is left as it is."""
        self._entries.clear()
        self._sizes.clear()
        self._given_up.clear()

    def _load(self) -> Iterator[Entry]:
        """What the store holds."""
        for name in self._store.names(PREFIX):
            data = self._store.read(name)
            if data is None:
                continue
            try:
                entry = msgspec.msgpack.decode(data, type=Entry)
            except msgspec.DecodeError as error:
                raise StoreError(f"the outbox entry {name} cannot be read ({error})") from error
            self._sizes[entry.update_id] = len(data)
            yield entry


def _name(update_id: bytes) -> str:
    return PREFIX + update_id.hex()
