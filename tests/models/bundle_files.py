"""The committed bundles, opened as a device opens them; needs no TensorFlow."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fl_protocol.bundle import ModelBundle, open_bundle
from models.publisher import load_public_key

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLES = Path(__file__).parents[2] / "models" / "bundles"


@cache
def committed(model: str) -> ModelBundle:
    """The committed bundle, verified with the committed key."""
    publisher = load_public_key(BUNDLES / "publisher.pub")
    return open_bundle((BUNDLES / f"{model}.covey").read_bytes(), publisher=publisher)
