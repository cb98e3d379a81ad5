"""The seglearn smartwatch recordings: 10 people, 7 shoulder exercises, both wrists, 50 Hz, 6 channels (BSD-3).

D. Burns et al., "Shoulder physiotherapy exercise recognition: machine learning the inertial signals from a smartwatch",
arXiv 1802.01489. The package ships one pickle; it is read once, through an unpickler that admits numpy arrays and
strings only, and kept as an ``.npz``. seglearn itself is never imported (that would need pandas).
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_client.training import Records
from firmware_sim.errors import FleetError

CHANNELS = 6
LABELS = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
PEOPLE = tuple(range(1, 11))
SIDES = ("left", "right")
_REBUILD_ARRAY = np.zeros(0).__reduce__()[0]
_PICKLE_GLOBALS = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # the only function; its module was renamed in numpy 2
    ("numpy.core.multiarray", "_reconstruct"): _REBUILD_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _REBUILD_ARRAY,
}
_DAMAGED = (EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for an archive that was cut short or changed."""

MIRROR = np.array([-1, 1, 1, 1, -1, -1], np.float32)
"""Turns the right wrist's axes into the left's: a reflection of x, under which the rotation rate is an axial vector.
The wearer declares the wrist when the device is set up; nothing is learned from the recordings for it."""


@dataclass(frozen=True)
class Wrist:
    """One person's watch: a device of the fleet."""

    person: int
    side: str

    @property
    def device_id(self) -> str:
        """Pseudonym on the wire."""
        return f"wrist-{self.person:02d}-{self.side}"


@dataclass(frozen=True)
class Recording:
    """One exercise of one wrist at 50 Hz, and its label.

    Args:
        wrist: whose.
        label: index into `LABELS`.
        samples: float32 [samples, 6]: ax ay az in g, wx wy wz in rad/s, in the left wrist's axes.
    """

    wrist: Wrist
    label: int
    samples: NDArray[np.float32]


def all_wrists() -> list[Wrist]:
    """The twenty wrists, in order."""
    return [Wrist(person, side) for person in PEOPLE for side in SIDES]


def load_recordings(cache: Path) -> list[Recording]:
    """All 140 recordings, from the ``.npz`` in `cache`, made there on the first call and again when it is damaged.

    Raises:
        FleetError: seglearn is not installed, its file is not the one we know, or the cache cannot be written.
    """
    source = _dataset_path()
    try:
        archive = cache / f"watch-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.npz"
        if not archive.exists():
            _convert(source, archive)
        try:
            return _read(archive)
        except _DAMAGED:
            _convert(source, archive)
            return _read(archive)
    except OSError as error:
        raise FleetError(f"the recordings cannot be kept in {cache} ({error.strerror}); set XDG_CACHE_HOME") from error


def _read(archive: Path) -> list[Recording]:
    """The recordings in a converted archive."""
    with np.load(archive, allow_pickle=False) as arrays:
        samples, ends = arrays["samples"], np.cumsum(arrays["lengths"])
        pieces = np.split(samples, ends[:-1])
        meta = zip(arrays["person"], arrays["side"], arrays["label"], pieces, strict=True)
        return [
            Recording(Wrist(int(person), SIDES[int(side)]), int(label), piece * MIRROR if side else piece)
            for person, side, label, piece in meta
        ]


def windows_of(recordings: list[Recording], wrist: Wrist, *, samples: int) -> Records:
    """A wrist's recordings cut into disjoint windows of `samples`; the rest at each end is left out.

    Disjoint, because a window is the unit of privacy: overlapping ones would put a sample into several records.
    """
    x: list[NDArray[np.float32]] = []
    y: list[int] = []
    for recording in recordings:
        if recording.wrist == wrist:
            count = len(recording.samples) // samples
            x.append(recording.samples[: count * samples].reshape(count, samples, -1))
            y += [recording.label] * count
    return Records(np.concatenate(x), np.array(y, np.int32))


def default_cache() -> Path:
    """Where converted recordings are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "covey"


def _dataset_path() -> Path:
    """The pickle inside the installed seglearn."""
    spec = importlib.util.find_spec("seglearn")
    if spec is None or spec.origin is None:
        raise FleetError("the smartwatch recordings come with seglearn: run pip install 'covey[fleet]'")
    return Path(spec.origin).parent / "data" / "watch_dataset.npy"


def _convert(source: Path, archive: Path) -> None:
    """Read the pickle through the restricted unpickler and keep plain arrays."""
    with source.open("rb") as stream:
        if stream.read(8) != b"\x93NUMPY\x01\x00":
            raise FleetError(f"{source.name}: expected a .npy file of version 1.0; install seglearn 1.2.5")
        stream.read(int.from_bytes(stream.read(2), "little"))  # the header: one object
        data: dict[str, Any] = _RestrictedUnpickler(io.BytesIO(stream.read())).load().item()
    if tuple(data["y_labels"]) != LABELS or len(data["X"]) != 140:
        raise FleetError("seglearn's recordings are not the 140 we know: install seglearn 1.2.5")
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_suffix(f".{os.getpid()}.tmp.npz")  # two runs may start at once
    np.savez_compressed(
        temporary,
        samples=np.concatenate(data["X"]).astype(np.float32),
        lengths=np.array([len(series) for series in data["X"]]),
        person=data["subject"],
        side=data["side"].astype(np.int64),
        label=data["y"],
    )
    temporary.replace(archive)


class _RestrictedUnpickler(pickle.Unpickler):
    """Admits the globals of plain numpy arrays and strings; a pickle can otherwise run any code."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        """Security: everything not on the list is refused."""
        if (module, name) == ("_codecs", "encode"):
            return _encode
        try:
            return _PICKLE_GLOBALS[module, name]
        except KeyError:
            raise FleetError(f"the recordings' pickle asks for {module}.{name}; only numpy arrays are read") from None


def _encode(text: str, encoding: str) -> bytes:
    """What old pickles use for byte strings."""
    if encoding != "latin1":
        raise FleetError(f"the recordings' pickle asks for encoding {encoding}; only latin1 is read")
    return text.encode("latin1")
