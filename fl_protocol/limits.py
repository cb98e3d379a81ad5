"""Sizes that both sides obey, so that no message and no peer can exhaust the other."""

from __future__ import annotations

from fl_protocol.errors import LocalMisuseError

MAX_PACKET_BYTES = 96 * 1024
"""Largest MQTT payload we send; cloud brokers refuse packets over 128 KB."""

PACKET_RESERVE_BYTES = 1024
"""Room left below a server's MaximumPacketSize for the MQTT header and topic."""

CHUNK_HEADER_BYTES = 256
"""Upper bound on what `ChunkMsg` adds to its data when encoded."""

MIN_CHUNK_DATA_BYTES = 256
"""Smallest chunk we cut; more chunks than that gives are refused, so bookkeeping stays small beside the data."""

MAX_TRANSFER_BYTES = 16 * 1024 * 1024
"""Largest update or model that is reassembled."""

MAX_CHUNKS = MAX_TRANSFER_BYTES // MIN_CHUNK_DATA_BYTES
"""Most chunks a transfer is cut into: 65,536."""

MAX_OPEN_TRANSFERS = 4
"""Transfers one peer may have half-sent at a time."""

MAX_PARAMETERS = 4 * 1000 * 1000
"""Largest d, so that float32 parameters and an envelope fit in one transfer."""

NUM_SHARDS = 64
"""Hash shards of the upload topic (a worker leases whole shards)."""


def chunk_data_bytes(server_maximum_packet_bytes: int | None) -> int:
    """Bytes of data per chunk under a server's advertised MaximumPacketSize (None: the server named none).

    Raises:
        LocalMisuseError: the server's limit leaves no room for a chunk.
    """
    packet = MAX_PACKET_BYTES
    if server_maximum_packet_bytes is not None:
        packet = min(packet, server_maximum_packet_bytes - PACKET_RESERVE_BYTES)
    least = MIN_CHUNK_DATA_BYTES + CHUNK_HEADER_BYTES
    if packet < least:
        raise LocalMisuseError(
            f"server_maximum_packet_bytes: expected at least {PACKET_RESERVE_BYTES + least}, "
            f"got {server_maximum_packet_bytes}; raise the broker's limit"
        )
    return packet - CHUNK_HEADER_BYTES
