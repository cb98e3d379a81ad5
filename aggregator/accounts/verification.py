"""Who presents a token, if it holds: what the HTTP API asks at each request.

The slow hash is computed once for a token, and what came of it remembered for `REMEMBERED_S`: that this text matches
this stored hash, by the SHA-256 of the text. Everything else, whether the token was revoked, has ended, or its account
is disabled, is read from the database at each request: a revocation holds from the next request on, in every process.

Security: an unknown public id costs the same slow hash as a known one, so that ids cannot be told by time; and why a
token does not hold is told only to whoever has its secret.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from aggregator.accounts.account_store import Accounts, Known
from aggregator.accounts.roles import ROLE_SCOPES, Role, Scope
from aggregator.accounts.tokens import hash_secret, matches, parse_token
from aggregator.errors import AggregatorError

REMEMBERED_S = 300.0
MOST_REMEMBERED = 10_000
NOTED_EVERY_S = 60.0
"""Last use is written at most this often."""
AT_ONCE = 2
"""Slow hashes computed at a time: each takes 19 MiB and a processor."""
PATIENCE_S = 5.0

Why = Literal["unknown_token", "revoked_token", "expired_token", "disabled_account"]


class RejectedTokenError(AggregatorError):
    """A token does not hold; `code` says why, for programs."""

    def __init__(self, code: Why, text: str) -> None:
        super().__init__(text)
        self.code = code


class BusyError(AggregatorError):
    """Too many tokens are being verified at once; come again."""


@dataclass(frozen=True)
class Identity:
    """Who asks.

    Args:
        account: its name.
        role: of the account.
        token: public id.
        scopes: what this token may do.
        expires_s: Unix seconds.
    """

    account: str
    role: Role
    token: str
    scopes: frozenset[Scope]
    expires_s: float


class TokenVerifier:
    """See the module docstring; may be used by several threads.

    Args:
        accounts: the database's.
        now_s: Unix seconds.
        entropy: gives so many random bytes.
        check: compares a stored hash and a secret, slowly.
    """

    def __init__(
        self,
        accounts: Accounts,
        *,
        now_s: Callable[[], float],
        entropy: Callable[[int], bytes],
        check: Callable[[str, str], bool] = matches,
    ) -> None:
        self._accounts, self._now_s, self._check = accounts, now_s, check
        self._nobodys = hash_secret(entropy(32).hex(), entropy)
        self._matched: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._lock, self._room = threading.Lock(), threading.Semaphore(AT_ONCE)

    def remembers(self, text: str) -> bool:
        """Whether a token needs no slow hash now."""
        with self._lock:
            found = self._matched.get(_digest(text))
        return found is not None and self._now_s() < found[1]

    def verify(self, text: str, *, address: str) -> Identity:
        """Who presents this.

        Args:
            text: untrusted.
            address: where it comes from.

        Raises:
            RejectedTokenError: it does not hold.
            BusyError: too many others are being verified.
            DatabaseError: the database fails.
        """
        presented, now_s = parse_token(text), self._now_s()
        known = None if presented is None else self._accounts.find(presented.token)
        if presented is None or not self._is_secret(text, presented.secret, known) or known is None:
            raise RejectedTokenError("unknown_token", "the token is not one of this study's; ask an admin for one")
        token = known.token
        if token.revoked_s is not None:
            self._forget(text)
            raise RejectedTokenError("revoked_token", f"token {token.token} was revoked; ask an admin for another")
        if not token.created_s <= now_s < token.expires_s:
            raise RejectedTokenError("expired_token", f"token {token.token} has expired; ask an admin for another")
        if known.disabled_s is not None:
            raise RejectedTokenError("disabled_account", f"account {token.account} is disabled; ask an admin")
        if token.last_used_s is None or not 0 <= now_s - token.last_used_s < NOTED_EVERY_S:
            self._accounts.note_use(token.token, address=address, now_s=now_s)
        scopes = frozenset(token.scopes) & ROLE_SCOPES[known.role]
        return Identity(token.account, known.role, token.token, scopes, token.expires_s)

    def _is_secret(self, text: str, secret: str, known: Known | None) -> bool:
        """Whether the secret is the stored one; by memory, or slowly."""
        stored = self._nobodys if known is None else known.secret_hash
        digest, now_s = _digest(text), self._now_s()
        with self._lock:
            hashed, until_s = self._matched.get(digest, ("", 0.0))
        if known is not None and hashed == stored and until_s - REMEMBERED_S <= now_s < until_s:
            return True
        if not self._room.acquire(timeout=PATIENCE_S):
            raise BusyError("too many tokens are being verified at once; come again")
        try:
            is_right = self._check(stored, secret)
        finally:
            self._room.release()
        if is_right and known is not None:
            self._remember(digest, stored, now_s + REMEMBERED_S)
        return is_right

    def _remember(self, digest: bytes, stored: str, until_s: float) -> None:
        """Keep what matched; the one that was added first goes where there are too many."""
        with self._lock:
            self._matched[digest] = (stored, until_s)
            self._matched.move_to_end(digest)
            while len(self._matched) > MOST_REMEMBERED:
                self._matched.popitem(last=False)

    def _forget(self, text: str) -> None:
        """Keep nothing about a token."""
        with self._lock:
            self._matched.pop(_digest(text), None)


def _digest(text: str) -> bytes:
    """What a text is remembered by."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
