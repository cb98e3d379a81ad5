"""The recordings, converted once for all tests of this room."""

from __future__ import annotations

from pathlib import Path

import pytest

from firmware_sim.watch_data import Recording, load_recordings


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What XDG_CACHE_HOME names for the processes that tests start."""
    return tmp_path_factory.mktemp("cache-home")


@pytest.fixture(scope="session")
def recordings(cache_home: Path) -> list[Recording]:
    return load_recordings(cache_home / "covey")
