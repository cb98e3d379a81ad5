"""Where a run can be taken up again: everything that it is, in one file beside a copy of its databases.

A checkpoint is whole or not there: it is written into a folder of its own, which then takes its name. It is a pickle of
this program's own making; a run's folder is as trusted as the program's.
"""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

from firmware_sim.errors import FleetError
from firmware_sim.fleet.chronicle import Chronicle
from firmware_sim.fleet.hub import HubState
from firmware_sim.fleet.record import DeviceRecord
from firmware_sim.fleet.windows import Download, Totals, Upload
from fl_protocol.adapters.files import fsync_folder

_FOLDER, _OLD, _NEW, _STATE = "checkpoint", "checkpoint.old", "checkpoint.new", "state.pickle"


@dataclass(frozen=True)
class Checkpoint:
    """A run between two windows.

    Args:
        now_s: seconds since the virtual beginning.
        records: all devices, by index.
        totals: since the beginning.
        chronicle: of the aggregator.
        hub: beside its databases.
        blobs: of the aggregator.
        in_flight: uploads that have not arrived.
        held: answers that no device has seen.
        finished: whether it is at its end.
        events_bytes: how long the table of events is.
    """

    now_s: float
    records: list[DeviceRecord]
    totals: Totals
    chronicle: Chronicle
    hub: HubState
    blobs: dict[str, tuple[bytes, float]]
    in_flight: list[Upload]
    held: tuple[Download, ...]
    finished: bool
    events_bytes: int


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Replace a run's checkpoint, durably. Raises FleetError.

    Args:
        folder: of the run, whose databases are closed.
        checkpoint: to write.
    """
    new, old, here = folder / _NEW, folder / _OLD, folder / _FOLDER
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for database in sorted(folder.glob("*.db*")):
            shutil.copyfile(database, new / database.name)
        with (new / _STATE).open("wb") as file:
            pickle.dump(checkpoint, file, protocol=pickle.HIGHEST_PROTOCOL)
        for written in new.iterdir():
            with written.open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(new)
        if here.exists():  # else the old one is all there is: this process went on from it
            shutil.rmtree(old, ignore_errors=True)
            here.rename(old)
        new.rename(here)
        fsync_folder(folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise FleetError(
            f"the run cannot be put down in {folder} ({error.strerror}); make room and resume it"
        ) from error


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """A run's checkpoint, its databases put back as they were; None for a run that has none yet. Raises FleetError."""
    for name in (_FOLDER, _OLD):
        kept = folder / name
        if not (kept / _STATE).exists():
            continue
        try:
            for database in folder.glob("*.db*"):
                database.unlink()
            for database in kept.glob("*.db*"):
                shutil.copyfile(database, folder / database.name)
            checkpoint = pickle.loads((kept / _STATE).read_bytes())  # noqa: S301 - see the module docstring
        except (
            OSError,
            pickle.UnpicklingError,
            EOFError,
            LookupError,
            AttributeError,
            ImportError,
            ValueError,
            TypeError,
        ) as error:
            raise FleetError(f"the checkpoint {kept} cannot be read ({error}); run the scenario anew") from error
        if not isinstance(checkpoint, Checkpoint):
            raise FleetError(f"the checkpoint {kept} is of another version of covey; run the scenario anew")
        return checkpoint
    for database in folder.glob("*.db*"):  # of a run that was killed before its first checkpoint
        database.unlink()
    return None
