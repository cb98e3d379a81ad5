"""A client that tries things at a broker and tells what came of them; on paho, whose reason codes it reads.

MQTT 5 brokers say of each PUBLISH whether it was authorised (section 3.4.2.1), so that nobody with the aggregator's
rights has to watch, whose own connection would be ended by that.
"""

from __future__ import annotations

import queue
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from fl_protocol.adapters.mqtt import TlsFiles

WITHIN_S = 5.0
"""How long a broker may take for anything."""
_SLICE_S = 0.05


class Arrived(NamedTuple):
    """A message that a probe got."""

    topic: str
    payload: bytes


@dataclass
class Probe:
    """One client; used as a context, connected by `connect`.

    Args:
        host: of the broker.
        port: of the broker.
        client_id: that it asks for.
        ca: PEM file of the CA that certified the broker.
        identity: certificate and key; None: it has none.
        tls_1_2: whether it speaks TLS 1.2 at most.
    """

    host: str
    port: int
    client_id: str
    ca: Path
    identity: TlsFiles | None
    tls_1_2: bool = False
    arrived: list[Arrived] = field(default_factory=list, init=False)
    is_connected: bool = field(default=False, init=False)
    refusal: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=self.client_id, protocol=paho.MQTTv5, reconnect_on_failure=False
        )
        self._codes: queue.Queue[tuple[int, int]] = queue.Queue()
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = lambda _c, _u, mid, code, _p: self._codes.put((mid, int(code.value)))
        self._client.on_subscribe = lambda _c, _u, mid, codes, _p: self._codes.put((mid, int(codes[0].value)))
        self._client.on_message = self._on_message

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> bool:
        """Whether the broker let it in, and keeps it for a moment; `refusal` says why not."""
        try:
            self._client.tls_set_context(self._context())
            self._client.connect(self.host, self.port)
        except (OSError, ssl.SSLError) as error:
            self.refusal = str(error)
            return False
        self._client.loop_start()
        ends_s = time.monotonic() + WITHIN_S
        while not self.is_connected and not self.refusal and time.monotonic() < ends_s:
            time.sleep(_SLICE_S)
        if not self.is_connected:
            self.refusal = self.refusal or "it did not answer"
        return self.is_connected

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int | None:
        """The reason code of a PUBLISH: below 0x80 it was taken; None: the connection ended, or no answer came."""
        return self._code_of(self._client.publish(topic, payload, qos=1, retain=retain).mid)

    def subscribe(self, topic_filter: str) -> int | None:
        """The reason code of a SUBSCRIBE; None as above."""
        _, mid = self._client.subscribe(topic_filter, qos=1)
        return None if mid is None else self._code_of(mid)

    def wait(self, seconds: float) -> None:
        """Let messages come, or the connection end."""
        ends_s = time.monotonic() + seconds
        while self.is_connected and time.monotonic() < ends_s:
            time.sleep(_SLICE_S)

    def close(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()

    def _context(self) -> ssl.SSLContext:
        """TLS as this client speaks it."""
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(self.ca))
        if self.tls_1_2:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        if self.identity is not None:
            context.load_cert_chain(str(self.identity.certificate), str(self.identity.key))
        return context

    def _code_of(self, mid: int) -> int | None:
        """The broker's answer to a packet."""
        ends_s = time.monotonic() + WITHIN_S
        while time.monotonic() < ends_s and (self.is_connected or not self._codes.empty()):
            try:
                answered, code = self._codes.get(timeout=_SLICE_S)
            except queue.Empty:
                continue
            if answered == mid:
                return code
        return None

    def _on_connect(self, _client: Any, _userdata: Any, _flags: Any, code: Any, _properties: Any) -> None:
        if code.is_failure:
            self.refusal = str(code)
        else:
            self.is_connected = True

    def _on_disconnect(self, _client: Any, _userdata: Any, _flags: Any, code: Any, _properties: Any) -> None:
        self.is_connected = False
        self.refusal = self.refusal or str(code)

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        self.arrived.append(Arrived(str(message.topic), bytes(message.payload)))
