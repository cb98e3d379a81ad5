"""Which devices attack how: the same for a device whatever the others are, and however many shards. Pure.

As with faults, everything follows from the run's seed, the attacker's place among those of its kind, and the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from firmware_sim.attackers.kinds import Attacker, Sybil
from firmware_sim.labelled_chance import key_of, uniform

_CHOSEN = 0


class Attack(NamedTuple):
    """What one device does.

    Args:
        attacker: as the scenario has it.
        key: of this device's chance in it.
        leader: number of the device whose records and randomness it uses: its own, but for a Sybil's identities.
    """

    attacker: Attacker
    key: int
    leader: int


class AttackPlan:
    """All attackers of a run.

    Args:
        attackers: as `firmware_sim.attackers.parsing.parse_attackers` gives them.
        seed: of the run.
    """

    def __init__(self, attackers: Sequence[Attacker], *, seed: int | str) -> None:
        self.attackers, self._seed = tuple(attackers), seed
        self._labelled = tuple(_labelled(attackers))

    def attacks_of(self, index: int, name: str) -> tuple[Attack, ...]:
        """What a device does, in the order of the scenario; nothing for an honest one.

        Args:
            index: of the device in the fleet.
            name: of it on the wire.
        """
        found = []
        for attacker, label in self._labelled:
            leader = self._leader(attacker, label, index, name)
            if leader is not None:
                found.append(Attack(attacker, key_of(self._seed, "attacker", label, str(index)), leader))
        return tuple(found)

    def leader_of(self, index: int, name: str) -> int:
        """Number of the device whose wearer's records a device has."""
        return next(
            (one.leader for one in self.attacks_of(index, name) if isinstance(one.attacker, Sybil)),
            index,
        )

    def _leader(self, attacker: Attacker, label: str, index: int, name: str) -> int | None:
        """Who leads a device in an attack; None where it has no part in it."""
        if attacker.devices is not None:
            if name not in attacker.devices:
                return None
            return _number(attacker.devices[0]) if isinstance(attacker, Sybil) else index
        leader = index - index % attacker.identities if isinstance(attacker, Sybil) else index
        chance = uniform(key_of(self._seed, "attacker", label, str(leader)), _CHOSEN)
        return leader if attacker.share is not None and chance < attacker.share else None


def _number(name: str) -> int:
    """Of a device that is called so."""
    return int(name.rpartition("-")[2])


def _labelled(attackers: Sequence[Attacker]) -> Iterator[tuple[Attacker, str]]:
    """Attackers with their kind and their place among those of their kind."""
    seen: dict[str, int] = {}
    for attacker in attackers:
        kind = str(attacker.__struct_config__.tag)
        seen[kind] = seen.get(kind, 0) + 1
        yield attacker, f"{kind} {seen[kind]}"
