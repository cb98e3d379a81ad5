"""One secure round of many devices that say what they are told: real aggregator and helpers, updates made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregator.task_file import Server
from device_client.ports import Float32
from device_client.secure_update import protected_update
from fl_protocol.bundle import ModelBundle
from fl_protocol.messages import RoundManifestMsg
from fl_protocol.sealing import seal_update
from fl_protocol.secagg.parties import Sender
from tests.system.handmade import announced, device_key, messages, register
from tests.system.test_secure_studies import HELPERS, secure_task
from tests.virtual_fleet import SeededEntropy, VirtualFleet

Protect = Callable[..., Any]
"""`protected_update`, or a broken copy of it."""


@dataclass(frozen=True)
class MaskedRound:
    """A round that was committed.

    Args:
        fleet: in which.
        manifest: that its devices acted on.
        total: what was unmasked, noise included, int64 [d] in grid steps.
    """

    fleet: VirtualFleet
    manifest: RoundManifestMsg
    total: NDArray[np.int64]


def masked_round(
    folder: Path,
    updates: Mapping[str, Callable[[RoundManifestMsg], Float32]],
    *,
    seed: str,
    goal: int | None = None,
    protect: Protect = protected_update,
    bundle: ModelBundle | None = None,
    **secure: Any,
) -> MaskedRound:
    """Run a round.

    Args:
        folder: for databases.
        updates: what makes each device's update, by device.
        seed: of all randomness at devices, helpers and aggregator.
        goal: of the task; by default as many as there are devices. With fewer the round closes at its deadline.
        protect: what devices do to their updates.
        bundle: the model, whose length is that of updates.
        secure: the task's section.
    """
    task = secure_task(
        goal=goal or len(updates),
        minimum_cohort=2,
        rounds=1,
        round_duration_s=5.0,
        server=Server(name="fedavg", learning_rate=1.0),
        secure=secure,
    )
    fleet = VirtualFleet(folder, devices=0, task=task, helpers=HELPERS, seed=seed, bundle=bundle)
    register(fleet, *updates)
    fleet.run(until=lambda: any("/round/" in topic for topic in fleet.broker.retained))
    manifest = announced(fleet)
    for name, make in updates.items():
        send_masked(fleet, manifest, name, make(manifest), protect=protect, seed=seed)
    fleet.run()
    return MaskedRound(fleet, manifest, _total(fleet, manifest))


def send_masked(
    fleet: VirtualFleet, manifest: RoundManifestMsg, name: str, change: Float32, *, protect: Protect, seed: str
) -> None:
    """Put a masked update on the wire."""
    entropy = SeededEntropy(f"{seed} {name}")
    update_id = entropy(16)
    sender = Sender(name, update_id, device_key(name))
    body = protect(manifest.secure, manifest, change, sender=sender, entropy=entropy)
    envelope = seal_update(body, manifest=manifest, device=name, update_id=update_id, signing_key=sender.signing_key)
    for message in messages(envelope, name, update_id=update_id, data_bytes=60_000):
        fleet.broker.publish(message.topic, message.payload, retain=False)


def _total(fleet: VirtualFleet, manifest: RoundManifestMsg) -> NDArray[np.int64]:
    """The unmasked sum, from the model that came of it: that is what was released."""
    (record,) = [one for one in fleet.store.rounds.history(fleet.task.name) if one.outcome == "committed"]
    assert manifest.secure is not None
    moved = fleet.params(1).astype(np.float64) - fleet.params(0)
    steps = moved * (record.metrics["arrived"] / manifest.secure.step)
    total = np.rint(steps).astype(np.int64)
    assert np.abs(steps - total).max() < 0.2, "the model's float32 hides a grid step"
    return total
