"""The vectors about updates: sealed ones, whole uploads with their answers, and how values and deltas are encoded."""

from __future__ import annotations

import enum
import hashlib
import math
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol import signing
from fl_protocol.messages import (
    EncodingName,
    KemName,
    UpdateBodyMsg,
    UpdateEnvelopeMsg,
    UpdateHeaderMsg,
    decode,
    encode,
)
from fl_protocol.model_delta import DeltaEncoding, make_delta
from fl_protocol.sealing import seal_info, seal_update
from fl_protocol.update_encoding import decode_values, encode_values, rotation_seed
from tests.fl_protocol.examples import (
    AGGREGATOR_KEY,
    BODY,
    DELTA,
    DEVICE,
    DEVICE_KEY,
    KEMS,
    MODEL_DIGEST,
    TASK,
    TENANT,
    UPDATE_ID,
    manifest,
    round_key,
)

Vectors = dict[str, Any]
_DELTA_FORMS: tuple[DeltaEncoding, ...] = ("float16", "int8")


def plain(value: Any) -> Any:
    """A message or a field as JSON: structs as objects, bytes as hexadecimal."""
    if isinstance(value, msgspec.Struct):
        tag = {value.__struct_config__.tag_field: value.__struct_config__.tag} if value.__struct_config__.tag else {}
        return tag | {
            name: plain(found) for name, found in msgspec.structs.asdict(value).items() if found is not msgspec.UNSET
        }
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    if isinstance(value, bytes):
        return value.hex()
    return value.value if isinstance(value, enum.Enum) else value


def sealing() -> Vectors:
    """Sealed updates that open, and what opens no more because one thing was changed."""
    valid, refused = [], []
    for kem in KEMS:
        key = round_key(kem)
        whole = seal_update(BODY, manifest=manifest(kem), device=DEVICE, update_id=UPDATE_ID, signing_key=DEVICE_KEY)
        envelope = decode(whole, UpdateEnvelopeMsg)
        header, sealed = decode(envelope.header, UpdateHeaderMsg), envelope.sealed
        valid.append(
            {
                "kem": kem,
                "secret": key.secret.hex(),
                "public_key": key.recipient().public_key.hex(),
                "envelope": whole.hex(),
                "header": plain(header),
                "info": _info(header).hex(),
                "sealed": sealed.hex(),
                "plaintext": encode(BODY).hex(),
            }
        )
        (other_kem,) = set(KEMS) - {kem}
        changes: list[tuple[str, dict[str, Any], bytes, bytes]] = [
            ("another tenant", {"tenant": "other"}, sealed, key.secret),
            ("another task", {"task": "other"}, sealed, key.secret),
            ("another round", {"round": 6}, sealed, key.secret),
            ("another model", {"model_digest": bytes(32)}, sealed, key.secret),
            ("another device", {"device": "watch-2"}, sealed, key.secret),
            ("another update id", {"update_id": bytes(16)}, sealed, key.secret),
            ("the other KEM", {"kem": other_kem}, sealed, key.secret),
            ("another key", {}, sealed, round_key(kem, seed=8).secret),
            ("cut short", {}, sealed[:-1], key.secret),
            ("a byte too many", {}, sealed + b"\0", key.secret),
            ("one bit flipped in the encapsulation", {}, bytes([sealed[0] ^ 1]) + sealed[1:], key.secret),
            ("one bit flipped in the tag", {}, sealed[:-1] + bytes([sealed[-1] ^ 1]), key.secret),
            ("empty", {}, b"", key.secret),
        ]
        refused += [
            {
                "why": why,
                "kem": kem,
                "secret": secret.hex(),
                "header": encode(msgspec.structs.replace(header, **change)).hex(),
                "sealed": data.hex(),
                "error": "ProtocolError",
            }
            for why, change, data, secret in changes
        ]
    return {"valid": valid, "must_fail": refused}


