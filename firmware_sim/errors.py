"""What can go wrong when a fleet is run."""

from __future__ import annotations

from fl_protocol.errors import CoveyError


class FleetError(CoveyError):
    """A fleet cannot be set up, started or watched."""


class SettingsError(FleetError):
    """An option of a run is outside its range."""


class TraceError(FleetError):
    """A recorded trace cannot be read."""


class ProfileError(FleetError):
    """A hardware profile does not exist, or holds something that cannot be."""
