"""A shard's side of the broker: retained messages, who is connected and subscribed, and what the devices have sent.

`firmware_sim.radio.edge.Edge` towards devices. Nothing is routed between devices: they only ever speak with the hub. A
device subscribes to whole topics and to all topics one level below one, nothing else (docs/protocol.md, section 3).
Presence, which is retained, goes no further. Times are true Unix seconds towards devices, and seconds since the fleet's
beginning towards the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from firmware_sim.fleet.windows import Download, Upload
from firmware_sim.radio.edge import EdgeClient
from firmware_sim.shared_models import SharedModels
from fl_protocol.errors import LocalMisuseError
from fl_protocol.topics import parse_upload_topic
from fl_protocol.transport import Connected


class NamedClient(EdgeClient, Protocol):
    """A device's end, that says who it is."""

    @property
    def name(self) -> str:
        """The device's name on the wire."""

    def next_number(self) -> int:
        """Of the next message that the device sends, ascending for ever."""


class ShardEdge:
    """See the module docstring.

    Args:
        began_s: Unix seconds of the fleet's beginning.
        now_s: Unix seconds.
        vectors: what a device hands over in memory, given its name; by update id.

    Attributes:
        retained: by topic.
        models: that the devices share with ``wire = "off"``.
    """

    def __init__(
        self,
        *,
        began_s: float,
        now_s: Callable[[], float],
        vectors: Callable[[str], Mapping[bytes, NDArray[Any]]] = lambda name: {},
    ) -> None:
        self.retained: dict[str, bytes] = {}
        self._vectors, self.models = vectors, SharedModels(self._retained_below)
        self._began_s, self._now_s = began_s, now_s
        self._up: dict[str, list[Upload]] = {}
        self._below: dict[str, dict[str, bytes]] = {}  # retained topics by the topic they are one level below
        self._clients: dict[str, NamedClient] = {}
        self._subscribers: dict[str, dict[str, NamedClient]] = {}
        self._filters: dict[str, set[str]] = {}
        self._is_down = False

    def connect(self, client: EdgeClient, *, will: tuple[str, bytes] | None, at_s: float) -> Connected | None:
        """Accept a connection; another one of the same name is over. None while the broker is down."""
        del will, at_s
        if self._is_down:
            return None
        here = _named(client)
        self._forget(here.name)
        self._clients[here.name] = here
        return Connected()

    def publish(self, client: EdgeClient, topic: str, payload: bytes, *, retain: bool, arrives_s: float) -> None:
        """What a device has sent will be at the broker."""
        here = _named(client)
        number = here.next_number()
        if not retain:
            vectors = self._vectors(here.name)
            values = vectors.get(parse_upload_topic(topic).update_id) if vectors else None
            upload = Upload(arrives_s - self._began_s, here.name, number, topic, payload, values)
            self._up.setdefault(here.name, []).append(upload)

    def subscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """Subscribe a device; matching retained messages are sent to it."""
        if "#" in topic_filter or "+" in topic_filter[:-1]:
            raise LocalMisuseError(f"filter {topic_filter}: expected a topic, or one that ends in /+")
        here = _named(client)
        self._subscribers.setdefault(topic_filter, {})[here.name] = here
        self._filters.setdefault(here.name, set()).add(topic_filter)
        if topic_filter.endswith("/+"):
            matching = list(self._below.get(topic_filter[:-2], {}).items())
        else:
            matching = [(topic_filter, self.retained[topic_filter])] if topic_filter in self.retained else []
        for topic, payload in matching:
            client.deliver(topic, payload, arrives_s)

    def unsubscribe(self, client: EdgeClient, topic_filter: str, *, arrives_s: float) -> None:
        """Take a subscription back."""
        del arrives_s
        name = _named(client).name
        self._filters.get(name, set()).discard(topic_filter)
        self._unsubscribe(name, topic_filter)

    def disconnect(self, client: EdgeClient, *, at_s: float, clean: bool) -> None:
        """End a connection; what would arrive later never does."""
        del clean
        name = _named(client).name
        if self._clients.get(name) is client:
            self._forget(name)
            self._up[name] = [one for one in self._up.get(name, ()) if one.arrives_s <= at_s - self._began_s]

    def take(self, message: Download) -> None:
        """A message from the hub: keep what is retained, and send it to who is there."""
        if not message.device:
            self._retain(message.topic, message.payload)
        if message.payload:
            now_s = self._now_s()
            for client in self._subscribed_to(message.topic):
                client.deliver(message.topic, message.payload, now_s)

    def go_down(self, *, keep_retained: bool) -> None:
        """The broker dies: every connection is cut."""
        self._is_down, now_s = True, self._now_s()
        for name, uploads in self._up.items():  # what would arrive later never does
            self._up[name] = [one for one in uploads if one.arrives_s <= now_s - self._began_s]
        clients = [self._clients[name] for name in sorted(self._clients)]
        for client in clients:
            self._forget(client.name)
            client.cut("the broker is down", now_s)
        if not keep_retained:
            self.retained.clear()
            self._below.clear()

    @property
    def is_down(self) -> bool:
        """Whether the broker is down."""
        return self._is_down

    def come_up(self) -> None:
        """The broker accepts connections again."""
        self._is_down = False

    def take_uploads(self, until_s: float) -> tuple[Upload, ...]:
        """What has arrived before a time, seconds since the beginning, and was not taken; the rest stays."""
        taken: list[Upload] = []
        for name, uploads in list(self._up.items()):
            taken += [one for one in uploads if one.arrives_s < until_s]
            later = [one for one in uploads if one.arrives_s >= until_s]
            if later:
                self._up[name] = later
            else:
                del self._up[name]
        return tuple(taken)

    def next_arrival_s(self) -> float:
        """When the next of what stays arrives, seconds since the beginning."""
        return min((one.arrives_s for uploads in self._up.values() for one in uploads), default=float("inf"))

    def _forget(self, name: str) -> None:
        """A client is gone, with its subscriptions."""
        self._clients.pop(name, None)
        for topic_filter in self._filters.pop(name, ()):
            self._unsubscribe(name, topic_filter)

    def _unsubscribe(self, name: str, topic_filter: str) -> None:
        subscribers = self._subscribers.get(topic_filter, {})
        subscribers.pop(name, None)
        if not subscribers:
            self._subscribers.pop(topic_filter, None)

    def _retained_below(self, topic: str) -> list[bytes]:
        """What is retained one level below a topic."""
        return list(self._below.get(topic, {}).values())

    def _retain(self, topic: str, payload: bytes) -> None:
        """Keep a message, or forget the one that there was."""
        above = topic.rpartition("/")[0]
        if payload:
            self.retained[topic] = payload
            self._below.setdefault(above, {})[topic] = payload
        else:
            self.retained.pop(topic, None)
            self._below.get(above, {}).pop(topic, None)

    def _subscribed_to(self, topic: str) -> list[NamedClient]:
        """Who gets a message, in the order of their names: however they came to be subscribed."""
        exact = self._subscribers.get(topic, {})
        below = self._subscribers.get(f"{topic.rpartition('/')[0]}/+", {})
        found = {**below, **exact}
        return [found[device] for device in sorted(found)]


def _named(client: EdgeClient) -> NamedClient:
    """A device of a shard, which says who it is, whatever is between it and the edge."""
    return cast(NamedClient, client)
