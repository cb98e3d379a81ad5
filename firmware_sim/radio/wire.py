"""How many bytes a message is on the wire: MQTT 5, TLS 1.3 and TCP/IP around the payload. Pure arithmetic.

- MQTT 5 (OASIS 2019) 2.1.4, 3.3: a PUBLISH is a byte, a length of 1-4 bytes, a topic with 2 bytes before it, at QoS 1 a
  packet id of 2, properties with a byte before them (the expiry is 5 more), then the payload. PUBACK: 4 bytes
  (3.4.2.1), one more where nobody subscribed.
- TLS 1.3 (RFC 8446, 5.1-5.2): a record of at most 16,384 bytes has a header of 5, a content type of 1, and AES-GCM's
  tag of 16.
- TCP over IPv4: 20 + 20 bytes a segment, and 12 of timestamps (RFC 7323), which leaves 1,448 of Ethernet's 1,500 for
  data. Every second segment is acknowledged (RFC 9293, 3.8.6.3), and so is the last one.

`set_up` was measured with ``python -m benchmarks.connection_bytes``: mosquitto 2.0 and paho-mqtt 2, TLS 1.3 with P-256
certificates on both sides, CONNECT with a last will, CONNACK.
"""

from __future__ import annotations

from typing import NamedTuple

SEGMENT_BYTES = 1448
"""Of TCP's payload in one segment."""
SEGMENT_HEADER_BYTES = 52
"""Of IPv4 and TCP with timestamps."""
_HANDSHAKE_BYTES = 60
"""A SYN: IPv4's header, TCP's, and 20 bytes of options as Linux sends them (MSS, SACK, timestamps, window scale)."""
_RECORD_BYTES, _RECORD_HEADER_BYTES = 16_384, 22
_PUBACK_BYTES = 4
_PING_BYTES = 2
_ALERT_BYTES = 2
_MEASURED_SET_UP = (1473, 2771)


class WireBytes(NamedTuple):
    """What one exchange moves: forwards, in the direction of the message, and back."""

    forth: int
    back: int


def set_up() -> WireBytes:
    """Of a new connection, up and down: TCP's three packets, TLS with both certificates, CONNECT and CONNACK."""
    up, down = _MEASURED_SET_UP
    data, acknowledged = _segments(up), _segments(down)
    return WireBytes(
        up + _HANDSHAKE_BYTES + SEGMENT_HEADER_BYTES * (1 + data + acknowledged),
        down + _HANDSHAKE_BYTES + SEGMENT_HEADER_BYTES * (data + acknowledged),
    )


def publish(topic_bytes: int, payload_bytes: int, *, expires: bool = False) -> WireBytes:
    """Of one message at QoS 1, and of its PUBACK; TCP's acknowledgements go with both.

    Args:
        topic_bytes: length of the topic's UTF-8.
        payload_bytes: of the payload.
        expires: whether it carries an expiry.
    """
    return _exchange(publish_bytes(topic_bytes, payload_bytes, expires=expires), _PUBACK_BYTES)


def subscribe(filter_bytes: int) -> WireBytes:
    """Of a SUBSCRIBE or UNSUBSCRIBE and its answer (MQTT 5, 3.8-3.11)."""
    # Packet id 2, no properties 1, the filter with 2 bytes before it, options 1; the answer has a code instead.
    return _exchange(2 + 2 + 1 + 2 + filter_bytes + 1, 2 + 2 + 1 + 1)


def ping() -> WireBytes:
    """Of a PINGREQ and its answer."""
    return _exchange(_PING_BYTES, _PING_BYTES)


def goodbye() -> WireBytes:
    """Of a DISCONNECT, TLS's close_notify (RFC 8446, 6.1), and the packets that end TCP's connection."""
    return WireBytes(
        tls_bytes(_PING_BYTES) + tls_bytes(_ALERT_BYTES) + 3 * SEGMENT_HEADER_BYTES, 2 * SEGMENT_HEADER_BYTES
    )


def publish_bytes(topic_bytes: int, payload_bytes: int, *, expires: bool = False) -> int:
    """Of an MQTT PUBLISH at QoS 1, without TLS."""
    remaining = 2 + topic_bytes + 2 + 1 + (5 if expires else 0) + payload_bytes
    return 1 + _length_bytes(remaining) + remaining


def tls_bytes(stream_bytes: int) -> int:
    """Of a piece of the stream that is handed to TLS at once, in records."""
    return stream_bytes + _RECORD_HEADER_BYTES * -(-stream_bytes // _RECORD_BYTES)


def _exchange(forth: int, back: int) -> WireBytes:
    """A packet and the small packet that answers it, which carries TCP's last acknowledgement."""
    forth, back = tls_bytes(forth), tls_bytes(back)
    segments = _segments(forth)
    return WireBytes(
        forth + SEGMENT_HEADER_BYTES * (segments + 1),
        back + SEGMENT_HEADER_BYTES * (1 + (segments - 1) // 2),
    )


def _segments(stream_bytes: int) -> int:
    """How many segments TCP cuts this into."""
    return -(-stream_bytes // SEGMENT_BYTES)


def _length_bytes(remaining: int) -> int:
    """Of MQTT's variable byte integer (1.5.5)."""
    return 1 + sum(remaining >= 128**power for power in (1, 2, 3))
