"""Models that devices of one process share: each gets what it would have fetched, or fetches it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from msgspec.structs import replace

from device_client.events import Subscribe, Unsubscribe
from firmware_sim.shared_models import SharedDownload, SharedModels
from firmware_sim.unsealed_wire import NoSigner, NoVerifier
from fl_protocol.chunking import split
from fl_protocol.errors import ProtocolError
from fl_protocol.signing import sign
from fl_protocol.topics import model_topic

VALUES = np.random.default_rng(1).normal(size=1000).astype("<f4")


class Fleet:
    """A process whose edge retains a vector in chunks.

    Args:
        values: the vector.
        missing: how many of its last chunks are not retained.
        digest: that a manifest names, if not the vector's.
    """

    def __init__(self, values: np.ndarray, *, missing: int = 0, digest: bytes | None = None) -> None:
        raw = values.tobytes()
        self.digest = hashlib.sha256(raw).digest() if digest is None else digest
        chunks = [replace(one, digest=self.digest) for one in split(self.digest[:16], raw, data_bytes=500)]
        self.payloads = [sign(chunk, NoSigner()) for chunk in chunks]
        self.retained = self.payloads[: len(self.payloads) - missing]
        self.models = SharedModels(lambda topic: self.retained if f"{topic}/0" == self.topic(0) else [])

    def topic(self, index: int) -> str:
        return model_topic("t", self.digest, index)

    def download(self) -> SharedDownload:
        return SharedDownload(self.models, tenant="t", digest=self.digest, total_bytes=4000, key=NoVerifier())


def test_devices_share_what_one_has_verified_once_the_first_chunk_comes() -> None:
    fleet = Fleet(VALUES)
    one, other = fleet.download(), fleet.download()
    for download in (one, other):
        assert download.start(0.0) == [Subscribe(fleet.topic(0))]
        assert not download.is_whole
        assert download.accept(fleet.topic(0), fleet.payloads[0], 1.0) == [Unsubscribe(fleet.topic(0))]
        assert download.is_whole
        assert download.progress == (1, 1)
    np.testing.assert_array_equal(one.whole(), VALUES)
    assert one.whole() is other.whole()
    assert not one.whole().flags.writeable
    assert one.raw() == VALUES.tobytes()
    assert fleet.models.digest_of(one.whole()) == fleet.digest
    assert fleet.models.digest_of(VALUES) is None


def test_what_is_not_there_as_a_whole_is_fetched_chunk_by_chunk() -> None:
    fleet = Fleet(VALUES, missing=1)
    download = fleet.download()
    download.start(0.0)
    for index, payload in enumerate(fleet.payloads):
        assert download.progress[0] == index
        download.accept(fleet.topic(index), payload, 1.0)
    assert download.is_whole
    np.testing.assert_array_equal(download.whole(), VALUES)


def test_chunks_of_another_vector_than_the_manifest_names_are_refused() -> None:
    fleet = Fleet(VALUES, digest=hashlib.sha256(b"another").digest())
    download = fleet.download()
    download.start(0.0)
    for index, payload in enumerate(fleet.payloads):
        download.accept(fleet.topic(index), payload, 1.0)
    with pytest.raises(ProtocolError, match="does not match"):
        download.whole()


def test_numbers_that_are_not_finite_are_refused_and_the_download_begins_anew() -> None:
    fleet = Fleet(np.where(np.arange(1000) == 7, np.nan, VALUES).astype("<f4"))
    download = fleet.download()
    download.start(0.0)
    download.accept(fleet.topic(0), fleet.payloads[0], 1.0)
    with pytest.raises(ProtocolError, match="not finite"):
        download.whole()
    assert not download.is_whole


def test_models_that_are_not_retained_any_more_are_forgotten_when_another_comes() -> None:
    old, new = Fleet(VALUES), Fleet(2 * VALUES)
    topics = {fleet.topic(0).rpartition("/")[0]: fleet.retained for fleet in (old, new)}
    models = SharedModels(lambda topic: topics.get(topic, []))
    found = []
    for fleet in (old, new):
        found.append(models.find(tenant="t", digest=fleet.digest, total_bytes=4000, key=NoVerifier()))
        topics.pop(old.topic(0).rpartition("/")[0], None)
    first, second = (one.values for one in found if one is not None and one.values is not None)
    assert models.digest_of(first) is None
    assert models.digest_of(second) == new.digest
