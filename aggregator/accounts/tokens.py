"""Access tokens as text, and what is kept of them: an argon2id hash (RFC 9106) of the secret part.

``covey_<16 hex digits>_<43 of base64url>``: a public id, which lists and the audit log name, and 256 random bits. A
secret of so many bits cannot be guessed from a fast hash either; the slow one costs a thief more still. Its cost is
OWASP's least for argon2id (19 MiB, two passes), since each request of an unknown token costs it too.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import NamedTuple

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

_ID_BYTES, _SECRET_BYTES, _SALT_BYTES = 8, 32, 16
_TOKEN = re.compile(r"covey_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_HASHER = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)


class AccessToken(NamedTuple):
    """A token: its public id, and the secret that is shown once."""

    token: str
    secret: str

    @property
    def text(self) -> str:
        """What its owner presents."""
        return f"covey_{self.token}_{self.secret}"


def make_token(entropy: Callable[[int], bytes]) -> AccessToken:
    """A new token; `entropy` gives so many random bytes."""
    return AccessToken(entropy(_ID_BYTES).hex(), base64.urlsafe_b64encode(entropy(_SECRET_BYTES)).rstrip(b"=").decode())


def parse_token(text: str) -> AccessToken | None:
    """What was presented, untrusted; None if it cannot be a token."""
    found = _TOKEN.fullmatch(text)
    return None if found is None else AccessToken(found[1], found[2])


def hash_secret(secret: str, entropy: Callable[[int], bytes]) -> str:
    """What is kept of a secret; takes some 20 ms and 19 MiB."""
    return _HASHER.hash(secret, salt=entropy(_SALT_BYTES))


def matches(secret_hash: str, secret: str) -> bool:
    """Whether a secret is the one that was hashed; takes as long as hashing."""
    try:
        return _HASHER.verify(secret_hash, secret)
    except (VerificationError, InvalidHashError):
        return False
