"""Replays every vector file, must-fail ones included, and checks that the deterministic ones are reproduced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from aggregator.adapters.local_blobs import LocalBlobs
from aggregator.committer import Accepted, Committer, PendingUpdate
from aggregator.ingest import RoundInForce, TaskInForce
from aggregator.store.aggregator_store import AggregatorStore
from aggregator.store.database import Database
from fl_protocol import signing, topics
from fl_protocol.chunking import Reassembler, missing_bitmap, missing_indices
from fl_protocol.errors import LocalMisuseError, ProtocolError, RefusedError
from fl_protocol.message_base import Msg
from fl_protocol.messages import ChunkMsg, PresenceMsg, SignedMsg, UpdateEnvelopeMsg, UpdateHeaderMsg, decode, encode
from fl_protocol.model_delta import apply_delta
from fl_protocol.sealing import RoundKey, open_update, seal_info
from fl_protocol.update_encoding import decode_values, rotation_seed
from tests.ids import short_id
from tests.vectors.generate import DETERMINISTIC, FOLDER, RANDOMISED, text_of
from tests.vectors.update_vectors import plain

SUMS_SECRET = bytes(32)
FILES: dict[str, Any] = {
    name: json.loads((FOLDER / f"{name}.json").read_text()) for name in {**DETERMINISTIC, **RANDOMISED}
}


def label(vector: Any) -> str:
    return "-".join(str(vector[key]) for key in ("kind", "kem", "encoding", "why", "name") if key in vector)


def each(file: str, part: str) -> pytest.MarkDecorator:
    vectors = FILES[file][part]
    assert vectors
    return pytest.mark.parametrize("vector", vectors, ids=label)


def kind_of(vector: dict[str, Any]) -> Any:
    return next(kind for kind in Msg.__subclasses__() if kind.__name__ == vector["kind"])


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_generator_reproduces_the_deterministic_files_bit_by_bit(name: str) -> None:
    assert text_of(DETERMINISTIC[name]()) == (FOLDER / f"{name}.json").read_text()


def test_every_file_in_the_folder_is_replayed_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(FILES)


def test_every_kind_of_message_has_a_vector() -> None:
    # The simulator has one of its own, which goes over no wire.
    kinds = {kind.__name__ for kind in Msg.__subclasses__() if kind.__module__.startswith("fl_protocol.")}
    assert {vector["kind"] for vector in FILES["messages"]["valid"]} == kinds


@each("messages", "valid")
def test_a_message_has_these_fields_and_this_encoding(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["encoded"])
    message = decode(data, kind_of(vector))
    assert plain(message) == vector["fields"]
    assert encode(message) == data


@each("messages", "must_fail")
def test_a_bad_encoding_is_refused(vector: dict[str, Any]) -> None:
    assert vector["error"] == "ProtocolError"
    with pytest.raises(ProtocolError):
        decode(bytes.fromhex(vector["encoded"]), kind_of(vector))


def aggregator_key() -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(FILES["signing"]["aggregator_public_key"]))


@each("signing", "valid")
def test_a_signature_is_made_and_verified(vector: dict[str, Any]) -> None:
    signed = bytes.fromhex(vector["signed"])
    message = signing.verify(signed, kind_of(vector), aggregator_key())
    assert encode(message).hex() == vector["payload"]
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(FILES["signing"]["aggregator_seed"]))
    assert signing.sign(message, key) == signed
    assert decode(signed, SignedMsg).signature == key.sign(bytes.fromhex(vector["context"] + vector["payload"]))


def test_a_header_signature_is_made_and_verified() -> None:
    vector, seed = FILES["signing"]["header"], bytes.fromhex(FILES["signing"]["device_seed"])
    key = Ed25519PrivateKey.from_private_bytes(seed)
    header, signature = bytes.fromhex(vector["header"]), bytes.fromhex(vector["signature"])
    assert signing.sign_header(header, key) == signature == key.sign(bytes.fromhex(vector["context"]) + header)
    assert signing.header_signature_is_valid(header, signature, key.public_key())
    assert key.public_key().public_bytes_raw().hex() == FILES["signing"]["device_public_key"]


@each("signing", "must_fail")
def test_a_bad_signature_is_refused(vector: dict[str, Any]) -> None:
    assert vector["error"] == "ProtocolError"
    with pytest.raises(ProtocolError):
        signing.verify(bytes.fromhex(vector["signed"]), kind_of(vector), aggregator_key())


@each("sealing", "valid")
def test_a_sealed_update_opens(vector: dict[str, Any]) -> None:
    key = RoundKey(vector["kem"], bytes.fromhex(vector["secret"]))
    envelope = decode(bytes.fromhex(vector["envelope"]), UpdateEnvelopeMsg)
    header = decode(envelope.header, UpdateHeaderMsg)
    assert plain(header) == vector["header"]
    assert envelope.sealed.hex() == vector["sealed"]
    assert key.recipient().public_key.hex() == vector["public_key"]
    assert encode(open_update(header, envelope.sealed, key)).hex() == vector["plaintext"]
    info = seal_info(
        tenant=header.tenant,
        task=header.task,
        round_number=header.round,
        model_digest=header.model_digest,
        device=header.device,
        update_id=header.update_id,
    )
    assert info.hex() == vector["info"]


@each("sealing", "must_fail")
def test_what_was_changed_does_not_open(vector: dict[str, Any]) -> None:
    assert vector["error"] == "ProtocolError"
    header = decode(bytes.fromhex(vector["header"]), UpdateHeaderMsg)
    with pytest.raises(ProtocolError):
        open_update(header, bytes.fromhex(vector["sealed"]), RoundKey(vector["kem"], bytes.fromhex(vector["secret"])))


@each("chunks", "sequences")
def test_a_sequence_of_chunks_gives_what_it_should(vector: dict[str, Any]) -> None:
    reassembler = Reassembler(max_bytes=vector["max_bytes"], max_transfers=FILES["chunks"]["max_transfers"])
    for now_s, step in enumerate(vector["steps"]):
        chunk = decode(bytes.fromhex(step["chunk"]), ChunkMsg)
        if "refused" in step:
            with pytest.raises(RefusedError) as caught:
                reassembler.accept(chunk, float(now_s))
            assert caught.value.reason.value == step["refused"]
        else:
            whole = reassembler.accept(chunk, float(now_s))
            assert (None if whole is None else whole.hex()) == step["whole"]


@each("chunks", "missing_bitmaps")
def test_a_bitmap_names_the_missing_chunks(vector: dict[str, Any]) -> None:
    count, present = vector["count"], vector["present"]
    assert missing_bitmap(count, set(present)).hex() == vector["bitmap"]
    assert missing_indices(bytes.fromhex(vector["bitmap"]), count) == [i for i in range(count) if i not in present]


def test_topics_have_these_names() -> None:
    vectors = FILES["topics"]
    tenant, task, device, index = (vectors[key] for key in ("tenant", "task", "device", "index"))
    digest, update_id = bytes.fromhex(vectors["model_digest"]), bytes.fromhex(vectors["update_id"])
    assert vectors["topics"] == {
        "round": topics.round_topic(tenant, task),
        "model": topics.model_topic(tenant, digest, index),
        "model_filter": topics.model_filter(tenant, digest),
        "upload": topics.upload_topic(tenant, device, update_id, index),
        "upload_filter": topics.upload_filter(tenant),
        "receipt": topics.down_topic(tenant, device, "receipt"),
        "nack": topics.down_topic(tenant, device, "nack"),
        "down_filter": topics.down_filter(tenant, device),
        "state": topics.state_topic(tenant, device),
    }
    assert topics.parse_upload_topic(vectors["topics"]["upload"]) == (tenant, device, update_id, index)
    assert {device: topics.shard_of(device) for device in vectors["shards"]} == vectors["shards"]


@pytest.mark.parametrize("topic", FILES["topics"]["must_fail"], ids=short_id)
def test_a_bad_upload_topic_is_refused(topic: str) -> None:
    with pytest.raises(ProtocolError):
        topics.parse_upload_topic(topic)


@each("encodings", "valid")
def test_values_in_an_encoding_stand_for_these(vector: dict[str, Any]) -> None:
    seed = rotation_seed(bytes.fromhex(FILES["encodings"]["model_digest"]), FILES["encodings"]["round"])
    assert seed.hex() == FILES["encodings"]["rotation_seed"]
    raw, length = bytes.fromhex(vector["values"]), vector["num_parameters"]
    decoded = decode_values(raw, vector["encoding"], num_parameters=length, seed=seed)
    assert decoded.astype("<f4").tobytes().hex() == vector["decoded"]


@each("encodings", "must_fail")
def test_values_in_no_encoding_are_refused(vector: dict[str, Any]) -> None:
    seed = bytes.fromhex(FILES["encodings"]["rotation_seed"])
    with pytest.raises(ProtocolError) as caught:
        decode_values(bytes.fromhex(vector["values"]), vector["encoding"], num_parameters=3, seed=seed)
    # What has no reason of its own is refused as an encoding that is none.
    reason = caught.value.reason.value if isinstance(caught.value, RefusedError) else "wrong_encoding"
    assert reason == vector["error"]


def floats(data: str) -> NDArray[np.float32]:
    return np.frombuffer(bytes.fromhex(data), "<f4").astype(np.float32)


@each("encodings", "deltas")
def test_a_delta_leads_to_this_model(vector: dict[str, Any]) -> None:
    after = apply_delta(floats(vector["previous"]), bytes.fromhex(vector["delta"]))
    assert after.astype("<f4").tobytes().hex() == vector["next"]


@each("encodings", "deltas_must_fail")
def test_what_is_no_delta_is_refused(vector: dict[str, Any]) -> None:
    assert vector["error"] == "ProtocolError"
    with pytest.raises(ProtocolError):
        apply_delta(floats(vector["previous"]), bytes.fromhex(vector["delta"]))


def topic_of(envelope: bytes) -> bytes:
    """The update id whose topic an envelope comes on: its own, if it has one."""
    try:
        return decode(decode(envelope, UpdateEnvelopeMsg).header, UpdateHeaderMsg).update_id
    except ProtocolError:
        return bytes(16)


def task_in_force(vectors: dict[str, Any]) -> TaskInForce:
    """The aggregator's one task, as the vectors describe it."""
    rounds = [
        RoundInForce(
            one["round"],
            bytes.fromhex(one["model_digest"]),
            RoundKey(vectors["kem"], bytes.fromhex(one["secret"])),
            SUMS_SECRET,
        )
        for one in vectors["rounds"]
    ]
    return TaskInForce(
        name=vectors["task"],
        update_length=vectors["num_parameters"],
        open_round=vectors["open_round"],
        rounds={one.number: one for one in rounds},
        encodings=tuple(vectors["encodings"]),
    )


