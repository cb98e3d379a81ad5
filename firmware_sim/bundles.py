"""Where the model bundles that come with covey are; they are files, so the models room is never imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from firmware_sim.errors import FleetError
from firmware_sim.watch_data import CHANNELS, LABELS
from fl_protocol.bundle import open_bundle
from fl_protocol.signing import public_key_from_hex


def require_watch_model(model: str) -> None:
    """Refuse a bundle that is not for the demo's recordings.

    Raises:
        FleetError: there is no such bundle, or it is for other data.
    """
    path, publisher = bundle_and_publisher(model)
    manifest = open_bundle(path.read_bytes(), publisher=public_key_from_hex(publisher)).manifest
    if manifest.label.names != LABELS or manifest.input.shape[1:] != (CHANNELS,):
        raise FleetError(
            f"the model {model} is not for the watch recordings: expected windows of {CHANNELS} channels and the "
            f"labels {', '.join(LABELS)}, it takes {manifest.input.shape} and predicts {manifest.label.kind}"
        )


def bundle_and_publisher(model: str) -> tuple[Path, str]:
    """Path of a bundle and its publisher's key (64 hex digits).

    Raises:
        FleetError: there is no such bundle.
    """
    spec = importlib.util.find_spec("models")
    if spec is None or spec.origin is None:
        raise FleetError("covey's own bundles are not installed; install covey again")
    folder = Path(spec.origin).parent / "bundles"
    path = folder / f"{model}.covey"
    if not path.exists():
        known = ", ".join(sorted(bundle.stem for bundle in folder.glob("*.covey")))
        raise FleetError(f"there is no bundle {model}; covey comes with {known}")
    return path, (folder / "publisher.pub").read_text().strip()
