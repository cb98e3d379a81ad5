"""The transport over paho-mqtt 2: MQTT 5, QoS 1, TLS when configured, reconnecting with back-off.

Callbacks only put events on a queue: an exception inside a paho callback would silently end its thread (one in its
parser ends only the connection, from paho 2.2 on). paho ignores the server's MaximumPacketSize, so it is read here and
handed up; of incoming packets it takes any size up to 256 MB, so the announced limit is held here. What paho holds
back from an older connection is dropped on a new one: resending is the sender's business, and a late duplicate of an
old retained message could replace a newer one. TCP_NODELAY is set: without it a 2 MB update in 120 KiB chunks took 45
ms on loopback, with it 5 ms.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fl_protocol.adapters.inbox import Inbox
from fl_protocol.adapters.openssl_tpm2 import load_cert_chain
from fl_protocol.adapters.paho_client import MAX_INCOMING_BYTES, ExpiresIn, PahoClient
from fl_protocol.back_off import BackOff
from fl_protocol.errors import LocalMisuseError
from fl_protocol.transport import Connected, Disconnected, Received, TransportEvent

MAX_QUEUED_EVENTS = 20_000
"""Inbound events held for a slow consumer; beyond it messages are dropped, and resending covers for them."""
MAX_QUEUED_BYTES = 64 * 1024 * 1024
"""Inbound payload bytes held for a slow consumer; see `MAX_QUEUED_EVENTS`."""
MAX_INFLIGHT_MESSAGES = 10
"""Unacknowledged publishes, unless another number is asked for."""
RECEIVE_MAXIMUM = 1000
"""Unacknowledged messages that a broker which keeps a session may send, unless another number is asked for."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files for mutual TLS: the broker's CA, and this client's P-256 certificate and key."""

    ca: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class LastWill:
    """What the broker publishes (retained) for this client when its connection dies."""

    topic: str
    payload: bytes


