"""Which covey this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def software_version() -> str:
    """The installed version, or a word that says it runs from a source tree."""
    try:
        return version("covey")
    except PackageNotFoundError:
        return "from source"
