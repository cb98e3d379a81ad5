"""A central training on disk: killed at any instant it goes on from its checkpoint, and its charges stand.

``charges.json`` counts the noisy sums that were charged; it is replaced durably before they are computed. ``state`` is
the newest checkpoint; it is replaced durably after the steps that lead to it. So the count is never behind what was
computed: after a kill it is ahead by the steps that were lost, which are charged again when they are run again. The
count is the run's ledger: without it a checkpoint is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np

from device_client.ports import Float32
from device_client.training import Records
from fl_protocol.adapters.files import fsync_folder, write_atomic
from fl_protocol.errors import CoveyError
from models.central.plan import CentralPlan
from models.central.training import EpochResult, State

CHARGES, STATE = "charges.json", "state"
_DIGEST_BYTES = 32


class CheckpointError(CoveyError):
    """A checkpoint folder cannot be used; the text says what to do."""


class _Charges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The run's ledger: which run, and how many noisy sums; the plan is there for people."""

    run: str
    charged: int
    plan: CentralPlan


class _Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A state; vectors as little-endian float64."""

    run: str
    step: int
    params: bytes
    velocity: bytes
    weighted_sum: bytes
    weight: float
    history: tuple[EpochResult, ...]


def run_digest(
    plan: CentralPlan, *, graph_digest: bytes, start: Float32, records: Records, seed: int | None = None
) -> str:
    """What makes two trainings the same one: plan, graph, start, data and seed; SHA-256, hex."""
    digest = hashlib.sha256(msgspec.msgpack.encode((plan, graph_digest, seed)))
    for array in (start, records.x, records.y):
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class CheckpointFolder:
    """`models.central.training.Run` in a folder; one process at a time.

    Args:
        folder: made if missing; holds this one run.
        plan: of the run.
        run: its `run_digest`.

    Raises:
        CheckpointError: another process uses the folder, it holds another run, it is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, plan: CentralPlan, run: str) -> None:
        self._folder, self._plan, self._run = folder, plan, run
        try:
            if not folder.exists():
                folder.mkdir(mode=0o700, parents=True)
                fsync_folder(folder.parent)
            self._lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CheckpointError(f"The checkpoint folder {folder} cannot be made ({error.strerror}).") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.charged = self._read_charges()
            self._state = self._read_state()
        except BlockingIOError:
            self.close()
            raise CheckpointError(f"The checkpoint folder {folder} is in use by another process.") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process open the folder."""
        os.close(self._lock)

    def __enter__(self) -> CheckpointFolder:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def reserve(self, steps: int) -> None:
        """Charge durably; an error may leave the charge standing, never the steps uncharged."""
        charges = _Charges(self._run, self.charged + steps, self._plan)
        self._write(CHARGES, msgspec.json.format(msgspec.json.encode(charges), indent=1))
        self.charged += steps

    def load(self) -> State | None:
        """The checkpoint."""
        return self._state

    def save(self, state: State) -> None:
        """Replace the checkpoint durably."""
        kept = _Checkpoint(
            run=self._run,
            step=state.step,
            params=state.params.astype("<f8").tobytes(),
            velocity=state.velocity.astype("<f8").tobytes(),
            weighted_sum=state.weighted_sum.astype("<f8").tobytes(),
            weight=state.weight,
            history=state.history,
        )
        body = msgspec.msgpack.encode(kept)
        self._write(STATE, hashlib.sha256(body).digest() + body)
        self._state = state

    def _read_charges(self) -> int:
        """What was charged so far."""
        text = self._read(CHARGES)
        if text is None:
            if (self._folder / STATE).exists():
                raise CheckpointError(
                    f"{self._folder} has a checkpoint but no {CHARGES}, which counts what was spent: put it back, or "
                    "start again in an empty folder and add up both epsilons."
                )
            return 0
        try:
            charges = msgspec.json.decode(text, type=_Charges)
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{self._folder / CHARGES} is damaged ({error}): put it back.") from error
        self._check_run(charges.run)
        return charges.charged

    def _read_state(self) -> State | None:
        """The checkpoint, whole."""
        data = self._read(STATE)
        if data is None:
            return None
        digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        try:
            if hashlib.sha256(body).digest() != digest:
                raise msgspec.DecodeError("its digest differs")
            kept = msgspec.msgpack.decode(body, type=_Checkpoint)
        except msgspec.DecodeError as error:
            raise CheckpointError(
                f"The checkpoint in {self._folder} is damaged ({error}): delete the file {STATE} to start again from "
                f"step 0; {CHARGES} keeps what was spent."
            ) from error
        self._check_run(kept.run)
        params, velocity, weighted_sum = (
            np.frombuffer(raw, "<f8").astype(np.float64) for raw in (kept.params, kept.velocity, kept.weighted_sum)
        )
        return State(kept.step, params, velocity, weighted_sum, kept.weight, kept.history)

    def _check_run(self, run: str) -> None:
        """It belongs to this training."""
        if run != self._run:
            raise CheckpointError(
                f"The checkpoint in {self._folder} is of another run (other settings, data, seed or bundle): repeat "
                "that run's command to resume it, or name another folder."
            )

    def _read(self, name: str) -> bytes | None:
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(f"{self._folder / name} cannot be read ({error.strerror}).") from error

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomic(self._folder / name, data)
        except OSError as error:
            raise CheckpointError(
                f"The checkpoint folder {self._folder} cannot be written ({error.strerror}): make room and repeat the "
                "command, which goes on from the last checkpoint."
            ) from error
