"""The profiles that come with covey, the TOML files of this folder, and those of a folder of one's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from firmware_sim.errors import ProfileError
from firmware_sim.profiles.hardware_profile import HardwareProfile, read_profile

FOLDER = Path(__file__).parent


def profile_names(folder: Path = FOLDER) -> tuple[str, ...]:
    """Names of the profiles in a folder, by default of those that come with covey."""
    return tuple(sorted(path.stem for path in folder.glob("*.toml")))


def load_profile(name: str, *, own: Path | None = None) -> HardwareProfile:
    """A profile that comes with covey, or one of one's own.

    Args:
        name: of the profile.
        own: a folder of others, which come first.

    Raises:
        ProfileError: there is none of this name, and the text lists them; or its file cannot be read or is wrong.
    """
    names = profile_names(own) if own is not None else ()
    if own is None or name not in names:
        if name not in profile_names():
            raise ProfileError(f"profile {name!r}: expected one of {', '.join((*names, *profile_names()))}")
        return _shipped(name)
    path = own / f"{name}.toml"
    try:
        profile = read_profile(path.read_bytes(), where=str(path))
    except OSError as error:
        raise ProfileError(f"profile {path}: it cannot be read ({error.strerror})") from error
    if profile.name != name:
        raise ProfileError(f"profile {path}: expected the name {name!r}, as the file is called, got {profile.name!r}")
    return profile


@cache
def _shipped(name: str) -> HardwareProfile:
    """One that comes with covey, read once."""
    return read_profile((FOLDER / f"{name}.toml").read_bytes(), where=f"{name}.toml")