def _info(header: UpdateHeaderMsg) -> bytes:
    """The HPKE info of a header."""
    return seal_info(
        tenant=header.tenant,
        task=header.task,
        round_number=header.round,
        model_digest=header.model_digest,
        device=header.device,
        update_id=header.update_id,
    )


def uploads() -> Vectors:
    """Whole envelopes as an aggregator gets them, each with what it must answer."""
    number = 0

    def sealed_update(
        values: bytes = BODY.values,
        *,
        device: str = DEVICE,
        signer: Ed25519PrivateKey = DEVICE_KEY,
        kem: KemName = "x25519",
        encoding: EncodingName = "float32",
        **changes: Any,
    ) -> bytes:
        nonlocal number
        number += 1
        length = len(values) // 4 if encoding == "float32" else 3
        body = UpdateBodyMsg(num_parameters=length, values=values, encoding=encoding)
        return seal_update(
            body,
            manifest=manifest(kem, **changes),
            device=device,
            update_id=bytes([number]) * 16,
            signing_key=signer,
        )

    def with_header(whole: bytes, *, resign: bool = True, **changes: Any) -> bytes:
        envelope = decode(whole, UpdateEnvelopeMsg)
        header = encode(msgspec.structs.replace(decode(envelope.header, UpdateHeaderMsg), **changes))
        signature = signing.sign_header(header, DEVICE_KEY) if resign else envelope.signature
        return encode(UpdateEnvelopeMsg(header=header, signature=signature, sealed=envelope.sealed))

    first = sealed_update()
    first_envelope = decode(first, UpdateEnvelopeMsg)
    garbage = encode(
        UpdateEnvelopeMsg(header=b"garbage", signature=signing.sign_header(b"garbage", DEVICE_KEY), sealed=b"x")
    )
    other_sealed = decode(sealed_update(), UpdateEnvelopeMsg).sealed
    nan = np.array([1.0, math.nan, 0.0], "<f4").tobytes()
    infinite = np.array([1.0, 2.0, -math.inf], "<f4").tobytes()
    int8 = encode_values(
        np.frombuffer(BODY.values, "<f4").astype(np.float32),
        "int8",
        seed=rotation_seed(MODEL_DIGEST, 5),
        entropy=hashlib.shake_128(b"rounding").digest,
    )
    half = encode_values(np.frombuffer(BODY.values, "<f4").astype(np.float32), "float16", seed=b"", entropy=bytes)
    unscaled_half = _with_a_larger_exponent(half)
    infinite_half = half[:1] + np.array([np.inf, 1, 2], "<f2").tobytes()
    earlier: dict[str, Any] = {
        "round": 4, "model_digest": DELTA.from_digest, "recipient": round_key("x25519", seed=9).recipient()
    }  # fmt: skip
    steps: list[tuple[str, bytes, str]] = [
        ("random bytes", bytes(range(40)), "malformed"),
        ("a header that is no header", garbage, "malformed"),
        ("the header changed, the old signature kept", with_header(first, resign=False, round=4), "bad_signature"),
        ("signed by another device", sealed_update(signer=AGGREGATOR_KEY), "bad_signature"),
        ("a header in another device's name", sealed_update(device="watch-2"), "bad_signature"),
        ("another task", sealed_update(task="other"), "wrong_task"),
        ("another tenant", sealed_update(tenant="other"), "wrong_task"),
        ("other sealed bytes than the header's digest",
         encode(msgspec.structs.replace(first_envelope, sealed=other_sealed)), "malformed"),
        ("a round that is over", sealed_update(round=3), "round_closed"),
        ("a round to come", sealed_update(round=6), "wrong_round"),
        ("another model", sealed_update(model_digest=bytes(32)), "wrong_model"),
        ("an earlier round that still counts, from the open one's model",
         sealed_update(**{**earlier, "model_digest": MODEL_DIGEST}), "wrong_model"),
        ("an earlier round that still counts, sealed to the open one's key",
         sealed_update(**{**earlier, "recipient": round_key("x25519").recipient()}), "unsealable"),
        ("sealed to another key", sealed_update(recipient=round_key("x25519", seed=8).recipient()), "unsealable"),
        ("sealed under another update id", with_header(sealed_update(), update_id=b"z" * 16), "unsealable"),
        ("the other KEM", sealed_update(kem="mlkem768-x25519"), "unsealable"),
        ("too few values", sealed_update(bytes(8)), "wrong_length"),
        ("not a number", sealed_update(nan), "not_finite"),
        ("infinite", sealed_update(infinite), "not_finite"),
        ("in an encoding that the manifest does not name", sealed_update(int8, encoding="int8"), "wrong_encoding"),
        ("in its encoding, cut short", sealed_update(half[:-1], encoding="float16"), "wrong_encoding"),
        ("in its encoding, with another exponent",
         sealed_update(unscaled_half, encoding="float16"), "wrong_encoding"),
        ("in its encoding, infinite", sealed_update(infinite_half, encoding="float16"), "not_finite"),
        ("longer than 1024 in L2", sealed_update(np.array([1024.0, 32.0, 0.0], "<f4").tobytes()), "too_long"),
        ("a good update", first, "accepted"),
        ("the very same again: its receipt was lost", first, "accepted_before"),
        ("its id with other content",
         with_header(sealed_update(), update_id=decode(first_envelope.header, UpdateHeaderMsg).update_id), "replayed"),
        ("a second update in the round", sealed_update(), "second_update"),
        ("for an earlier round that still counts, in the round in which the device counts already",
         sealed_update(**earlier), "nothing"),
    ]  # fmt: skip
    return {
        "note": "In this order at one aggregator, whose round 5 is open, all on the topic of the device. Its manifests "
        "name these encodings and a maximum_staleness of 1, so round 4 still counts. Nothing is answered to an update "
        "that may count in a later round.",
        "tenant": TENANT,
        "task": TASK,
        "device": DEVICE,
        "device_public_key": DEVICE_KEY.public_key().public_bytes_raw().hex(),
        "open_round": 5,
        "num_parameters": 3,
        "encodings": ["float32", "float16"],
        "kem": "x25519",
        "rounds": [
            {"round": 5, "model_digest": MODEL_DIGEST.hex(), "secret": round_key("x25519").secret.hex()},
            {"round": 4, "model_digest": DELTA.from_digest.hex(), "secret": round_key("x25519", seed=9).secret.hex()},
        ],
        "steps": [{"name": name, "envelope": whole.hex(), "outcome": outcome} for name, whole, outcome in steps],
    }


