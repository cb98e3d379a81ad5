"""A shard's side of the broker: retained messages, who is connected and subscribed, and what the devices have sent.

Nothing is routed between devices: they only ever speak with the hub. A device subscribes to whole topics and to all
topics one level below one, nothing else (docs/protocol.md, section 3).
"""

from __future__ import annotations

from collections.abc import Callable

from firmware_sim.fleet.windows import Download, Upload
from fl_protocol.errors import LocalMisuseError

Deliver = Callable[[str, bytes], None]
"""Takes topic and payload of a message that leaves the broker for one device, now."""


class Edge:
    """See the module docstring.

    Attributes:
        retained: by topic.
        up: what devices sent since `take_uploads`.
    """

    def __init__(self) -> None:
        self.retained: dict[str, bytes] = {}
        self.up: list[Upload] = []
        self._below: dict[str, dict[str, bytes]] = {}  # retained topics by the topic they are one level below
        self._subscribers: dict[str, dict[str, Deliver]] = {}

    def take(self, message: Download) -> None:
        """A message from the hub: deliver it to who is there, and keep what is retained."""
        if not message.device:
            self._retain(message.topic, message.payload)
        if message.payload:
            for deliver in self._subscribed_to(message.topic):
                deliver(message.topic, message.payload)

    def subscribe(self, device: str, topic_filter: str, deliver: Deliver) -> None:
        """Subscribe a device; matching retained messages come at once."""
        if "#" in topic_filter or "+" in topic_filter[:-1]:
            raise LocalMisuseError(f"filter {topic_filter}: expected a topic, or one that ends in /+")
        self._subscribers.setdefault(topic_filter, {})[device] = deliver
        if topic_filter.endswith("/+"):
            matching = list(self._below.get(topic_filter[:-2], {}).items())
        else:
            matching = [(topic_filter, self.retained[topic_filter])] if topic_filter in self.retained else []
        for topic, payload in matching:
            deliver(topic, payload)

    def unsubscribe(self, device: str, topic_filter: str) -> None:
        """Take a subscription back."""
        subscribers = self._subscribers.get(topic_filter, {})
        subscribers.pop(device, None)
        if not subscribers:
            self._subscribers.pop(topic_filter, None)

    def publish(self, upload: Upload) -> None:
        """What a device has sent arrives at the broker."""
        self.up.append(upload)

    def take_uploads(self) -> tuple[Upload, ...]:
        """What was sent since the last call."""
        up, self.up = tuple(self.up), []
        return up

    def _retain(self, topic: str, payload: bytes) -> None:
        """Keep a message, or forget the one that there was."""
        above = topic.rpartition("/")[0]
        if payload:
            self.retained[topic] = payload
            self._below.setdefault(above, {})[topic] = payload
        else:
            self.retained.pop(topic, None)
            self._below.get(above, {}).pop(topic, None)

    def _subscribed_to(self, topic: str) -> list[Deliver]:
        """Who gets a message, in the order of their names: however they came to be subscribed."""
        exact = self._subscribers.get(topic, {})
        below = self._subscribers.get(f"{topic.rpartition('/')[0]}/+", {})
        found = {**below, **exact}
        return [found[device] for device in sorted(found)]
