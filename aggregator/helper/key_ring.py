"""A helper's HPKE keys in the course of time: made, announced, and erased when no request can need them.

A key is durable before it is announced: a seed that is sealed to a key which a crash took away would be lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.helper.config import HelperSection
from aggregator.helper.helper_store import HelperStore, StoredKey
from fl_protocol.enrolment import DAY_S
from fl_protocol.integer_noise import Entropy
from fl_protocol.message_base import KemName, RecipientKeyMsg
from fl_protocol.recency import happened_within
from fl_protocol.sealing import RoundKey, round_key_bytes
from fl_protocol.secagg.messages import HelperKeyMsg
from fl_protocol.signing import sign


@dataclass(frozen=True)
class Helper:
    """Who a helper is.

    Args:
        name: on the wire.
        operator: who runs it.
        identity: its Ed25519 key.
    """

    name: str
    operator: str
    identity: Ed25519PrivateKey


@dataclass(frozen=True)
class KeyTerms:
    """How long keys live.

    Args:
        kem: of new keys.
        renewed_s: after which a new one is made.
        valid_s: for which rounds may use one.
        grace_s: for which a private key is kept beyond that.
    """

    kem: KemName = "mlkem768-x25519"
    renewed_s: float = DAY_S
    valid_s: float = 3 * DAY_S
    grace_s: float = DAY_S

    @classmethod
    def of(cls, section: HelperSection) -> KeyTerms:
        """As the configuration says."""
        days = section.key_days, section.key_valid_days, section.key_grace_days
        return cls(section.kem, *(DAY_S * one for one in days))


class KeyRing:
    """See the module docstring.

    Args:
        helper: whose.
        terms: how long keys live.
        store: where they are.
        entropy: cryptographic source.
        now_s: Unix seconds.
    """

    def __init__(
        self, helper: Helper, *, terms: KeyTerms, store: HelperStore, entropy: Entropy, now_s: Callable[[], float]
    ) -> None:
        self._helper, self._terms, self._store = helper, terms, store
        self._entropy, self._now_s = entropy, now_s
        self._log_is_empty = False
        self.announcement: bytes | None = None
        """The signed `HelperKeyMsg` of the key to use now; None before the first `refresh`."""
        self.not_after_s = 0.0
        """When it ends, Unix seconds."""

    def refresh(self) -> bool:
        """Make a new key if it is time; whether the announcement changed. Raises DatabaseError."""
        newest = self._store.keys.newest()
        if newest is None or not happened_within(self._terms.renewed_s, newest.made_s, self._now_s()):
            self._make()
            newest = self._store.keys.newest()
        if newest is None or newest.secret is None:  # another process erased it meanwhile
            return False
        before, self.announcement, self.not_after_s = self.announcement, self._announce(newest), newest.not_after_s
        return self.announcement != before

    def erase(self) -> int:
        """Erase the private keys that no request can need any more; how many. Raises DatabaseError."""
        now_s = self._now_s()
        erased = self._store.keys.erase_ended(now_s - self._terms.grace_s, now_s)
        # The write-ahead log still has what was erased; somebody who reads may keep it from being emptied for now.
        self._log_is_empty = self._log_is_empty and not erased
        if not self._log_is_empty:
            self._log_is_empty = self._store.database.empty_log()
        return erased

    def find(self, recipient: RecipientKeyMsg) -> RoundKey | None:
        """The private half of a public key, if this helper has it. Raises DatabaseError."""
        secret = self._store.keys.secret_of(_digest(recipient))
        return None if secret is None else RoundKey(recipient.kem, secret)

    def _make(self) -> None:
        """One more key, durable on return."""
        now_s, kem = self._now_s(), self._terms.kem
        key = RoundKey(kem, self._entropy(round_key_bytes(kem)))
        self._store.keys.add(
            kem, key.secret, _digest(key.recipient()), made_s=now_s, not_after_s=now_s + self._terms.valid_s
        )

    def _announce(self, stored: StoredKey) -> bytes:
        """A key as it is published; the same key gives the same bytes."""
        message = HelperKeyMsg(
            helper=self._helper.name,
            operator=self._helper.operator,
            recipient=RoundKey(stored.kem, stored.secret or b"").recipient(),
            not_after_s=stored.not_after_s,
        )
        return sign(message, self._helper.identity)


def _digest(recipient: RecipientKeyMsg) -> bytes:
    """By which a public key is found: SHA-256 of its KEM and bytes."""
    return hashlib.sha256(recipient.kem.encode() + b"\0" + recipient.public_key).digest()
