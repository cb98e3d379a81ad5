"""How often a live run's device was started: a file beside its configuration, so that no two lives draw the same noise.

The seed of a life is that of `firmware_sim.fleet.maker`: a live device draws what the virtual one draws.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from firmware_sim.errors import FleetError
from fl_protocol.adapters.files import write_atomic

LIFE_FILE = "life.json"


class Lives(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whose lives, and how many there were.

    Args:
        seed: of the fleet.
        device: its name on the wire.
        lives: that were begun.
    """

    seed: str
    device: str
    lives: int = 0

    @property
    def entropy_seed(self) -> str:
        """What the randomness of the present life follows from; `firmware_sim.fleet.maker` has the same."""
        return f"{self.seed} {self.device} {self.lives}"


def write_lives(folder: Path, lives: Lives) -> None:
    """Keep it in a device's folder, durably."""
    write_atomic(folder / LIFE_FILE, msgspec.json.encode(lives))


def begin_life(folder: Path) -> Lives:
    """Count a life, durably, before anything is drawn in it.

    Args:
        folder: of the device.

    Raises:
        FleetError: the folder is not that of a live run's device.
    """
    path = folder / LIFE_FILE
    try:
        before = msgspec.json.decode(path.read_bytes(), type=Lives)
    except (OSError, msgspec.DecodeError) as error:
        raise FleetError(
            f"{path}: expected the device of a live run, which covey-fleet run --live makes ({error})"
        ) from error
    now = msgspec.structs.replace(before, lives=before.lives + 1)
    write_lives(folder, now)
    return now
