"""The committed bundles, opened as a device opens them; needs no TensorFlow."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from device_client.training import Records
from fl_protocol.bundle import ModelBundle, open_bundle
from models.publisher import load_public_key

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLES = Path(__file__).parents[2] / "models" / "bundles"


@cache
def committed(model: str) -> ModelBundle:
    """The committed bundle, verified with the committed key."""
    publisher = load_public_key(BUNDLES / "publisher.pub")
    return open_bundle((BUNDLES / f"{model}.covey").read_bytes(), publisher=publisher)


def synthetic(count: int = 70, seed: int = 0) -> Records:
    """Windows that a watch could record, of seven classes with different means."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 7, count).astype(np.int32)
    x = generator.normal(size=(count, 128, 6)) * 0.3 + 5 * np.eye(7, 6)[y][:, None, :]
    return Records(x.astype(np.float32), y)
