"""What can go wrong while a model is built."""

from __future__ import annotations

from fl_protocol.errors import CoveyError


class ModelSpecError(CoveyError, ValueError):
    """A model specification does not fit together; the text names the layer and what would fit."""


class ConversionError(CoveyError):
    """The converted graph is not one that every device can run."""
