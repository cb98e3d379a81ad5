"""The lines of the ledger's log: JSON objects in the clear, each naming the SHA-256 of the line before. Pure.

Whoever can read the disk can read what was spent on which study, and which updates left under which name on the wire;
of the wearer's recordings nothing is in it.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Final, Literal

import msgspec

from device_client.accounting import poisson_gaussian_rdp
from fl_protocol.errors import LocalMisuseError
from fl_protocol.renyi import Vector

FORMAT: Final = 1
GENESIS = "0" * 64
"""What the first line names as the one before."""

Purpose = Literal["update", "count"]


class Steps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Gaussian steps: sampling rate, noise multiplier and how many."""

    sampling_rate: float
    noise_multiplier: float
    steps: int

    def rdp(self) -> Vector:
        """What they cost at each of `fl_protocol.renyi.ORDERS`; not to be written to."""
        return _rdp(self.sampling_rate, self.noise_multiplier, self.steps)

    def check(self) -> None:
        """Whether `rdp` can be told, without the work. Raises ValueError or OverflowError."""
        poisson_gaussian_rdp(sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=0)
        if not float(self.steps) >= 0:
            raise ValueError(f"steps: expected at least 0, got {self.steps}")


class Reservation(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    tag_field="kind",
    tag="reservation",
):
    """What was charged, and for which round.

    Args:
        at_s: the ledger's time, Unix seconds; never less than in the line before.
        task: the study, ``tenant/task``.
        round: of that study.
        purpose: ``update`` for a participation, ``count`` for one noisy count of records.
        sampling_rate, noise_multiplier, steps: the Gaussian steps that were charged.
        previous: hash of the line before, hex.
        plan: of a count: the steps of the round that it is for, as its manifest says them; charged on another line.
    """

    format: Literal[1]
    at_s: float
    task: str
    round: int
    purpose: Purpose
    sampling_rate: float
    noise_multiplier: float
    steps: int
    previous: str
    plan: Steps | None = None

    def rdp(self) -> Vector:
        """What it costs at each of `fl_protocol.renyi.ORDERS`; not to be written to."""
        return _rdp(self.sampling_rate, self.noise_multiplier, self.steps)

    def repeated_rdp(self) -> Vector:
        """What a study that asks for this will ask for again and again: with a count the round that it is for."""
        return self.rdp() if self.plan is None else self.rdp() + self.plan.rdp()


class Acceptance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="acceptance"):
    """A person took the log as it stands although the counter did not vouch for it; closes the period it stands in.

    Args:
        at_s: as in `Reservation`.
        found: what was wrong.
        counted: how many lines the counter had counted; none where it was lost.
        previous: hash of the line before, hex.
    """

    format: Literal[1]
    at_s: float
    found: str
    counted: int | None
    previous: str


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="release"):
    """An update that was sealed and may leave the device; it costs nothing, since its round was charged before.

    Args:
        at_s: of the line before: a release moves no period.
        said_s: what the device's clock said, Unix seconds.
        task: the study.
        round: that was charged.
        device: the name on the wire.
        update_id: 32 hex digits.
        sealed_digest: SHA-256 of the sealed bytes, hex; what the receipt must name.
        num_bytes: of the envelope.
        recipient_key: which key it was sealed to (`device_client.events.PendingUpdate`).
        epsilon: spent in the period by then, over all studies.
        previous: hash of the line before, hex.
    """

    format: Literal[1]
    at_s: float
    said_s: float
    task: str
    round: int
    device: str
    update_id: str
    sealed_digest: str
    num_bytes: int
    recipient_key: str
    epsilon: float | None
    previous: str


Line = Reservation | Acceptance | Release
_DECODER = msgspec.json.Decoder(Reservation | Acceptance | Release)


def encode_line(line: Line) -> bytes:
    """A line as it stands in the log, without its newline.

    Raises:
        LocalMisuseError: it could not be read again (JSON has no infinity, say), which would stop the device for good.
    """
    data = msgspec.json.encode(line)
    try:
        if decode_line(data) == line:
            return data
    except (ValueError, OverflowError):
        pass
    raise LocalMisuseError(f"a line of the ledger that can be read again was expected, got {data[:200]!r}")


def decode_line(data: bytes) -> Line:
    """A line of the log, its cost known to make sense.

    Raises:
        ValueError, OverflowError: it is not one.
    """
    line: Line = _DECODER.decode(data)
    if isinstance(line, Reservation):
        Steps(line.sampling_rate, line.noise_multiplier, line.steps).check()
        if line.plan is not None:
            line.plan.check()
    if not math.isfinite(line.at_s):
        raise ValueError(f"at_s: expected Unix seconds, got {line.at_s}")
    return line


def digest_of(data: bytes) -> str:
    """How the next line names this one."""
    return hashlib.sha256(data).hexdigest()


@functools.lru_cache(maxsize=1024)
def _rdp(sampling_rate: float, noise_multiplier: float, steps: int) -> Vector:
    """Kept, since a study repeats its plan for years."""
    rdp = poisson_gaussian_rdp(sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, steps=steps)
    rdp.setflags(write=False)
    return rdp