def encodings() -> Vectors:
    """Update values and deltas in each encoding, with what they stand for; and what is in none."""
    seed = rotation_seed(MODEL_DIGEST, 5)
    values = {
        "three values": np.array([1.0, -2.5, 0.25], np.float32),
        "zeros": np.zeros(3, np.float32),
        "one value": np.array([-3.0], np.float32),
        "more than one block, not a multiple": np.sin(np.arange(10, dtype=np.float64)).astype(np.float32),
        "very small and very large": np.array([2.0**-60, -(2.0**40), 3.0], np.float32),
    }
    names: tuple[EncodingName, ...] = ("float32", "float16", "int8", "top_k")
    rounding = hashlib.shake_128(b"rounding")

    def encoded(vector: np.ndarray[Any, np.dtype[np.float32]], name: EncodingName) -> bytes:
        return encode_values(vector, name, seed=seed, entropy=rounding.digest, fraction=0.5)

    valid = [
        {
            "name": what,
            "encoding": name,
            "num_parameters": len(vector),
            "values": encoded(vector, name).hex(),
            "decoded": decode_values(encoded(vector, name), name, num_parameters=len(vector), seed=seed)
            .astype("<f4").tobytes().hex(),
        }
        for what, vector in values.items()
        for name in names
    ]  # fmt: skip
    three = values["three values"]
    half, int8, top_k = (encoded(three, name) for name in names[1:])
    not_a_number, infinity = np.array([np.nan], "<f4").tobytes(), np.array([np.inf], "<f2").tobytes()
    cases: list[tuple[str, EncodingName, bytes, str]] = [
        ("a byte too few", "float32", bytes(11), "wrong_encoding"),
        ("not a number", "float32", bytes(8) + not_a_number, "not_finite"),
        ("a byte too many", "float16", half + b"\0", "wrong_encoding"),
        ("a larger exponent, and smaller halves", "float16", _with_a_larger_exponent(half), "wrong_encoding"),
        ("an exponent out of range", "float16", b"\x31" + half[1:], "wrong_encoding"),
        ("infinite", "float16", half[:1] + infinity + half[3:], "not_finite"),
        ("a byte too few", "int8", int8[:-1], "wrong_encoding"),
        ("no level of 127", "int8", int8[:-3] + bytes(3), "wrong_encoding"),
        ("a level of -128", "int8", int8[:-1] + b"\x80", "wrong_encoding"),
        ("a scale that is not a number", "int8", not_a_number + int8[4:], "not_finite"),
        ("a negative scale", "int8", int8[:3] + bytes([int8[3] | 0x80]) + int8[4:], "wrong_encoding"),
        ("a form that is none", "top_k", b"\x02" + top_k[1:], "wrong_encoding"),
        ("more values than there are", "top_k", top_k[:1] + b"\x04" + top_k[2:], "wrong_encoding"),
        ("the longer form", "top_k", b"\x01\x01\0\0\0\x02" + three[1:2].tobytes() + b"\0", "wrong_encoding"),
        ("an index beyond the end", "top_k", b"\0\x01\0\0\0\x03" + three[1:2].tobytes(), "wrong_encoding"),
        ("a zero that is sent", "top_k", b"\0\x01\0\0\0\x00" + bytes(4), "wrong_encoding"),
        ("not a number", "top_k", b"\0\x01\0\0\0\x00" + not_a_number, "not_finite"),
    ]
    previous = np.array([1.0, 2.0, 3.0], np.float32)
    deltas = [make_delta(previous, previous + three, form) for form in _DELTA_FORMS]
    bad_deltas = [
        ("empty", b""),
        ("a form that is none", b"\x03" + deltas[0][0][1:]),
        ("cut short", deltas[0][0][:-1]),
        ("a byte too many", deltas[1][0] + b"\0"),
        ("a larger exponent, and smaller levels",
         deltas[1][0][:1] + bytes([deltas[1][0][1] + 1]) + (np.frombuffer(deltas[1][0][2:], "i1") // 2).tobytes()),
        ("a level of -128", deltas[1][0][:-1] + b"\x80"),
    ]  # fmt: skip
    return {
        "round": 5,
        "model_digest": MODEL_DIGEST.hex(),
        "rotation_seed": seed.hex(),
        "valid": valid,
        "must_fail": [
            {"why": why, "encoding": name, "num_parameters": 3, "values": data.hex(), "error": reason}
            for why, name, data, reason in cases
        ],
        "deltas": [
            {
                "name": form,
                "previous": previous.astype("<f4").tobytes().hex(),
                "delta": delta.hex(),
                "next": after.astype("<f4").tobytes().hex(),
            }
            for form, (delta, after) in zip(_DELTA_FORMS, deltas, strict=True)
        ],
        "deltas_must_fail": [
            {
                "why": why,
                "previous": previous.astype("<f4").tobytes().hex(),
                "delta": delta.hex(),
                "error": "ProtocolError",
            }
            for why, delta in bad_deltas
        ],
    }


def _with_a_larger_exponent(half: bytes) -> bytes:
    """The same values as float16 in a form that is not their one encoding."""
    return bytes([half[0] + 1]) + (np.frombuffer(half[1:], "<f2") / np.float16(2)).astype("<f2").tobytes()
