"""Who vouches for models: the Ed25519 keys of publishers that are pinned, and how many of them must have signed.

Signatures (RFC 8032) stand one after the other, 64 bytes each, and do not say whose they are: each pinned key is tried
against each. Distinct keys are counted, never signatures, so that one of them repeated counts once, and those of
anybody else count for nothing. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fl_protocol.errors import BundleError, LocalMisuseError

SIGNATURE_BYTES = 64
MOST_PUBLISHERS = 16
"""Keys that can be pinned, and signatures that a bundle can hold: 256 verifications at most."""


@dataclass(frozen=True)
class Publishers:
    """Whose signatures a bundle needs: of at least `threshold` of `keys`.

    Args:
        keys: 1 to `MOST_PUBLISHERS`, each once.
        threshold: 1 to as many as there are keys.

    Raises:
        LocalMisuseError: they are not.
    """

    keys: tuple[Ed25519PublicKey, ...]
    threshold: int

    def __post_init__(self) -> None:
        _check_counts([key.public_bytes_raw().hex() for key in self.keys], self.threshold)


class PublisherPins(NamedTuple):
    """`Publishers` as configurations and messages name them.

    Args:
        keys: Ed25519 public keys, 64 lower-case hex digits each; sorted, since their order means nothing.
        threshold: how many of them must have signed.
    """

    keys: tuple[str, ...]
    threshold: int

    @property
    def words(self) -> str:
        """For people: the key, or how many of which."""
        return self.keys[0] if len(self.keys) == 1 else f"{self.threshold} of {', '.join(self.keys)}"


def publisher_pins(publisher_key: str | None, publishers: tuple[str, ...], threshold: int | None) -> PublisherPins:
    """What the keys `publisher_key`, or `publishers` and `publisher_threshold`, of a configuration say.

    Args:
        publisher_key: the only publisher; None where there are several.
        publishers: all of them; empty where there is one.
        threshold: how many of them must have signed; None where there is one.

    Raises:
        ValueError: both are given, or neither, or a threshold that cannot be. Whether each is a key is left to
            `fl_protocol.adapters.config_files.pinned_publishers`.
    """
    if (publisher_key is None) == (not publishers):
        given = "neither" if publisher_key is None else "both"
        raise ValueError(f"expected publisher_key, or publishers with publisher_threshold, got {given}")
    if publisher_key is not None:
        if threshold is not None:
            raise ValueError("publisher_threshold: goes with publishers, not with publisher_key; leave it out")
        return PublisherPins((publisher_key.strip().lower(),), 1)
    keys = [key.strip().lower() for key in publishers]
    if threshold is None:
        raise ValueError(
            f"publisher_threshold: expected how many of the {len(keys)} publishers must have signed a model, got none"
        )
    _check_counts(keys, threshold)
    return PublisherPins(tuple(sorted(keys)), threshold)


def signatures_in(member: bytes) -> list[bytes]:
    """A bundle's signatures, 64 bytes each. Raises BundleError: there are more than 16, or one is cut."""
    count, rest = divmod(len(member), SIGNATURE_BYTES)
    if rest or count > MOST_PUBLISHERS:
        raise BundleError(
            f"The bundle's signature should be 0 to {MOST_PUBLISHERS} signatures of {SIGNATURE_BYTES} bytes each; it "
            f"is {len(member)} bytes: get it again."
        )
    return [member[start : start + SIGNATURE_BYTES] for start in range(0, len(member), SIGNATURE_BYTES)]


def signers_among(
    keys: Iterable[Ed25519PublicKey], message: bytes, signatures: list[bytes]
) -> tuple[Ed25519PublicKey, ...]:
    """Those of `keys` that have signed `message`, each once, in their order."""
    # Security: what is counted is keys. Counting signatures, one publisher could stand for all of them.
    return tuple(key for key in keys if any(_is_valid(key, message, signature) for signature in signatures))


def signatures_by(keys: Iterable[Ed25519PublicKey], message: bytes, signatures: list[bytes]) -> list[bytes]:
    """Those of `signatures` that are by one of `keys`, the first of each key."""
    found = (next((one for one in signatures if _is_valid(key, message, one)), None) for key in keys)
    return list(dict.fromkeys(one for one in found if one is not None))


def check_signed(publishers: Publishers, message: bytes, signatures: list[bytes]) -> None:
    """Hold a bundle's signatures against who is pinned.

    Args:
        publishers: that are pinned.
        message: that they sign.
        signatures: untrusted.

    Raises:
        BundleError: fewer than `threshold` of them have signed; the text says how many, and what to do.
    """
    signed, pinned = len(signers_among(publishers.keys, message, signatures)), len(publishers.keys)
    if signed >= publishers.threshold:
        return
    unsigned = "" if signatures else " (nobody has signed it)"
    if pinned == 1:
        raise BundleError(
            f"The bundle is not signed by the pinned publisher{unsigned}: get it again, have its publisher sign it "
            "(covey-aggregator publisher sign), or pin the publisher who made it."
        )
    raise BundleError(
        f"The bundle is signed by {signed} of the {pinned} pinned publishers{unsigned}, and {publishers.threshold} of "
        "them must have signed: have more of them sign it (covey-aggregator publisher sign), or get it again."
    )


def _check_counts(keys: list[str], threshold: int) -> None:
    """Raises LocalMisuseError, which is a ValueError: a key is there twice, or a number is out of its range."""
    if len(set(keys)) < len(keys):
        raise LocalMisuseError("publishers: expected each key once; one that is there twice would count as two")
    if not 1 <= len(keys) <= MOST_PUBLISHERS:
        raise LocalMisuseError(f"publishers: expected 1 to {MOST_PUBLISHERS} keys, got {len(keys)}")
    if not 1 <= threshold <= len(keys):
        raise LocalMisuseError(
            f"publisher_threshold: expected 1 to {len(keys)}, the publishers' number, got {threshold}"
        )


def _is_valid(key: Ed25519PublicKey, message: bytes, signature: bytes) -> bool:
    """Whether a signature of a message is this key's."""
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True