@pytest.fixture
def committer(tmp_path: Path) -> Iterator[Committer]:
    """An aggregator whose round is open and who knows the device, on a database of its own."""
    vectors, blobs = FILES["uploads"], LocalBlobs(tmp_path / "blobs")
    store = AggregatorStore(Database(f"sqlite:///{tmp_path / 'aggregator.db'}"), blobs)
    store.devices.add(vectors["device"], bytes.fromhex(vectors["device_public_key"]), 0.0)
    task = task_in_force(vectors)
    with store.database.transaction() as connection:
        for one in task.rounds.values():
            store.rounds.open(
                connection,
                task.name,
                one.number,
                opened_s=0.0,
                deadline_s=1e9,
                key=one.key,
                sums_secret=SUMS_SECRET,
                version=one.number,
                model_digest=one.model_digest,
                update_length=task.update_length,
                probability=1.0,
            )
    yield Committer(tenant=vectors["tenant"], worker="one", store=store, entropy=os.urandom, now_s=lambda: 1.0)
    store.close()


def outcome_of(committer: Committer, envelope: bytes) -> str:
    """What the aggregator decides about an envelope."""
    vectors = FILES["uploads"]
    pending = PendingUpdate(vectors["device"], topic_of(envelope), [envelope])
    (verdict,) = committer.commit([pending], lambda: [task_in_force(vectors)])
    if isinstance(verdict, Accepted):
        return "accepted" if verdict.is_new else "accepted_before"
    return "nothing" if verdict is None else verdict.reason.value


def test_an_aggregator_answers_each_upload_as_it_should(committer: Committer) -> None:
    steps = FILES["uploads"]["steps"]
    came = {step["name"]: outcome_of(committer, bytes.fromhex(step["envelope"])) for step in steps}
    assert came == {step["name"]: step["outcome"] for step in steps}


def test_what_no_vector_can_hold_cannot_be_encoded_either() -> None:
    message = msgspec.convert({"state": "online", "software": "x", "v": 1}, PresenceMsg)
    with pytest.raises(LocalMisuseError):
        encode(msgspec.structs.replace(message, state="asleep"))
