"""The profiles that come with covey: the TOML files of this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from firmware_sim.errors import ProfileError
from firmware_sim.profiles.hardware_profile import HardwareProfile, read_profile

FOLDER = Path(__file__).parent


def profile_names() -> tuple[str, ...]:
    """Names of the profiles that come with covey."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


@cache
def load_profile(name: str) -> HardwareProfile:
    """A profile that comes with covey.

    Raises:
        ProfileError: there is none of this name; the text lists them.
    """
    if name not in profile_names():
        raise ProfileError(f"profile {name!r}: expected one of {', '.join(profile_names())}")
    return read_profile((FOLDER / f"{name}.toml").read_bytes(), where=f"{name}.toml")
