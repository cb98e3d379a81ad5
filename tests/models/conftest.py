"""Every test that asks for them runs for both models and on both runtimes."""

from __future__ import annotations

import pytest
from bundle_files import committed

from fl_protocol.bundle import ModelBundle
from models import catalog


@pytest.fixture(params=tuple(catalog.MODELS))
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=("tflite-runtime", "litert"))
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bundle(model: str) -> ModelBundle:
    return committed(model)
