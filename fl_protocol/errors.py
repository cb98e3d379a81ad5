"""What can go wrong in the protocol, split by who is to blame."""

from __future__ import annotations

import enum


class CoveyError(Exception):
    """Base of every error that Covey raises on purpose; its text is one sentence a person can act on."""


class ProtocolError(CoveyError):
    """A peer sent something that the protocol does not allow; the only error that decoding ever raises."""


class LocalMisuseError(CoveyError, ValueError):
    """The calling code passed an argument outside the documented range."""


class ConfigError(CoveyError):
    """A configuration file is missing, or holds something that cannot be used; the text names the key."""


class BundleError(CoveyError):
    """A model bundle is missing, damaged, from another publisher, or older than what is installed."""


class GraphError(CoveyError):
    """No TFLite runtime is installed, or it failed on what a model's graph was given."""


class RefusalReason(str, enum.Enum):
    """Why an update was refused; the value goes on the wire, into logs and into counters."""

    MALFORMED = "malformed"
    OVERSIZED = "oversized"
    TRUNCATED = "truncated"
    REPLAYED = "replayed"
    UNKNOWN_DEVICE = "unknown_device"
    BAD_SIGNATURE = "bad_signature"
    WRONG_TASK = "wrong_task"
    WRONG_ROUND = "wrong_round"
    WRONG_MODEL = "wrong_model"
    UNSEALABLE = "unsealable"
    WRONG_LENGTH = "wrong_length"
    NOT_FINITE = "not_finite"
    TOO_LONG = "too_long"
    WRONG_ENCODING = "wrong_encoding"
    ROUND_CLOSED = "round_closed"
    SECOND_UPDATE = "second_update"
    THROTTLED = "throttled"
    QUARANTINED = "quarantined"


class RefusedError(ProtocolError):
    """An update was refused for one typed reason."""

    def __init__(self, reason: RefusalReason, detail: str) -> None:
        super().__init__(f"{reason.value}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RefusedError], tuple[RefusalReason, str]]:
        """To another process, and back the same."""
        return type(self), (self.reason, self.detail)
