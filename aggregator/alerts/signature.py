"""Signatures of webhooks as in Standard Webhooks 1.0 (standardwebhooks.com): HMAC-SHA256 over id, time and body. Pure.

A receiver checks `webhook-signature` with the shared secret, refuses a `webhook-timestamp` that is more than five
minutes off, and remembers each `webhook-id` that it has dealt with: an event comes at least once.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable

from aggregator.errors import AggregatorError

PREFIX = "whsec_"
SECRET_BYTES = 32
_LEAST_BYTES, _MOST_BYTES = 24, 64
TOLERANCE_S = 300.0


def new_secret(entropy: Callable[[int], bytes]) -> str:
    """A secret as its file holds it.

    Args:
        entropy: cryptographic source of bytes.
    """
    return PREFIX + base64.b64encode(entropy(SECRET_BYTES)).decode()


def secret_bytes(text: str) -> bytes:
    """The key in a secret. Raises AggregatorError: it is none."""
    try:
        key = base64.b64decode(text.strip().removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not text.strip().startswith(PREFIX) or not _LEAST_BYTES <= len(key) <= _MOST_BYTES:
        raise AggregatorError(
            f"expected a secret of {_LEAST_BYTES} to {_MOST_BYTES} bytes as {PREFIX} and base64; make one with "
            "covey-aggregator webhook secret"
        )
    return key


def headers_of(message_id: str, body: bytes, *, key: bytes, now_s: float) -> dict[str, str]:
    """The three headers of a message that is posted now.

    Args:
        message_id: the same at every attempt.
        body: as it is posted.
        key: the shared secret.
        now_s: Unix seconds.
    """
    at = str(int(now_s))
    return {
        "webhook-id": message_id,
        "webhook-timestamp": at,
        "webhook-signature": _signature(message_id, at, body, key),
    }


def is_signed(headers: dict[str, str], body: bytes, *, key: bytes, now_s: float) -> bool:
    """What a receiver checks.

    Args:
        headers: by name in lower case.
        body: as it came.
        key: the shared secret.
        now_s: Unix seconds.
    """
    message_id, at = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not at.isascii() or not at.isdigit() or abs(now_s - int(at)) > TOLERANCE_S:
        return False
    wanted = _signature(message_id, at, body, key)
    return any(hmac.compare_digest(one, wanted) for one in headers.get("webhook-signature", "").split(" "))


def _signature(message_id: str, at: str, body: bytes, key: bytes) -> str:
    digest = hmac.digest(key, f"{message_id}.{at}.".encode() + body, "sha256")
    return "v1," + base64.b64encode(digest).decode()
