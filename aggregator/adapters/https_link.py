"""A helper that the coordinator asks over HTTPS instead of the broker: a thread of its own waits for its answers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

from aggregator.adapters.https_helper import HelperRefusedRequestError, HelperUnreachableError, HttpsHelper

KEY_EVERY_S = 60.0
RETRY_S = 2.0
"""How often the helper's key is fetched: as long as there is none, and then."""


class HttpsLink:
    """`aggregator.helper_calls.HelperLink` over HTTPS.

    Args:
        helper: who is asked.
        tenant: name on the wire.
    """

    def __init__(self, helper: HttpsHelper, tenant: str) -> None:
        self._helper, self._tenant = helper, tenant
        self._asked: queue.Queue[bytes | None] = queue.Queue()
        self._brought: queue.Queue[bytes] = queue.Queue()
        self._pending: bytes | None = None
        self._problem = ""
        self._key_due_s = 0.0

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
        self._asked.put(None)

    def ask(self, request: bytes) -> None:
        """Post a signed request; one that is being posted is not posted twice."""
        if request != self._pending:
            self._pending = request
            self._asked.put(request)

    def poll(self) -> list[bytes]:
        """Signed keys, answers and refusals that have come."""
        found = []
        while True:
            try:
                found.append(self._brought.get_nowait())
            except queue.Empty:
                return found

    def fetch_key(self) -> None:
        """Fetch the helper's key once."""
        key = self._call(lambda: self._helper.key(self._tenant))
        self._key_due_s = time.monotonic() + (RETRY_S if key is None else KEY_EVERY_S)

    def post(self, request: bytes) -> None:
        """Post a request once; what failed is asked again by `ask`."""
        self._call(lambda: self._helper.unmask(request).data)
        self._pending = None

    def _work(self) -> None:
        """Post what is asked, and fetch the key when it is time."""
        while True:
            try:
                request = self._asked.get(timeout=max(0.0, self._key_due_s - time.monotonic()))
            except queue.Empty:
                self.fetch_key()
                continue
            if request is None:
                return
            self.post(request)

    def _call(self, call: Callable[[], bytes]) -> bytes | None:
        """What a call brings, if anything."""
        try:
            data = call()
        except (HelperUnreachableError, HelperRefusedRequestError) as error:
            self._problem = str(error)
            return None
        self._problem = ""
        self._brought.put(data)
        return data
