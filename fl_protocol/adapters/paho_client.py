"""paho-mqtt's client, made to take less: no packet larger than was announced, and less time for each.

What was measured of paho 2.2 (benchmarks/mqtt_receive.py) and is done otherwise here: it reads a packet's header byte
by byte, each a system call, and asks select for every packet; here one read takes what has come, and packets are served
from memory. It makes an object of 27 possible properties for every message and acknowledgement; here messages with no
property but an expiry are taken apart directly, and all others by paho. It goes through all messages on their way at
every acknowledgement; here only when some are held back. Acknowledgements of one batch leave in one piece.

These methods are paho's inner ones. Should another version not call them, then messages take paho's way and
tests/contracts/test_paho_client.py says so. Each of them either does what paho does or leaves it to paho.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fl_protocol.adapters.acknowledgements import Acknowledgements
from fl_protocol.limits import MAX_PACKET_BYTES, PACKET_RESERVE_BYTES

MAX_INCOMING_BYTES = MAX_PACKET_BYTES + PACKET_RESERVE_BYTES
"""Largest packet taken from a broker: announced to it, and a larger one ends the connection before it is read."""
READ_BYTES = 64 * 1024
"""Most bytes taken from the socket at once; four times as many were no faster."""
PACKETS_AT_ONCE = 64
"""Packets served from memory before paho may write, ping and look whether it should end."""
_QOS_BITS, _EXACTLY_ONCE = 0b0110, 0b0100
_NO_PROPERTIES, _ONLY_EXPIRY = b"\x00", b"\x05\x02"
_DONE = frozenset({b"", b"\x00", b"\x10"})
"""Reason codes of a PUBACK without properties: none, success, and that nobody subscribed (MQTT 5, section 3.4.2.1)."""
_SUCCESS = ReasonCode(PacketTypes.PUBACK)
_NOTHING = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]


def plain_publish(command: int, packet: bytes | bytearray) -> tuple[bytes, int, bytes] | None:
    """Topic, packet id (0 without one) and payload of a PUBLISH that has no property but an expiry; None for others.

    Args:
        command: first byte of the packet.
        packet: what follows its length.
    """
    topic_end = 2 + int.from_bytes(packet[:2], "big")
    start = topic_end + (2 if command & _QOS_BITS else 0)
    if packet[start : start + 1] == _NO_PROPERTIES:
        data = start + 1
    elif packet[start : start + 2] == _ONLY_EXPIRY and len(packet) >= start + 6:
        data = start + 6
    else:
        return None
    return bytes(packet[2:topic_end]), int.from_bytes(packet[topic_end:start], "big"), bytes(memoryview(packet)[data:])


class ExpiresIn:
    """The properties of a PUBLISH that expires; paho's own class takes 60 us for it.

    Args:
        seconds: 1 to 2^32 - 1.
    """

    def __init__(self, seconds: int) -> None:
        self._packed = _ONLY_EXPIRY + seconds.to_bytes(4, "big")

    def pack(self) -> bytes:
        """As they are sent."""
        return self._packed


class PahoClient(paho.Client):
    """A paho client that hangs up on a packet larger than was announced, and serves packets from memory.

    Set before it connects: `acknowledgements`, and `on_plain_publish`, which gets topic, packet id (0 without one) and
    payload of the messages that need not go through paho's `on_message`.
    """

    too_large_bytes = 0
    refused_certificate = ""
    """Why the server's certificate was not accepted at the last attempt, in OpenSSL's words; empty if it was."""
    on_plain_publish: Callable[[bytes, int, bytes], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.acknowledgements = Acknowledgements()
        self._unread = memoryview(b"")

    def reconnect(self) -> MQTTErrorCode:
        """Every attempt to connect, the first one included: nothing of the connection before may be left."""
        self.acknowledgements.forget_all()
        self._unread = memoryview(b"")
        self.refused_certificate = ""
        try:
            return super().reconnect()
        except ssl.SSLCertVerificationError as error:
            self.refused_certificate = error.verify_message
            raise

    def limit_inflight(self, messages: int) -> None:
        """Paho ignores the server's ReceiveMaximum, and lets nobody change its own limit while connected."""
        with self._out_message_mutex:
            self._max_inflight_messages = messages

    def wake(self) -> None:
        """Let the network thread look what is to be sent."""
        bell = self._sockpairW
        if bell is not None:
            with contextlib.suppress(OSError):  # full: it is awake; closed: it is gone
                bell.send(b"0")

    def send_acknowledgements(self) -> None:
        """Queue the acknowledgements that are due."""
        self.acknowledgements.hand_over(lambda packets: self._packet_queue(paho.PUBACK, packets, 0, 1))

    def _loop(self, timeout: float = 1.0) -> MQTTErrorCode:
        """One step of the network thread; what is in memory comes first, since select does not know of it."""
        self.send_acknowledgements()
        if self._unread:
            rc = self.loop_read()
            if rc or self._sock is None:
                return rc
        return super()._loop(0.0 if self._unread else timeout)

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """As paho's, and on until nothing is left in memory, or long enough."""
        rc = super().loop_read(max_packets)
        for _ in range(PACKETS_AT_ONCE):
            if rc or self._sock is None or not self._unread:
                break
            rc = super().loop_read(max_packets)
        return rc

    def _sock_recv(self, bufsize: int) -> bytes:
        """Security: paho asks its socket for all that a packet's header announces, before it has any of it."""
        if bufsize > MAX_INCOMING_BYTES:
            self.too_large_bytes = bufsize
            raise ConnectionAbortedError(f"a packet of {bufsize} bytes")  # for paho the connection is lost
        if not self._unread:
            self._unread = memoryview(super()._sock_recv(READ_BYTES))
        piece, self._unread = self._unread[:bufsize], self._unread[bufsize:]
        return piece  # type: ignore[return-value]  # paho measures it, indexes it and adds it to a bytearray

    def _handle_publish(self) -> MQTTErrorCode:
        """A message. QoS 2 is refused: nobody here asks for it, and paho would hold such messages without a bound."""
        command, packet = self._in_packet["command"], self._in_packet["packet"]
        if command & _EXACTLY_ONCE:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        message = plain_publish(command, packet)
        if message is None or self.on_plain_publish is None:
            return super()._handle_publish()
        topic, packet_id, payload = message
        self.on_plain_publish(topic, packet_id, payload)
        if command & _QOS_BITS and not self._manual_ack:
            return self._send_puback(packet_id)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_pubackcomp(self, cmd: Literal["PUBACK", "PUBCOMP"]) -> MQTTErrorCode:
        """The broker's acknowledgement of a message of ours."""
        packet = self._in_packet["packet"]
        if cmd != "PUBACK" or len(packet) < 2 or bytes(packet[2:]) not in _DONE:
            return super()._handle_pubackcomp(cmd)
        packet_id = int.from_bytes(packet[:2], "big")
        with self._out_message_mutex:
            if packet_id in self._out_messages:
                return self._do_on_publish(packet_id, _SUCCESS, _NOTHING)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _update_inflight(self) -> MQTTErrorCode:
        """Send what was held back. paho goes through all messages on their way for that, at every acknowledgement."""
        if len(self._out_messages) <= self._inflight_messages:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        return super()._update_inflight()
