"""Who is signed in: random cookies, each standing for the access token that was shown for it. In memory, nothing else.

Security: the browser never holds the token itself. A session ends with its token, after `LONGEST_S`, by signing out,
or when the process ends; a token that was revoked ends it too (`aggregator.dashboard.live_state`). What is kept to find
a session by is a digest, so that looking it up tells nothing by its time.
"""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from aggregator.accounts.roles import Scope
from aggregator.api.answers import WhoAmI

COOKIE = "covey_session"
LONGEST_S = 12 * 3600.0
MOST = 1000
"""Sessions at a time; who came first is signed out when there are more."""
_COOKIE_BYTES = 32


@dataclass(frozen=True, eq=False)
class Session:
    """Someone who has signed in.

    Args:
        key: digest that it is found by.
        secret: the access token, for the API's own routes.
        who: whose it is, and what it may do.
        address: where they have signed in from.
        ends_s: Unix seconds.
    """

    key: str
    secret: str = field(repr=False)
    who: WhoAmI
    address: str
    ends_s: float

    def may(self, scope: Scope) -> bool:
        """Whether its token has a scope."""
        return scope in self.who.scopes


class Sessions:
    """See the module docstring. Used on the event loop alone.

    Args:
        now_s: Unix seconds.
        entropy: gives so many random bytes.
    """

    def __init__(self, *, now_s: Callable[[], float], entropy: Callable[[int], bytes]) -> None:
        self._now_s, self._entropy = now_s, entropy
        self._open: OrderedDict[str, Session] = OrderedDict()

    def begin(self, secret: str, who: WhoAmI, *, address: str) -> tuple[str, Session]:
        """Sign in; the cookie and its session.

        Args:
            secret: an access token that holds.
            who: whose it is.
            address: where they are.
        """
        cookie = base64.urlsafe_b64encode(self._entropy(_COOKIE_BYTES)).rstrip(b"=").decode()
        ends_s = min(who.expires_s, self._now_s() + LONGEST_S)
        session = Session(_digest(cookie), secret, who, address, ends_s)
        self._open[session.key] = session
        while len(self._open) > MOST:
            self._open.popitem(last=False)
        return cookie, session

    def find(self, cookie: str | None) -> Session | None:
        """The session of a cookie, untrusted; None if there is none, or it is over."""
        found = None if cookie is None else self._open.get(_digest(cookie))
        return found if found is not None and self.holds(found) else None

    def holds(self, session: Session) -> bool:
        """Whether a session goes on."""
        if session.key in self._open and self._now_s() < session.ends_s:
            return True
        self.end(session)
        return False

    def end(self, session: Session) -> None:
        """Sign out."""
        self._open.pop(session.key, None)

    def all(self) -> list[Session]:
        """Every session that goes on."""
        return [one for one in list(self._open.values()) if self.holds(one)]


def _digest(cookie: str) -> str:
    return hashlib.sha256(cookie.encode("utf-8", "replace")).hexdigest()
