"""What the tests of the models room share without TensorFlow; see `oracle_cases` for the rest."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from fl_protocol.bundle import ModelBundle, open_bundle
from models.publisher import load_public_key

BUNDLES = Path(__file__).parents[2] / "models" / "bundles"


@pytest.fixture(params=("watch_cnn", "watch_features"))
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=("tflite-runtime", "litert"))
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bundle(model: str) -> ModelBundle:
    """The committed bundle, verified with the committed key."""
    return committed(model)


@cache
def committed(model: str) -> ModelBundle:
    publisher = load_public_key(BUNDLES / "publisher.pub")
    return open_bundle((BUNDLES / f"{model}.covey").read_bytes(), publisher=publisher)
