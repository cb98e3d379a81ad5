"""Tokens, claims, and requests and answers that only who they are for can open; broken copies are caught."""

from __future__ import annotations

import base64
import hashlib
from types import ModuleType
from typing import Annotated, Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta
from msgspec.structs import replace

from fl_protocol import joining
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.helper_config import HelperPin
from fl_protocol.joining import Address, Claim, EnrolmentAnswerMsg, EnrolmentRequestMsg, StudyPins
from fl_protocol.message_base import Digest, KemName, Msg
from fl_protocol.messages import decode, encode
from fl_protocol.publishers import publisher_pins
from fl_protocol.sealing import RoundKey
from fl_protocol.signing import public_key_hex
from tests.enrolments import broken_copy

AGGREGATOR = Ed25519PrivateKey.from_private_bytes(b"\x05" * 32)
RENEWAL = Ed25519PrivateKey.from_private_bytes(b"\x06" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
DESK = RoundKey("mlkem768-x25519", bytes(range(96)))
DEVICE = RoundKey("x25519", b"\x09" * 32)
CLIENT, SECRET = "c" + "0" * 32, bytes(range(16))
WHERE = {"tenant": "clinic", "task": "watch", "client": CLIENT}
CLAIM = Claim(
    format="covey-claim-1",
    tenant="clinic",
    task="watch",
    aggregator_key=public_key_hex(AGGREGATOR.public_key()),
    kem="mlkem768-x25519",
    enrolment_key=base64.b64encode(DESK.recipient().public_key).decode(),
    ca="ca",
    broker=Address("broker.example", 8884),
    certificate="certificate",
    key="key",
)
REQUEST = EnrolmentRequestMsg(
    **WHERE,
    token=SECRET,
    enrolment=None,
    renewal_key=RENEWAL.public_key().public_bytes_raw(),
    answer_to=DEVICE.recipient(),
    names=b"{}",
)
SIGNED = joining.signed_request(REQUEST, RENEWAL)
DIGEST = hashlib.sha256(SIGNED).digest()
PINS = StudyPins(
    publisher_key=bytes(32),
    helpers=(HelperPin(name="helper-a", operator="patients", key=public_key_hex(OTHER.public_key())),),
    broker=Address("broker.example", 8883),
)
ANSWER = EnrolmentAnswerMsg(request_digest=DIGEST, outcome="enrolled", enrolment="e1", names=b"{}", pins=PINS)


@given(st.binary(min_size=16, max_size=16))
def test_a_token_reads_back_as_it_was_however_it_was_copied(secret: bytes) -> None:
    text = joining.token_text(secret, CLAIM)
    assert text.startswith("covey1-")
    assert len(text) == 59
    for copied in (text, f"  {text}\n", text.upper()):
        assert joining.parse_token(copied) == (secret, CLAIM.fingerprint)


@pytest.mark.parametrize(
    "text", ["", "covey1-", "covey2-" + "a" * 52, "covey1-" + "a" * 51, "covey1-" + "1" * 52, "covey1-" + "é" * 52]
)
def test_what_is_no_token_is_told_and_not_repeated(text: str) -> None:
    with pytest.raises(LocalMisuseError, match="expected covey1- and 52 letters and digits") as caught:
        joining.parse_token(text)
    assert "aaaa" not in str(caught.value)


def check_a_changed_claim_is_noticed(module: ModuleType) -> None:
    token = joining.parse_token(joining.token_text(SECRET, CLAIM))
    module.check_claim(CLAIM, token)
    changes: list[dict[str, Any]] = [
        {"tenant": "others"},
        {"task": "others"},
        {"aggregator_key": public_key_hex(OTHER.public_key())},
        {"enrolment_key": base64.b64encode(RoundKey("x25519", b"\x01" * 32).recipient().public_key).decode()},
        {"kem": "x25519"},
        {"ca": "another"},
    ]
    for change in changes:
        with pytest.raises(ProtocolError, match="not the one that this token is for"):
            module.check_claim(replace(CLAIM, **change), token)


def test_a_claim_that_was_changed_is_not_the_one_a_token_is_for() -> None:
    check_a_changed_claim_is_noticed(joining)


NAMED = "named = [self.tenant, self.task, self.aggregator_key, self.kem, self.enrolment_key, self.ca]"


@pytest.mark.parametrize("field", ["tenant", "task", "aggregator_key", "kem", "enrolment_key", "ca"])
def test_a_fingerprint_that_leaves_something_out_is_caught(field: str) -> None:
    shorter = NAMED.replace(f"self.{field}, ", "").replace(f", self.{field}]", "]")
    broken = broken_copy("fl_protocol.joining", (NAMED, shorter))
    content = msgspec.to_builtins(CLAIM)
    changed = {**content, field: {"aggregator_key": "0" * 64, "kem": "x25519"}.get(field, "others")}
    token = broken.parse_token(broken.token_text(SECRET, msgspec.convert(content, broken.Claim)))
    broken.check_claim(msgspec.convert(changed, broken.Claim), token)  # and this one is believed
    with pytest.raises(ProtocolError):
        joining.check_claim(msgspec.convert(changed, Claim), joining.parse_token(joining.token_text(SECRET, CLAIM)))


def test_a_claim_reads_back_the_same_and_anything_else_is_a_protocol_error() -> None:
    assert joining.decode_claim(msgspec.json.encode(CLAIM)) == CLAIM
    assert CLAIM.recipient == DESK.recipient()
    content = msgspec.to_builtins(CLAIM)
    for bad in (b"", b"{}", b"[" * 5000, b"\xff", b" " * 600_000, msgspec.json.encode({**content, "more": 1})):
        with pytest.raises(ProtocolError, match="not a claim"):
            joining.decode_claim(bad)
    for bad_key in ("%", base64.b64encode(b"short").decode()):
        with pytest.raises(ProtocolError, match="enrolment_key"):
            _ = replace(CLAIM, enrolment_key=bad_key).recipient


@pytest.mark.parametrize("kem", ["mlkem768-x25519", "x25519"])
def test_a_request_reaches_the_desk_and_its_answer_the_device(kem: KemName) -> None:
    desk = RoundKey(kem, bytes(range(96 if kem != "x25519" else 32)))
    sealed = joining.sealed_request(SIGNED, desk.recipient(), **WHERE)
    assert SECRET not in sealed
    assert joining.opened_request(sealed, desk, **WHERE) == (REQUEST, DIGEST)
    answer = joining.sealed_answer(ANSWER, to=REQUEST.answer_to, client=CLIENT, key=AGGREGATOR)
    opened = joining.opened_answer(
        answer, DEVICE, client=CLIENT, request_digest=DIGEST, aggregator=AGGREGATOR.public_key()
    )
    assert opened == ANSWER


def check_requests_are_bound(module: ModuleType) -> None:
    """To the desk, the study and the client, and signed by the key that they name."""
    sealed = joining.sealed_request(SIGNED, DESK.recipient(), **WHERE)
    for name in WHERE:
        with pytest.raises(ProtocolError):
            module.opened_request(sealed, DESK, **{**WHERE, name: "another"})
    with pytest.raises(ProtocolError):
        module.opened_request(sealed[:-1] + bytes([sealed[-1] ^ 1]), DESK, **WHERE)
    # A request of another client's, sealed anew by whoever read it: its content still says whose it is.
    stolen = joining.sealed_request(SIGNED, DESK.recipient(), **{**WHERE, "client": "thief"})
    with pytest.raises(ProtocolError, match="another study or from another client"):
        module.opened_request(stolen, DESK, **{**WHERE, "client": "thief"})
    changed = msgspec.msgpack.decode(SIGNED)
    changed["payload"] = msgspec.msgpack.encode(replace(REQUEST, names=b"[]"))
    forged = joining.sealed_request(msgspec.msgpack.encode(changed), DESK.recipient(), **WHERE)
    with pytest.raises(ProtocolError, match="not signed by its own renewal key"):
        module.opened_request(forged, DESK, **WHERE)


def test_a_request_is_bound_to_desk_study_and_client() -> None:
    check_requests_are_bound(joining)


@pytest.mark.parametrize(
    "change",
    [
        ("if (request.tenant, request.task, request.client) != (tenant, task, client):", "if False:"),
        (".verify(outer.signature, _REQUEST + outer.payload)", ""),
    ],
    ids=["any client", "unsigned"],
)
def test_a_desk_that_believes_more_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises(pytest.fail.Exception):
        check_requests_are_bound(broken_copy("fl_protocol.joining", change))


def check_answers_are_bound(module: ModuleType) -> None:
    """To the request, the client, and the aggregator that the token vouched for."""
    honest = {"client": CLIENT, "request_digest": DIGEST, "aggregator": AGGREGATOR.public_key()}
    sealed = joining.sealed_answer(ANSWER, to=REQUEST.answer_to, client=CLIENT, key=AGGREGATOR)
    assert encode(module.opened_answer(sealed, DEVICE, **honest)) == encode(ANSWER)
    for change in ({"client": "another"}, {"request_digest": bytes(32)}, {"aggregator": OTHER.public_key()}):
        with pytest.raises(ProtocolError):
            module.opened_answer(sealed, DEVICE, **{**honest, **change})
    forged = joining.sealed_answer(ANSWER, to=REQUEST.answer_to, client=CLIENT, key=OTHER)
    with pytest.raises(ProtocolError, match="not signed by the study's aggregator"):
        module.opened_answer(forged, DEVICE, **honest)


def test_an_answer_is_bound_to_request_client_and_aggregator() -> None:
    check_answers_are_bound(joining)


def test_a_device_that_believes_anybody_is_caught() -> None:
    broken = broken_copy("fl_protocol.joining", ("aggregator.verify(outer.signature, _ANSWER + outer.payload)", "pass"))
    with pytest.raises(pytest.fail.Exception):
        check_answers_are_bound(broken)


def test_a_request_has_a_token_or_an_enrolment_and_a_grant_all_that_goes_with_it() -> None:
    for wrong in ({"token": None}, {"enrolment": "e1"}):
        with pytest.raises(ValueError, match="expected one of them"):
            replace(REQUEST, **wrong)
    for wrong in ({"names": b""}, {"pins": None}, {"enrolment": ""}, {"outcome": "refused"}):
        with pytest.raises(ValueError, match="with every grant"):
            replace(ANSWER, **wrong)
    with pytest.raises(LocalMisuseError, match="own renewal key"):
        joining.signed_request(REQUEST, OTHER)


# Who vouches for models.

KEYS = tuple(bytes([number]) * 32 for number in (1, 2, 3))


class OlderPins(Msg, frozen=True):
    """What a device decodes that knows of one publisher only."""

    publisher_key: Digest
    helpers: Annotated[tuple[HelperPin, ...], Meta(max_length=8)]
    broker: Address


def several(**changes: Any) -> StudyPins:
    given: dict[str, Any] = {
        "publisher_key": None,
        "publishers": KEYS,
        "publisher_threshold": 2,
        "helpers": (),
        "broker": PINS.broker,
    }
    return StudyPins(**{**given, **changes})


def test_one_publisher_reads_at_a_device_that_knows_of_no_others() -> None:
    older = OlderPins(publisher_key=bytes(32), helpers=PINS.helpers, broker=PINS.broker)
    assert encode(PINS) == encode(older)
    assert decode(encode(PINS), OlderPins) == older
    assert decode(encode(older), StudyPins) == PINS


def test_a_device_that_knows_of_one_publisher_refuses_several_rather_than_pin_one_of_them() -> None:
    with pytest.raises(ProtocolError):
        decode(encode(several()), OlderPins)


def test_several_publishers_and_their_threshold_reach_the_device() -> None:
    found = decode(encode(several()), StudyPins)
    assert found == several()
    assert found.publisher_pins == (tuple(key.hex() for key in KEYS), 2)
    keys = tuple(public_key_hex(key.public_key()) for key in (OTHER, RENEWAL, AGGREGATOR))
    told = joining.study_pins(publisher_pins(None, keys, 2), helpers=(), broker=PINS.broker)
    assert decode(encode(told), StudyPins).publisher_pins == (tuple(sorted(keys)), 2)
    for alone in (publisher_pins(keys[0], (), None), publisher_pins(None, keys[:1], 1)):
        assert joining.study_pins(alone, helpers=(), broker=PINS.broker).publisher_key == bytes.fromhex(keys[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"publishers": ()},
        {"publishers": None},
        {"publishers": KEYS[::-1]},
        {"publishers": (KEYS[0], KEYS[0])},
        {"publishers": tuple(bytes([n]) * 32 for n in range(17))},
        {"publishers": (b"short",), "publisher_threshold": 1},
        {"publisher_threshold": 0},
        {"publisher_threshold": 4},
        {"publisher_threshold": None},
        {"publisher_key": bytes(32)},
    ],
)
def test_publishers_that_cannot_be_are_a_protocol_error(fields: dict[str, Any]) -> None:
    good = msgspec.msgpack.decode(encode(several()))
    order = ["publisher_key", "helpers", "broker", "publishers", "publisher_threshold", "v"]
    content = {**good, **fields}
    with pytest.raises(ProtocolError):
        decode(msgspec.msgpack.encode({name: content[name] for name in order if name in content}), StudyPins)
    for left_out in ("publisher_key", "publishers", "publisher_threshold"):
        with pytest.raises(ProtocolError):
            decode(msgspec.msgpack.encode({n: v for n, v in good.items() if n != left_out}), StudyPins)
