"""Attackers who send sealed updates again, those of others too: they listen where messages arrive at the broker. Pure.

The broker is untrusted (design, section 1), so whoever listens there may capture everything, also what devices of other
shards send. Nothing is kept: what arrives is sent again at once, to arrive `after_s` later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from msgspec.structs import replace as with_fields

from firmware_sim.attackers.kinds import Replay
from firmware_sim.attackers.plan import Attack, AttackPlan
from firmware_sim.fleet.windows import FleetEvent, Upload
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.messages import ChunkMsg, decode, encode
from fl_protocol.topics import parse_upload_topic, upload_topic

REPLAYED = "upload_replayed"
"""The event of an update that is sent again, told of its first chunk."""
_AGAIN = 2**40
"""Above all numbers of messages that devices count up to."""


class Replayer:
    """See the module docstring.

    Args:
        plan: of the run.
        devices: how many there are.
        name_of: a device's name, given its number; `index_of` the other way round.
    """

    def __init__(
        self, plan: AttackPlan, devices: int, *, name_of: Callable[[int], str], index_of: Callable[[str], int]
    ) -> None:
        self._plan, self._devices, self._name_of, self._index_of = plan, devices, name_of, index_of
        self._has_replay = any(isinstance(one, Replay) for one in plan.attackers)

    def heard(
        self, uploads: Iterable[Upload], now_s: float, *, round_number: int
    ) -> tuple[list[Upload], list[FleetEvent]]:
        """What is sent again of what devices sent, and an event for each update of which it is, told at `now_s`.

        Args:
            uploads: of all devices.
            now_s: seconds since the run began.
            round_number: that was opened last, as everybody can read in its manifest; 0 before the first.
        """
        again: list[Upload] = []
        events: list[FleetEvent] = []
        for upload in uploads if self._has_replay else ():
            for attack, sender in self._listeners(upload, round_number):
                copy = self._copied(upload, attack, sender)
                if copy is not None:
                    again.append(copy)
                    if copy.topic.endswith("/0"):
                        detail = f"of {upload.device}"
                        events.append(FleetEvent(now_s, sender, "", REPLAYED, detail=detail))
        return again, events

    def _listeners(self, upload: Upload, round_number: int) -> Iterable[tuple[Attack, str]]:
        """Who sends an upload again: its sender itself, the device before it, or both."""
        index = self._index_of(upload.device)
        for number, whose in ((index, "own"), ((index - 1) % self._devices, "neighbour")):
            name = self._name_of(number)
            for attack in self._plan.attacks_of(number, name):
                kind = attack.attacker
                if not isinstance(kind, Replay) or kind.whose not in {whose, "both"}:
                    continue
                if kind.has_begun(elapsed_s=upload.arrives_s, round_number=round_number):
                    yield attack, name

    def _copied(self, upload: Upload, attack: Attack, sender: str) -> Upload | None:
        """A chunk under the attacker's topic; None for what is no chunk."""
        if not isinstance(attack.attacker, Replay):
            raise LocalMisuseError(f"expected a replay, got {attack.attacker}")
        try:
            topic = parse_upload_topic(upload.topic)
            chunk = decode(upload.payload, ChunkMsg)
        except ProtocolError:
            return None
        update_id = hashlib.sha256(b"again" + attack.key.to_bytes(8, "little") + topic.update_id).digest()[:16]
        return Upload(
            upload.arrives_s + attack.attacker.after_s,
            sender,
            _AGAIN + upload.number,
            upload_topic(topic.tenant, sender, update_id, topic.chunk_index),
            encode(with_fields(chunk, transfer_id=update_id)),
        )
