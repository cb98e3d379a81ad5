"""Chunk sizes that fit the server, and refuse servers that fit no chunk."""

from __future__ import annotations

import pytest

from fl_protocol.chunking import split
from fl_protocol.errors import LocalMisuseError
from fl_protocol.limits import (
    CHUNK_HEADER_BYTES,
    MAX_PACKET_BYTES,
    MAX_PARAMETERS,
    MAX_TRANSFER_BYTES,
    MIN_CHUNK_DATA_BYTES,
    PACKET_RESERVE_BYTES,
    chunk_data_bytes,
)
from fl_protocol.messages import UpdateBodyMsg, UpdateEnvelopeMsg, decode, encode
from fl_protocol.sealing import seal_update
from fl_protocol.signing import sign
from fl_protocol.topics import upload_topic
from tests.fl_protocol.examples import AGGREGATOR_KEY, DEVICE_KEY, UPDATE_ID, manifest

SMALLEST = MIN_CHUNK_DATA_BYTES + CHUNK_HEADER_BYTES + PACKET_RESERVE_BYTES


@pytest.mark.parametrize("server", [None, 128 * 1024, 2**32, SMALLEST, SMALLEST + 1, 10_000, 98_304])
def test_an_encoded_chunk_signed_or_not_and_its_topic_fit_the_servers_packet(server: int | None) -> None:
    data_bytes = chunk_data_bytes(server)
    (chunk, *_) = split(UPDATE_ID, bytes(3 * data_bytes), data_bytes=data_bytes)
    payload = sign(chunk, AGGREGATOR_KEY)
    assert len(payload) > len(encode(chunk))
    assert len(payload) <= MAX_PACKET_BYTES
    topic = upload_topic("x" * 64, "x" * 64, UPDATE_ID, 65_535)
    assert server is None or len(payload) + len(topic) + 64 <= server  # 64: the rest of the PUBLISH header


@pytest.mark.parametrize("server", [0, 1, 1024, SMALLEST - 1])
def test_a_server_that_takes_no_chunk_is_refused(server: int) -> None:
    with pytest.raises(LocalMisuseError, match=f"expected at least {SMALLEST}, got {server}; raise the broker's limit"):
        chunk_data_bytes(server)


def test_the_largest_update_fits_one_transfer_under_either_kem() -> None:
    body = UpdateBodyMsg(num_parameters=MAX_PARAMETERS, values=bytes(4 * MAX_PARAMETERS))
    names = {"tenant": "x" * 64, "task": "x" * 64, "num_parameters": MAX_PARAMETERS}
    for kem in ("x25519", "mlkem768-x25519"):
        whole = seal_update(
            body, manifest=manifest(kem, **names), device="x" * 64, update_id=UPDATE_ID, signing_key=DEVICE_KEY
        )
        assert len(whole) <= MAX_TRANSFER_BYTES
        assert len(decode(whole, UpdateEnvelopeMsg).header) <= 4096
