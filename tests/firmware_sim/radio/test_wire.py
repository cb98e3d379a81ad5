"""Bytes on the wire, against what ``python -m benchmarks.connection_bytes`` counted between paho and mosquitto."""

from __future__ import annotations

import pytest

from firmware_sim.radio import wire


@pytest.mark.parametrize(("payload", "counted"), [(0, 99), (1_000, 1_100), (20_000, 20_123), (98_304, 98_537)])
def test_a_publish_is_as_long_as_was_counted(payload: int, counted: int) -> None:
    assert wire.tls_bytes(wire.publish_bytes(65, payload, expires=True)) == counted


def test_a_ping_is_as_long_as_was_counted() -> None:
    headers = 2 * wire.SEGMENT_HEADER_BYTES
    assert wire.ping() == (24 + headers, 24 + wire.SEGMENT_HEADER_BYTES)


def test_tcp_s_headers_are_one_in_28_of_a_large_message() -> None:
    forth, back = wire.publish(65, 96 * 1024)
    assert forth == 98_532 + (69 + 1) * 52  # 69 segments, and the acknowledgement of the PUBACK
    assert back == 26 + (1 + 34) * 52


def test_setting_up_a_connection_costs_as_much_as_a_small_update() -> None:
    up, down = wire.set_up()
    assert up == 1473 + 60 + 52 * (1 + 2 + 2)
    assert down == 2771 + 60 + 52 * (2 + 2)