class MqttTransport:
    """`fl_protocol.transport.Transport` over one paho client with its own network thread.

    Args:
        host, port: of the broker.
        client_id: which the broker requires to equal the certificate's common name.
        tls: for mutual TLS.
        will: last will.
        keepalive_s: after which a silent connection is taken for dead.
        max_back_off_s: longest wait between attempts to connect.
        clock: seconds, monotonic.
        wake: called, from the network thread, when there is an event or the backlog has shrunk; must not block.
        manual_acknowledgement: what was received stays the broker's until `acknowledge`.
        session_expiry_s: how long the broker is to keep this client's session (subscriptions, and messages not yet
            acknowledged) while it is away; 0 for a clean start each time.
        receive_maximum: with a session, how many unacknowledged messages to let the broker send, 1-65535.
        most_queued_bytes: inbound payload bytes held for a slow consumer.
        room_wait_s: how long a message waits for room there before it is dropped; the broker is not read meanwhile, so
            it has to be far below `keepalive_s`.
        maximum_inflight: most publishes on their way at a time, at least 1; fewer where the broker takes fewer.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        client_id: str,
        tls: TlsFiles | None = None,
        will: LastWill | None = None,
        keepalive_s: int = 30,
        max_back_off_s: int = 60,
        clock: Callable[[], float] = time.monotonic,
        wake: Callable[[], None] = lambda: None,
        manual_acknowledgement: bool = False,
        session_expiry_s: int = 0,
        receive_maximum: int = RECEIVE_MAXIMUM,
        maximum_inflight: int = MAX_INFLIGHT_MESSAGES,
        most_queued_bytes: int = MAX_QUEUED_BYTES,
        room_wait_s: float = 0.0,
    ) -> None:
        if maximum_inflight < 1:  # 0 is paho's word for no limit
            raise LocalMisuseError(f"maximum_inflight: expected at least 1, got {maximum_inflight}")
        try:
            host.encode("idna")
        except UnicodeError as error:  # paho's thread would die of it
            raise LocalMisuseError(f"host: expected a host name or an address, got {host[:80]!r} ({error})") from error
        self._address = (host, port)
        self._keepalive_s = keepalive_s
        self._inbox = Inbox(most_events=MAX_QUEUED_EVENTS, most_bytes=most_queued_bytes, room_wait_s=room_wait_s)
        self._handed_over = self._acknowledged = 0  # each is written by one thread only
        self._wake = wake
        self._manual = manual_acknowledgement
        self._session_expiry_s, self._receive_maximum = session_expiry_s, receive_maximum
        self._maximum_inflight = maximum_inflight
        self._clock, self._back_off, self._max_back_off_s = clock, BackOff(max_back_off_s), max_back_off_s
        client = PahoClient(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=paho.MQTTv5, manual_ack=manual_acknowledgement
        )
        client.max_inflight_messages_set(maximum_inflight)
        if tls is not None:
            client.tls_set_context(tls_context(tls))
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=True)
        client.reconnect_delay_set(min_delay=1, max_delay=max_back_off_s)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_socket_open = _set_nodelay
        client.on_plain_publish = self._on_plain_publish
        self._client = client

    def open(self) -> None:
        """Start connecting in the background; failures arrive as `Disconnected` and are retried with back-off."""
        host, port = self._address
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        # Security: an honest broker then keeps the oversized messages of others away from this client.
        properties.MaximumPacketSize = MAX_INCOMING_BYTES
        keeps_session = self._session_expiry_s > 0
        if keeps_session:
            properties.SessionExpiryInterval = self._session_expiry_s
            properties.ReceiveMaximum = self._receive_maximum
        self._client.connect_async(
            host, port, keepalive=self._keepalive_s, clean_start=not keeps_session, properties=properties
        )
        self._client.loop_start()

    def poll(self, timeout_s: float) -> TransportEvent | None:
        """The next event, or None after `timeout_s`."""
        return self._inbox.take(timeout_s)

    def subscribe(self, topic_filter: str) -> None:
        """Subscribe at QoS 1; doing so again brings the retained messages again."""
        # Measured: iotcore 0.4 sends them for a new subscription only, though MQTT 5 (3.8.4) says always.
        # Not where a session is kept: what came between the two would be lost.
        if not self._session_expiry_s:
            self._client.unsubscribe(topic_filter)
        self._client.subscribe(topic_filter, qos=1)

    def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe."""
        self._client.unsubscribe(topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expires_s: int | None = None) -> None:
        """Publish at QoS 1; lost when not connected. Nothing is concluded from the broker's acknowledgement."""
        if not self._client.is_connected():
            return
        properties: Any = None if expires_s is None else ExpiresIn(min(max(1, expires_s), 2**32 - 1))
        # Not under a lock of ours: paho calls back while it holds one that this call takes.
        sent = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        if sent.rc is MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._handed_over += 1

    def acknowledge(self, message: Received) -> None:
        """Let the broker forget a message; from any thread. Nothing happens where paho has acknowledged it already."""
        if message.delivery is not None and self._client.acknowledgements.settle(message.delivery):
            self._client.wake()

    def backlog(self) -> int:
        """Messages that the broker has not acknowledged."""
        return max(0, self._handed_over - self._acknowledged)

    def close(self) -> None:
        """Disconnect cleanly (the last will is not sent) and end the network thread."""
        self._client.send_acknowledgements()
        self._client.disconnect()
        self._client.loop_stop()

    def _put(self, event: TransportEvent) -> None:
        """Queue an event, or drop it when the consumer is hopelessly behind; then wake the consumer."""
        self._drop(self._inbox.put(event))
        self._wake()

    def _drop(self, event: TransportEvent | None) -> None:
        """Nobody will see it. Its sender sends it again; kept unacknowledged, it would narrow the window for ever."""
        if isinstance(event, Received):
            self.acknowledge(event)

    def _on_connect(
        self, _c: Any, _u: Any, flags: paho.ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._put(Disconnected(f"broker refused the connection: {reason}"))
        else:
            self._back_off.connected(self._clock())
            self._client.drop_out_messages()
            self._acknowledged = self._handed_over
            packet_bytes, receive_maximum = (
                getattr(properties, name, None) for name in ("MaximumPacketSize", "ReceiveMaximum")
            )
            # 0, which no broker may name, is paho's word for no limit.
            self._client.limit_inflight(max(1, min(self._maximum_inflight, receive_maximum or 65535)))
            self._put(Connected(packet_bytes, receive_maximum, session_present=flags.session_present))

    def _on_publish(self, _c: Any, _u: Any, _mid: int, _reason: ReasonCode, _properties: Any) -> None:
        self._acknowledged += 1
        self._wake()

    def _on_connect_fail(self, _client: Any, _userdata: Any) -> None:
        host, port = self._address
        if why := self._client.refused_certificate:
            clock = "; check this machine's clock first" if "expired" in why or "not yet valid" in why else ""
            self._put(Disconnected(f"the broker's certificate at {host}:{port} is not accepted: {why}{clock}"))
        else:
            self._put(Disconnected(f"no broker reachable at {host}:{port}"))

    def _on_disconnect(self, _c: Any, _u: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self._acknowledged = self._handed_over
        # paho begins anew with its shortest wait after every connection that was accepted, however short.
        wait_s = self._back_off.ended(self._clock())
        self._client.reconnect_delay_set(min_delay=wait_s, max_delay=self._max_back_off_s)
        size, self._client.too_large_bytes = self._client.too_large_bytes, 0
        too_large = f"it sent a packet of {size} bytes, and announced as the most were {MAX_INCOMING_BYTES}"
        self._put(Disconnected(f"connection to the broker ended: {too_large if size else reason}"))

    def _on_message(self, _client: Any, _userdata: Any, message: paho.MQTTMessage) -> None:
        self._on_plain_publish(message._topic, message.mid, bytes(message.payload))

    def _on_plain_publish(self, topic: bytes, packet_id: int, payload: bytes) -> None:
        """A message; `packet_id` is 0 for one that nobody acknowledges."""
        delivery = self._client.acknowledgements.arrived(packet_id) if self._manual and packet_id else None
        try:
            name = topic.decode()
        except UnicodeDecodeError:  # a hostile broker may send a topic that is not UTF-8
            self._drop(Received("", b"", delivery))
        else:
            self._put(Received(name, payload, delivery))


def tls_context(files: TlsFiles) -> ssl.SSLContext:
    """TLS 1.3 only, both sides authenticated; the key in the file may be one that only a TPM can use.

    Raises:
        LocalMisuseError: a file cannot be used, or there is no provider for a TPM's key.
    """
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=str(files.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        load_cert_chain(context, files.certificate, files.key)
    except (OSError, ssl.SSLError) as error:
        raise LocalMisuseError(
            f"TLS files: expected PEM files at {files.ca}, {files.certificate} and {files.key}; {error}"
        ) from error
    return context


def _set_nodelay(_client: Any, _userdata: Any, sock: Any) -> None:
    """Switch Nagle's algorithm off (see the module docstring)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
