"""What a finished study must be, whatever happened on the way; and power cuts to make things happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

from sqlalchemy import event

from device_client.study_runner import StudyRunner
from firmware_sim.virtual_flash import PowerCutError
from fl_protocol.errors import ProtocolError
from fl_protocol.messages import ChunkMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode
from fl_protocol.topics import parse_upload_topic
from tests.virtual_fleet import VirtualFleet


def final_digest(fleet: VirtualFleet) -> str:
    return fleet.aggregator.store.model(fleet.aggregator.state.model_version).digest.hex()


def published_updates(fleet: VirtualFleet) -> dict[bytes, UpdateHeaderMsg]:
    """Header of every honest update that was ever put on the wire; each resend carried the same bytes."""
    parts: dict[bytes, dict[int, bytes]] = {}
    for topic, payload in fleet.broker.published:
        try:
            upload = parse_upload_topic(topic)
            chunk = decode(payload, ChunkMsg)
        except ProtocolError:
            continue  # not an upload, or made by a hostile device
        if upload.device in fleet.devices:
            known = parts.setdefault(upload.update_id, {}).setdefault(chunk.index, payload)
            assert known == payload, "an update was sealed, noised or cut anew"
    found = {}
    for update_id, chunks in parts.items():
        whole = b"".join(decode(chunks[index], ChunkMsg).data for index in sorted(chunks))
        found[update_id] = decode(decode(whole, UpdateEnvelopeMsg).header, UpdateHeaderMsg)
    return found


def accepted(fleet: VirtualFleet) -> list[tuple[str, int, bytes]]:
    """(device, round, update id) of every update in the database."""
    with fleet.aggregator.store.transaction() as connection:
        rows = connection.exec_driver_sql("SELECT device, round, update_id FROM updates")
        return [(row.device, row.round, row.update_id) for row in rows]


def check_study(fleet: VirtualFleet) -> None:
    """The promises of design section 7, for a study that is over."""
    rows = accepted(fleet)
    # Nothing is counted twice.
    assert len({(device, number) for device, number, _ in rows}) == len(rows)
    assert len({update_id for _, _, update_id in rows}) == len(rows)
    # No receipted update is lost.
    delivered = Counter(
        (name, note["round"]) for name, journal in fleet.journals.items() for note in journal.named("update_delivered")
    )
    assert set(delivered) <= {(device, number) for device, number, _ in rows}
    # A device releases at most one update per round, always the same bytes, and only what its ledger was charged for.
    released: dict[tuple[str, int], set[bytes]] = {}
    for update_id, header in published_updates(fleet).items():
        released.setdefault((header.device, header.round), set()).add(update_id)
    assert all(len(ids) == 1 for ids in released.values())
    assert {(device, number) for device, number, _ in rows if device in fleet.devices} <= set(released)
    for name, device in fleet.devices.items():
        ledger = device.ledger
        charged = [entry.round for entry in ledger.reservations]
        assert charged == sorted(set(charged))
        assert {number for device, number in released if device == name} <= set(charged)
        assert ledger.spent_epsilon <= ledger.budget.epsilon
    # Committed rounds had their cohort.
    per_round = Counter(number for _, number, _ in rows)
    for note in fleet.journals["aggregator"].named("round_committed"):
        assert note["arrived"] == per_round[note["round"]] >= fleet.task.minimum_cohort


def runner_of(fleet: VirtualFleet, name: str) -> StudyRunner:
    """A device's one study at work."""
    (runner,) = fleet.devices[name].studies.running
    return runner


def lose_power(fleet: VirtualFleet, name: str, random: Random) -> None:
    """What a power cut leaves of a device: of what was not synced, whatever the file system may have written."""
    fleet.devices.pop(name, None)
    if name in fleet.transports:
        fleet.transports.pop(name).drop("power cut")
    flash, counter = fleet.flashes[name]
    fleet.flashes[name] = flash.after_power_cut(random), counter.after_power_cut(random)


@contextmanager
def aggregator_power_cut(fleet: VirtualFleet, statement: int) -> Iterator[None]:
    """The aggregator loses power at its n-th SQL statement from now on."""
    executed = 0

    def before(*_arguments: object) -> None:
        nonlocal executed
        executed += 1
        if executed == statement:
            raise PowerCutError

    engine = fleet.aggregator.store._engine
    event.listen(engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", before)
