"""What hostile devices compute, behind `device_client.training.Trainer`: honest training with another end, or none.

Only the simulator has such trainers. Where an attacker leaves out noise, that costs its own wearer's privacy, nobody
else's: each device's noise covers its own records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from msgspec.structs import replace as with_fields

from device_client.local_optimiser import Control, LocalProgress
from device_client.ports import Float32, Graph
from device_client.training import Records, Trainer, Training
from firmware_sim.attackers.kinds import FreeRider, LabelFlip, ScalingBackdoor, SignFlip, Sybil
from firmware_sim.attackers.mislabelling import permuted
from firmware_sim.attackers.plan import Attack
from firmware_sim.attackers.trigger import poisoned_records
from firmware_sim.fidelity import EmptyTraining
from firmware_sim.seeded_entropy import SeededEntropy
from fl_protocol.integer_noise import Entropy
from fl_protocol.messages import TrainingPlanMsg


class Memory(Protocol):
    """What an attacker remembers between two lives of its daemon: a disk of its own."""

    def read(self, name: str) -> bytes | None:
        """A file."""

    def write(self, name: str, data: bytes) -> None:
        """Keep a file."""


class HostileTrainer:
    """`device_client.training.Trainer` of a device that attacks.

    Args:
        honest: what it would train with.
        attacks: what it does, one after the other.
        elapsed_s: seconds since the run began.
        round_number: of the task, that the device works on.
        memory: see there.
        seed: of the run.
        labels: K of the model.
    """

    def __init__(
        self,
        honest: Trainer,
        attacks: Sequence[Attack],
        *,
        elapsed_s: Callable[[], float],
        round_number: Callable[[], int],
        memory: Memory,
        seed: str,
        labels: int,
    ) -> None:
        self._honest, self._attacks, self._elapsed_s = honest, tuple(attacks), elapsed_s
        self._round_number, self._memory, self._seed, self._labels = round_number, memory, seed, labels

    def __call__(
        self,
        graph: Graph,
        start: Float32,
        records: Records,
        *,
        plan: TrainingPlanMsg,
        entropy: Entropy,
        control: Control | None = None,
        progress: LocalProgress | None = None,
    ) -> Training:
        """A training that ends as the attackers want it."""
        active = self._active()
        for attacker, _, leader in active:
            match attacker:
                case LabelFlip(from_round=first) if first > 1:  # others have recorded their lies
                    records = Records(records.x, permuted(records.y, attacker, self._labels))
                case ScalingBackdoor():
                    records = poisoned_records(records, attacker)
                case Sybil():  # the same for all identities that start from one model
                    entropy = SeededEntropy(
                        f"{self._seed} sybil {leader} {hashlib.sha256(start.tobytes()).hexdigest()}"
                    )
            if isinstance(attacker, ScalingBackdoor | SignFlip) and not attacker.adds_noise:
                plan = with_fields(plan, noise_multiplier=0.0)
        inner: Training
        if any(isinstance(one.attacker, FreeRider) for one in active):
            done = progress.step if progress is not None else 0
            inner = EmptyTraining(len(start), plan.local_steps, lambda: 0.0, done=done)
        else:
            inner = self._honest(graph, start, records, plan=plan, entropy=entropy, control=control, progress=progress)
        return HostileTraining(inner, active, start=start, memory=self._memory)

    def _active(self) -> list[Attack]:
        """The attacks that have begun."""
        elapsed_s, round_number = self._elapsed_s(), self._round_number()
        return [one for one in self._attacks if one.attacker.has_begun(elapsed_s=elapsed_s, round_number=round_number)]


class HostileTraining:
    """`device_client.training.Training` whose change is another.

    Args:
        inner: what computes.
        attacks: what is done to its change, in order.
        start: the model that it starts from, float32 [d].
        memory: of the attacker.
    """

    def __init__(self, inner: Training, attacks: Sequence[Attack], *, start: Float32, memory: Memory) -> None:
        self._inner, self._attacks, self._start, self._memory = inner, tuple(attacks), start, memory
        self._changed: Float32 | None = None

    @property
    def step(self) -> int:
        """As the inner one."""
        return self._inner.step

    @property
    def steps(self) -> int:
        """As the inner one."""
        return self._inner.steps

    @property
    def done(self) -> bool:
        """As the inner one."""
        return self._inner.done

    def advance(self) -> None:
        """As the inner one."""
        self._inner.advance()

    def progress(self) -> LocalProgress:
        """As the inner one."""
        return self._inner.progress()

    def change(self) -> Float32:
        """The attackers' change, float32 [d]."""
        if self._changed is None:
            change = self._inner.change()
            for attack in self._attacks:
                change = self._after(attack, change)
            self._changed = change
        return self._changed

    def next_control(self) -> Float32:
        """As the inner one."""
        return self._inner.next_control()

    def _after(self, attack: Attack, change: Float32) -> Float32:
        """What one attack makes of a change."""
        attacker = attack.attacker
        match attacker:
            case SignFlip():
                return sign_flipped(change, attacker.scale)
            case ScalingBackdoor():
                return (attacker.scale * change.astype(np.float64)).astype(np.float32)
            case FreeRider():
                return self._ridden(attacker, attack.key)
            case Sybil():
                return varied(change, attacker.variation, self._random(attack.key))
            case _:
                return change

    def _ridden(self, rider: FreeRider, key: int) -> Float32:
        """What a free rider sends; it remembers the model for the next time."""
        name = f"attacker-{key:016x}"
        last = self._memory.read(name)
        self._memory.write(name, self._start.astype("<f4").tobytes())
        before = self._start if last is None else np.frombuffer(last, "<f4")
        return free_ride(rider, self._start - before, self._random(key))

    def _random(self, key: int) -> np.random.Generator:
        """The chance of a device and the model that it starts from."""
        digest = hashlib.sha256(self._start.tobytes()).digest()
        return np.random.default_rng([key, int.from_bytes(digest[:8], "little")])


def sign_flipped(change: Float32, scale: float) -> Float32:
    """-`scale` times a change."""
    return (-scale * change.astype(np.float64)).astype(np.float32)


def free_ride(rider: FreeRider, difference: Float32, random: np.random.Generator) -> Float32:
    """What a free rider makes up; Y. Lin et al., "Free-riders in Federated Learning", arXiv 1911.12560, section 3.

    Args:
        rider: what it sends.
        difference: of the last two global models that it saw, float32 [d].
        random: for noise.
    """
    if rider.sends == "zeros":
        return np.zeros_like(difference)
    if rider.sends == "last_difference":
        return (rider.scale * difference.astype(np.float64)).astype(np.float32)
    return _of_length(rider.scale * _length(difference), len(difference), random)


def varied(change: Float32, variation: float, random: np.random.Generator) -> Float32:
    """A change and normal numbers of `variation` times its length."""
    if not variation:
        return change
    return change + _of_length(variation * _length(change), len(change), random)


def _length(vector: Float32) -> float:
    """The L2 norm, in float64."""
    return float(np.linalg.norm(vector.astype(np.float64)))


def _of_length(length: float, size: int, random: np.random.Generator) -> Float32:
    """A vector in a random direction, float32 [size]."""
    drawn = random.normal(size=size)
    return (drawn * (length / np.linalg.norm(drawn))).astype(np.float32)
