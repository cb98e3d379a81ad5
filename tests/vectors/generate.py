"""Writes the test vectors beside this file: ``python -m tests.vectors.generate [--reseal]``.

Everything in ``messages``, ``signing``, ``chunks``, ``topics``, ``encodings`` and ``secagg`` follows from fixed
keys and inputs and is written anew each time, bit for bit. HPKE draws its encapsulation from the operating system, so
``sealing`` and ``uploads`` are written only where they are missing, or with ``--reseal``. Byte strings are hexadecimal.
docs/protocol.md says what each field means; another implementation can be tested against the files alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec

from fl_protocol import signing
from fl_protocol.chunking import missing_bitmap, split
from fl_protocol.message_base import Msg
from fl_protocol.messages import (
    ChunkMsg,
    DeltaMsg,
    EvaluationPlanMsg,
    FeatureMsg,
    NackMsg,
    PresenceMsg,
    ReceiptMsg,
    RoundManifestMsg,
    SignedMsg,
    StatisticsPlanMsg,
    TrainingPlanMsg,
    UpdateBodyMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.topics import (
    down_filter,
    down_topic,
    model_filter,
    model_topic,
    round_topic,
    shard_of,
    state_topic,
    upload_filter,
    upload_topic,
)
from tests.fl_protocol.examples import (
    AGGREGATOR_KEY,
    BODY,
    CHUNK,
    CONTROL_DIGEST,
    DELTA,
    DEVICE,
    DEVICE_KEY,
    EVALUATION_PLAN,
    EXAMPLES,
    HISTOGRAM,
    MODEL_DIGEST,
    MOMENTS,
    NACK,
    PLAN,
    RECEIPT,
    SCAFFOLD_PLAN,
    STATISTICS_PLAN,
    TASK,
    TENANT,
    UPDATE_ID,
    as_map,
    manifest,
    packed,
)
from tests.vectors.secagg_vectors import secagg
from tests.vectors.update_vectors import Vectors, encodings, plain, sealing, uploads

FOLDER = Path(__file__).parent


def messages() -> Vectors:
    """Every kind with its fields, and encodings that must be refused."""
    valid = [
        {"kind": type(message).__name__, "fields": plain(message), "encoded": encode(message).hex()}
        for message in EXAMPLES
    ]
    presence = PresenceMsg(state="online", software="covey", reason="battery")
    good = encode(presence)
    (chunk,) = [message for message in EXAMPLES if isinstance(message, ChunkMsg)]
    body = encode(BODY)
    open_round = as_map(manifest())
    kindless = {name: value for name, value in as_map(PLAN).items() if name != "kind"}
    cases: list[tuple[str, type[Msg], bytes]] = [
        ("empty", PresenceMsg, b""),
        ("a trailing byte", PresenceMsg, good + b"\0"),
        ("cut short", PresenceMsg, good[:-1]),
        ("an unknown field", PresenceMsg, packed({**as_map(presence), "extra": 1})),
        ("a missing field", PresenceMsg, packed({"state": "online", "v": 1})),
        ("no version", PresenceMsg, packed({"state": "online", "software": "covey"})),
        ("version 2", PresenceMsg, packed({**as_map(presence), "v": 2})),
        ("a version that is true", PresenceMsg, packed({**as_map(presence), "v": True})),
        ("a field given twice", PresenceMsg, bytes([good[0] + 1]) + packed({"state": "offline"})[1:] + good[1:]),
        ("fields in another order", PresenceMsg, packed(dict(reversed(as_map(presence).items())))),
        ("an integer in a longer form", PresenceMsg, good[:-1] + b"\xcc\x01"),
        ("text that is not UTF-8", PresenceMsg, good.replace(b"covey", b"cov\xff\xfe")),
        ("text as bytes", PresenceMsg, packed({**as_map(presence), "software": b"covey"})),
        ("deep nesting", PresenceMsg, b"\x81\xa1v" + b"\x91" * 2000),
        ("a map of four billion entries", PresenceMsg, b"\xdf\xff\xff\xff\xff"),
        ("a huge integer", ReceiptMsg, packed({**as_map(RECEIPT), "round": 2**64 - 1})),
        ("round 0", ReceiptMsg, packed({**as_map(RECEIPT), "round": 0})),
        ("a name with a line break", ReceiptMsg, packed({**as_map(RECEIPT), "device": "watch-1\n"})),
        ("a name with a slash", ReceiptMsg, packed({**as_map(RECEIPT), "device": "watch/1"})),
        ("a digest too short", ReceiptMsg, packed({**as_map(RECEIPT), "sealed_digest": bytes(31)})),
        ("an integer for a float", ReceiptMsg, packed({**as_map(RECEIPT), "accepted_s": 1})),
        ("an unknown reason", NackMsg, packed({**as_map(NACK), "reason": "because"})),
        ("a clip that is not a number", TrainingPlanMsg, packed({**as_map(PLAN), "l2_norm_clip": math.nan})),
        ("an infinite noise multiplier", TrainingPlanMsg, packed({**as_map(PLAN), "noise_multiplier": math.inf})),
        ("a sampling rate above 1", TrainingPlanMsg, packed({**as_map(PLAN), "sampling_rate": 1.5})),
        ("momentum 1", TrainingPlanMsg, packed({**as_map(PLAN), "momentum": 1.0})),
        ("a proximal_mu that is not a number", TrainingPlanMsg, packed({**as_map(PLAN), "proximal_mu": math.nan})),
        ("an infinite proximal_mu", TrainingPlanMsg, packed({**as_map(PLAN), "proximal_mu": math.inf})),
        ("control variates as an integer", TrainingPlanMsg, packed({**as_map(SCAFFOLD_PLAN), "control_variates": 1})),
        ("control variates with momentum", TrainingPlanMsg, packed({**as_map(SCAFFOLD_PLAN), "momentum": 0.5})),
        ("control variates with proximal_mu", TrainingPlanMsg, packed({**as_map(SCAFFOLD_PLAN), "proximal_mu": 0.5})),
        ("a plan of an unknown kind", TrainingPlanMsg, packed({**as_map(PLAN), "kind": "training"})),
        ("a plan of another kind than its fields", RoundManifestMsg,
         packed({**open_round, "plan": {**as_map(PLAN), "kind": "evaluate"}})),
        ("a plan that does not say its kind", RoundManifestMsg, packed({**open_round, "plan": kindless})),
        ("a plan that says its kind last", RoundManifestMsg,
         packed({**open_round, "plan": {**kindless, "kind": "train"}})),
        ("a loss bound of 0", EvaluationPlanMsg, packed({**as_map(EVALUATION_PLAN), "loss_bound": 0.0})),
        ("an infinite loss bound", EvaluationPlanMsg, packed({**as_map(EVALUATION_PLAN), "loss_bound": math.inf})),
        ("statistics of nothing", StatisticsPlanMsg, packed({**as_map(STATISTICS_PLAN), "features": []})),
        ("65 features", StatisticsPlanMsg, packed({**as_map(STATISTICS_PLAN), "features": [as_map(MOMENTS)] * 65})),
        ("an unknown statistic", FeatureMsg, packed({**as_map(MOMENTS), "statistic": "median"})),
        ("moments in bins", FeatureMsg, packed({**as_map(MOMENTS), "bins": 2})),
        ("a histogram of one bin", FeatureMsg, packed({**as_map(HISTOGRAM), "bins": 1})),
        ("257 bins", FeatureMsg, packed({**as_map(HISTOGRAM), "bins": 257})),
        ("a range that is empty", FeatureMsg, packed({**as_map(MOMENTS), "low": 20.0})),
        ("a range without end", FeatureMsg, packed({**as_map(MOMENTS), "high": math.inf})),
        ("a delta of no bytes", DeltaMsg, packed({**as_map(DELTA), "total_bytes": 0})),
        ("a delta larger than a transfer", DeltaMsg, packed({**as_map(DELTA), "total_bytes": 2**24 + 1})),
        ("a delta from a digest too short", RoundManifestMsg,
         packed({**open_round, "delta": {**as_map(DELTA), "from_digest": bytes(31)}})),
        ("an unknown status", RoundManifestMsg, packed({**open_round, "status": "closed", "recipient": None})),
        ("paused with a recipient", RoundManifestMsg, packed({**open_round, "status": "paused"})),
        ("aborted with a recipient", RoundManifestMsg, packed({**open_round, "status": "aborted"})),
        ("a negative maximum_staleness", RoundManifestMsg, packed({**open_round, "maximum_staleness": -1})),
        ("a maximum_staleness above 1000", RoundManifestMsg, packed({**open_round, "maximum_staleness": 1001})),
        ("a tag named twice", RoundManifestMsg, packed({**open_round, "required_tags": ["imu", "imu"]})),
        ("a tag that is no name", RoundManifestMsg, packed({**open_round, "required_tags": ["IMU 9"]})),
        ("17 tags", RoundManifestMsg, packed({**open_round, "required_tags": [f"tag-{n}" for n in range(17)]})),
        ("no encoding", RoundManifestMsg, packed({**open_round, "encodings": []})),
        ("an unknown encoding", RoundManifestMsg, packed({**open_round, "encodings": ["float64"]})),
        ("an encoding named twice", RoundManifestMsg, packed({**open_round, "encodings": ["int8", "int8"]})),
        ("a top_k_fraction of 0", RoundManifestMsg, packed({**open_round, "top_k_fraction": 0.0})),
        ("a top_k_fraction above 1", RoundManifestMsg, packed({**open_round, "top_k_fraction": 1.5})),
        ("control variates without a control_digest", RoundManifestMsg,
         packed({**as_map(manifest()), "plan": as_map(SCAFFOLD_PLAN)})),
        ("a control_digest without control variates", RoundManifestMsg,
         packed({**as_map(manifest()), "control_digest": CONTROL_DIGEST})),
        ("a control_digest of a finished task", RoundManifestMsg,
         packed({**as_map(manifest(plan=SCAFFOLD_PLAN, status="finished", recipient=None)),
                 "control_digest": CONTROL_DIGEST})),
        ("a control_digest too short", RoundManifestMsg,
         packed({**as_map(manifest(plan=SCAFFOLD_PLAN, control_digest=CONTROL_DIGEST)), "control_digest": bytes(31)})),
        ("open without a recipient", RoundManifestMsg, packed({**as_map(manifest()), "recipient": None})),
        ("a goal below the minimum cohort", RoundManifestMsg, packed({**as_map(manifest()), "goal": 4})),
        ("a deadline before the opening", RoundManifestMsg, packed({**as_map(manifest()), "deadline_s": 1.0})),
        ("an index not below the count", ChunkMsg, packed({**as_map(chunk), "index": 2})),
        ("chunks needlessly small", ChunkMsg, packed({**as_map(chunk), "index": 2, "count": 3})),
        ("a length that no cut gives", ChunkMsg, packed({**as_map(chunk), "index": 0})),
        ("too few values", UpdateBodyMsg, body.replace(b"\xaenum_parameters\x03", b"\xaenum_parameters\x04")),
        ("an update in an unknown encoding", UpdateBodyMsg, packed({**as_map(BODY), "encoding": "float64"})),
        ("an update that does not say its encoding", UpdateBodyMsg,
         packed({name: value for name, value in as_map(BODY).items() if name != "encoding"})),
    ]  # fmt: skip
    refused = [
        {"why": why, "kind": kind.__name__, "encoded": data.hex(), "error": "ProtocolError"}
        for why, kind, data in cases
    ]
    return {"valid": valid, "must_fail": refused}


def signed_vectors() -> Vectors:
    """Signed manifest, receipt, NACK and model chunk; header signatures; and signatures that fit no more."""
    public = AGGREGATOR_KEY.public_key().public_bytes_raw()
    by_kind: dict[str, RoundManifestMsg | ReceiptMsg | NackMsg | ChunkMsg] = {
        "RoundManifestMsg": manifest(),
        "ReceiptMsg": RECEIPT,
        "NackMsg": NACK,
        "ChunkMsg": CHUNK,
    }
    valid = [
        {
            "kind": kind,
            "context": signing._CONTEXTS[type(message)].hex(),
            "payload": encode(message).hex(),
            "signed": signing.sign(message, AGGREGATOR_KEY).hex(),
        }
        for kind, message in by_kind.items()
    ]
    good = decode(signing.sign(RECEIPT, AGGREGATOR_KEY), SignedMsg)

    def signed(payload: bytes, signature: bytes) -> bytes:
        return encode(SignedMsg(payload=payload, signature=signature))

    # L of RFC 8032, section 5.1: the same signature with another scalar of the same class.
    order = 2**252 + 27742317777372353535851937790883648493
    scalar = int.from_bytes(good.signature[32:], "little") + order
    without_v = encode(RECEIPT)[:-3]
    cases = [
        ("signed by another key", "ReceiptMsg", signing.sign(RECEIPT, DEVICE_KEY)),
        ("a receipt offered as a NACK", "NackMsg", signing.sign(RECEIPT, AGGREGATOR_KEY)),
        ("a receipt offered as a manifest", "RoundManifestMsg", signing.sign(RECEIPT, AGGREGATOR_KEY)),
        ("a model chunk signed by another key", "ChunkMsg", signing.sign(CHUNK, DEVICE_KEY)),
        ("a model chunk offered as a receipt", "ReceiptMsg", signing.sign(CHUNK, AGGREGATOR_KEY)),
        ("a model chunk offered as a manifest", "RoundManifestMsg", signing.sign(CHUNK, AGGREGATOR_KEY)),
        ("a receipt offered as a model chunk", "ChunkMsg", signing.sign(RECEIPT, AGGREGATOR_KEY)),
        ("a model chunk under a header's signature", "ChunkMsg",
         signed(encode(CHUNK), signing.sign_header(encode(CHUNK), AGGREGATOR_KEY))),
        ("a model chunk that is not signed", "ChunkMsg", encode(CHUNK)),
        ("one bit of a model chunk's data flipped", "ChunkMsg",
         signing.sign(CHUNK, AGGREGATOR_KEY).replace(CHUNK.data, bytes([CHUNK.data[0] ^ 1]) + CHUNK.data[1:])),
        ("another model chunk's index", "ChunkMsg",
         signed(encode(CHUNK).replace(b"\xa5index\x01", b"\xa5index\x00"),
                decode(signing.sign(CHUNK, AGGREGATOR_KEY), SignedMsg).signature)),
        ("a header signature offered as a receipt's", "ReceiptMsg",
         signed(good.payload, signing.sign_header(good.payload, AGGREGATOR_KEY))),
        ("signed without a context", "ReceiptMsg", signed(good.payload, AGGREGATOR_KEY.sign(good.payload))),
        ("one bit of the payload flipped", "ReceiptMsg", signed(good.payload[:-1] + b"\x03", good.signature)),
        ("one bit of the signature flipped", "ReceiptMsg",
         signed(good.payload, bytes([good.signature[0] ^ 1]) + good.signature[1:])),
        ("the group order added to the scalar", "ReceiptMsg",
         signed(good.payload, good.signature[:32] + scalar.to_bytes(32, "little"))),
        ("signed, but malformed", "ReceiptMsg",
         signed(without_v, AGGREGATOR_KEY.sign(signing._CONTEXTS[ReceiptMsg] + without_v))),
    ]  # fmt: skip
    header = encode(next(message for message in EXAMPLES if isinstance(message, UpdateHeaderMsg)))
    return {
        "aggregator_seed": AGGREGATOR_KEY.private_bytes_raw().hex(),
        "aggregator_public_key": public.hex(),
        "device_seed": DEVICE_KEY.private_bytes_raw().hex(),
        "device_public_key": DEVICE_KEY.public_key().public_bytes_raw().hex(),
        "valid": valid,
        "header": {
            "context": signing._CONTEXTS[UpdateHeaderMsg].hex(),
            "header": header.hex(),
            "signature": signing.sign_header(header, DEVICE_KEY).hex(),
        },
        "must_fail": [
            {"why": why, "kind": kind, "signed": data.hex(), "error": "ProtocolError"} for why, kind, data in cases
        ],
    }


def chunks() -> Vectors:
    """Sequences of chunks with what each gives: the whole, nothing yet, or a refusal."""
    whole = hashlib.shake_128(b"whole").digest(700)
    other = hashlib.shake_128(b"other").digest(700)
    one, two, three = split(UPDATE_ID, whole, data_bytes=256)
    anew = list(split(UPDATE_ID, whole, data_bytes=300))
    forged = msgspec.structs.replace(two, data=bytes(256))
    elsewhere = [next(split(bytes([number]) * 16, other, data_bytes=256)) for number in range(3)]
    claim = msgspec.structs.replace(two, digest=bytes(32))
    # Chunk, and what it must give: the whole, None, or a reason.
    cases: list[tuple[str, list[tuple[ChunkMsg, bytes | str | None]]]] = [
        ("in order", [(one, None), (two, None), (three, whole)]),
        ("in reverse", [(three, None), (two, None), (one, whole)]),
        ("repeated", [(one, None), (one, None), (three, None), (one, None), (two, whole)]),
        ("repeated after the whole: a new transfer begins", [(one, None), (two, None), (three, whole), (three, None)]),
        ("other data under a known index", [(two, None), (forged, "malformed"), (two, None)]),
        ("chunks that do not add up", [(one, None), (forged, None), (three, "malformed")]),
        ("another digest under a known id", [(one, None), (claim, "malformed"), (two, None), (three, whole)]),
        ("cut anew with as many chunks", [(one, None), *((chunk, None) for chunk in anew[:2]), (anew[2], whole)]),
        ("too large for this receiver", [(msgspec.structs.replace(one, total_bytes=768), "oversized")]),
        ("a third transfer displaces the first",
         [(one, None), (elsewhere[0], None), (elsewhere[1], None), (two, None), (three, None)]),
    ]  # fmt: skip
    return {
        "max_transfers": 2,
        "sequences": [
            {
                "name": name,
                "max_bytes": 2250 if "displaces" in name else 750,
                "steps": [
                    {
                        "chunk": encode(chunk).hex(),
                        **(
                            {"refused": outcome}
                            if isinstance(outcome, str)
                            else {"whole": None if outcome is None else outcome.hex()}
                        ),
                    }
                    for chunk, outcome in steps
                ],
            }
            for name, steps in cases
        ],
        "missing_bitmaps": [
            {"count": count, "present": present, "bitmap": missing_bitmap(count, set(present)).hex()}
            for count, present in ((1, []), (3, [1]), (8, [0, 7]), (9, []), (17, [0, 8, 16]), (3, [0, 1, 2]))
        ],
    }


def topics() -> Vectors:
    """Topic names with their parts, and names that are no upload topic."""
    good = upload_topic(TENANT, DEVICE, UPDATE_ID, 7)
    shard = shard_of(DEVICE)
    return {
        "tenant": TENANT,
        "task": TASK,
        "device": DEVICE,
        "update_id": UPDATE_ID.hex(),
        "model_digest": MODEL_DIGEST.hex(),
        "index": 7,
        "topics": {
            "round": round_topic(TENANT, TASK),
            "model": model_topic(TENANT, MODEL_DIGEST, 7),
            "model_filter": model_filter(TENANT, MODEL_DIGEST),
            "upload": good,
            "upload_filter": upload_filter(TENANT),
            "receipt": down_topic(TENANT, DEVICE, "receipt"),
            "nack": down_topic(TENANT, DEVICE, "nack"),
            "down_filter": down_filter(TENANT, DEVICE),
            "state": state_topic(TENANT, DEVICE),
        },
        "shards": {device: shard_of(device) for device in ("watch-0", "watch-1", "a", "x" * 64)},
        "must_fail": [
            good.replace(f"/up/{shard:02d}/", f"/up/{(shard + 1) % 64:02d}/"),
            good.replace(f"/up/{shard:02d}/", f"/up/{shard}0/"),
            good + "0000",
            good[:-1] + "07",
            good + "\n",
            good.replace("clinic", "Clinic"),
            good.replace("clinic", "+"),
            good.replace("0a0b", "0A0B"),
            good.replace("v1", "v2"),
            good.replace("/up/", "/down/"),
            "",
        ],
    }


DETERMINISTIC: dict[str, Callable[[], Vectors]] = {
    "messages": messages,
    "signing": signed_vectors,
    "chunks": chunks,
    "topics": topics,
    "encodings": encodings,
    "secagg": secagg,
}
RANDOMISED: dict[str, Callable[[], Vectors]] = {"sealing": sealing, "uploads": uploads}


def text_of(vectors: Vectors) -> str:
    """A file's content."""
    return json.dumps(vectors, indent=1, ensure_ascii=True) + "\n"


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description="write the protocol's test vectors")
    parser.add_argument("--reseal", action="store_true", help="also the ones that HPKE makes different each time")
    reseal = parser.parse_args().reseal
    for name, make in {**DETERMINISTIC, **RANDOMISED}.items():
        path = FOLDER / f"{name}.json"
        if name in DETERMINISTIC or reseal or not path.exists():
            path.write_text(text_of(make()))


if __name__ == "__main__":
    main()
