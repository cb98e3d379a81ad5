"""An edge behind which uploads trickle, as a slow loris sends them: few bytes, for long, over many connections. Pure.

The device believes that they have left. What waits when its connection ends without a goodbye never arrives; a goodbye
comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from firmware_sim.radio.edge import Edge, EdgeClient
from fl_protocol.transport import Connected


class TricklingEdge:
    """`firmware_sim.radio.edge.Edge` over another one, for one device.

    Args:
        inner: the edge.
        gap_s: least time between two chunks, by Unix seconds; 0: as they come.
        upload_prefix: topics that begin so are uploads, such as ``fl/v1/clinic/up/``.
    """

    def __init__(self, inner: Edge, *, gap_s: Callable[[float], float], upload_prefix: str) -> None:
        self._inner, self._gap_s, self._prefix = inner, gap_s, upload_prefix
        self._last_s = -math.inf

    def connect(self, client: EdgeClient, *, will: tuple[str, bytes] | None, at_s: float) -> Connected | None:
        """Connect."""
        self._last_s = -math.inf
        return self._inner.connect(client, will=will, at_s=at_s)

    def publish(self, client: EdgeClient, topic: str, payload: bytes, *, retain: bool, arrives_s: float) -> None:
        """Hand on, an upload's chunk no earlier than the gap allows."""
        if topic.startswith(self._prefix):
            gap_s = self._gap_s(arrives_s)
            if gap_s > 0:
                arrives_s = max(arrives_s, self._last_s + gap_s)
            self._last_s = arrives_s
        self._inner.publish(client, topic, payload, retain=retain, arrives_s=arrives_s)

    def subscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """Subscribe."""
        self._inner.subscribe(client, topic_filter, arrives_s=arrives_s)

    def unsubscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """Unsubscribe."""
        self._inner.unsubscribe(client, topic_filter, arrives_s=arrives_s)

    def disconnect(self, client: EdgeClient, *, at_s: float, clean: bool) -> None:
        """End the connection."""
        self._inner.disconnect(client, at_s=max(at_s, self._last_s) if clean else at_s, clean=clean)
