"""A helper that the coordinator asks over HTTPS instead of the broker: a thread of its own waits for its answers.

What it is asked is posted once at a time, in the order of asking; what it has brought is kept until it is fetched, the
newest key alone and the newest answers up to a bound, since a coordinator that stands by fetches nothing.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from aggregator.adapters.https_helper import (
    HelperRefusedRequestError,
    HelperReply,
    HelperUnreachableError,
    HttpsHelper,
)
from fl_protocol.errors import LocalMisuseError

KEY_EVERY_S = 60.0
RETRY_S = 2.0
"""How often the helper's key is fetched: as long as there is none, and then."""
_MOST_PENDING = 64
Post = Callable[[bytes], HelperReply]


class HttpsLink:
    """`aggregator.helper_calls.HelperLink` over HTTPS.

    Args:
        helper: who is asked.
        tenant: name on the wire.
    """

    def __init__(self, helper: HttpsHelper, tenant: str) -> None:
        self._helper, self._tenant = helper, tenant
        self._changed = threading.Condition()
        self._pending: OrderedDict[bytes, tuple[Post, bytes]] = OrderedDict()
        self._replies: deque[bytes] = deque(maxlen=_MOST_PENDING)
        self._key = b""
        self._problem = ""
        self._key_due_s = 0.0
        self._closed = False

    @property
    def problem(self) -> str:
        """Why the last call brought nothing, in words; empty if it did."""
        return self._problem

    def start(self) -> HttpsLink:
        """Begin to work; the thread ends with the process, or with `close`."""
        threading.Thread(target=self._work, name="https-helper", daemon=True).start()
        return self

    def close(self) -> None:
        """Stop working."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def ask(self, request: bytes) -> None:
        """Post a signed request for masks; one that waits to be posted, or is being posted, is not posted twice."""
        self._add(self._helper.unmask, request)

    def cosign(self, request: bytes) -> None:
        """Post a signed request to co-sign, in the same way."""
        self._add(self._helper.cosign, request)

    def revoke(self, request: bytes) -> None:
        """Post who was thrown out, in the same way."""
        self._add(self._helper.revoke, request)

    def _add(self, post: Post, request: bytes) -> None:
        """One more to post."""
        with self._changed:
            self._pending.setdefault(hashlib.sha256(request).digest(), (post, request))
            while len(self._pending) > _MOST_PENDING:
                self._pending.popitem(last=False)
            self._changed.notify()

    def poll(self) -> list[bytes]:
        """Signed keys, answers and refusals that have come."""
        with self._changed:
            found = [*([self._key] if self._key else []), *self._replies]
            self._key = b""
            self._replies.clear()
            return found

    def step(self) -> None:
        """Fetch the key if it is due, and post the request that has waited longest."""
        if time.monotonic() >= self._key_due_s:
            key = self._call(lambda: self._helper.key(self._tenant))
            self._key_due_s = time.monotonic() + (RETRY_S if key is None else KEY_EVERY_S)
            with self._changed:
                self._key = key or self._key
        with self._changed:
            digest, (post, request) = next(iter(self._pending.items()), (b"", (self._helper.unmask, b"")))
        if digest:
            reply = self._call(lambda: post(request).data)
            with self._changed:
                self._pending.pop(digest, None)  # what failed is asked again
                self._replies.extend([] if reply is None else [reply])

    def _work(self) -> None:
        """Do what there is to do, as it comes."""
        while True:
            with self._changed:
                if not self._pending and not self._closed:
                    self._changed.wait(max(0.0, self._key_due_s - time.monotonic()))
                if self._closed:
                    return
            self.step()

    def _call(self, call: Callable[[], bytes]) -> bytes | None:
        """What a call brings, if anything."""
        try:
            data = call()
        except (HelperUnreachableError, HelperRefusedRequestError, LocalMisuseError) as error:
            self._problem = str(error)
            return None
        self._problem = ""
        return data
