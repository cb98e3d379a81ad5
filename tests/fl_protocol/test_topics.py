"""Topic names: built and parsed back, at most seven slashes, nothing hostile in between."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.limits import NUM_SHARDS
from fl_protocol.topics import (
    UploadTopic,
    checked_name,
    down_filter,
    down_topic,
    model_filter,
    model_topic,
    parse_upload_topic,
    round_topic,
    shard_of,
    state_topic,
    upload_filter,
    upload_topic,
)

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,63}", fullmatch=True)
ids = st.binary(min_size=16, max_size=16)
GOOD = upload_topic("clinic", "watch-1", bytes(range(16)), 7)
HOSTILE = ["", "A", "a/b", "+", "#", "a+", "$sys", "-a", "_a", "a b", "a\n", "a\0", "é", "x" * 65, "..", "a\u200b"]


@given(tenant=names, device=names, update_id=ids, index=st.integers(0, 65_535))
def test_an_upload_topic_is_parsed_back(tenant: str, device: str, update_id: bytes, index: int) -> None:
    topic = upload_topic(tenant, device, update_id, index)
    assert parse_upload_topic(topic) == UploadTopic(tenant, device, update_id, index)
    assert topic.count("/") <= 7
    assert len(topic.encode()) <= 256


def test_no_topic_has_more_than_seven_slashes() -> None:
    longest = "x" * 64
    for topic in (
        round_topic(longest, longest),
        model_topic(longest, bytes(32), 65_535),
        model_filter(longest, bytes(32)),
        upload_topic(longest, longest, bytes(16), 65_535),
        upload_filter(longest),
        down_topic(longest, longest, "receipt"),
        down_filter(longest, longest),
        state_topic(longest, longest),
    ):
        assert topic.count("/") <= 7
        assert topic.startswith(f"fl/v1/{longest}/")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_gets_into_no_topic(name: str) -> None:
    for build in (
        lambda: round_topic(name, "task"),
        lambda: round_topic("tenant", name),
        lambda: model_topic(name, bytes(32), 0),
        lambda: upload_topic(name, "device", bytes(16), 0),
        lambda: upload_topic("tenant", name, bytes(16), 0),
        lambda: upload_filter(name),
        lambda: down_topic("tenant", name, "nack"),
        lambda: down_filter(name, "device"),
        lambda: state_topic("tenant", name),
        lambda: checked_name(name, "name"),
    ):
        with pytest.raises(LocalMisuseError, match="expected 1 to 64 of"):
            build()


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fl/v1",
        GOOD + "/",
        "/" + GOOD,
        GOOD + "\n",
        GOOD + "/0",
        GOOD.replace("/up/", "/down/"),
        GOOD.replace("fl/v1", "fl/v2"),
        GOOD.replace("clinic", "Clinic"),
        GOOD.replace("clinic", "+"),
        GOOD.replace("clinic", "x" * 65),
        GOOD.replace("watch-1", "watch-1\0"),
        GOOD.replace("0001", "00G1"),
        GOOD.replace("000102", "0102"),
        GOOD.replace("0a0b", "0A0B"),
        GOOD[:-1] + "07",  # one chunk has one topic
        GOOD[:-1] + "-7",
        GOOD[:-1] + "65536",
        GOOD[:-1] + "100000",
        GOOD[:-1] + "٧",  # a digit, but not an ASCII one
        "fl/v1/" + "clinic/" * 10_000,
    ],
    ids=lambda topic: repr(topic[-30:]),
)
def test_what_is_no_upload_topic_is_refused(topic: str) -> None:
    with pytest.raises(ProtocolError, match="expected an upload topic") as caught:
        parse_upload_topic(topic)
    assert len(str(caught.value)) < 1000  # a log line that the sender cannot blow up


def test_an_upload_in_another_devices_shard_is_refused() -> None:
    right = f"{shard_of('watch-1'):02d}"
    assert f"/up/{right}/" in GOOD
    for shard in range(100):
        if f"{shard:02d}" != right:
            with pytest.raises(ProtocolError, match=f"expected shard {right} for watch-1"):
                parse_upload_topic(GOOD.replace(f"/up/{right}/", f"/up/{shard:02d}/"))


@given(topic=st.text() | st.from_regex(r"fl/v1/[a-z]{1,3}/up/[0-9]{2}/[a-z]{1,3}/[0-9a-f]{31,33}/[0-9]{1,6}\n?"))
def test_any_text_is_parsed_or_refused(topic: str) -> None:
    try:
        parts = parse_upload_topic(topic)
    except ProtocolError:
        return
    assert upload_topic(parts.tenant, parts.device, parts.update_id, parts.chunk_index) == topic


def test_shards_spread_over_all_sixty_four() -> None:
    shards = [shard_of(f"watch-{number}") for number in range(10_000)]
    assert set(shards) == set(range(NUM_SHARDS))
    assert shard_of("watch-1") == hashlib.sha256(b"watch-1").digest()[0] % 64
