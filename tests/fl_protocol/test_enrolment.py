"""Request and answer files: strict, signed over everything in them, with names and dates that tell nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from fl_protocol.enrolment import (
    DAY_S,
    MAX_FILE_BYTES,
    MAX_PSEUDONYMS,
    OVERLAP_S,
    IssuedCertificate,
    Period,
    PseudonymAnswer,
    PseudonymEntry,
    PseudonymRequest,
    answer_signature_is_valid,
    decode_file,
    encode_file,
    entry_signature_is_valid,
    periods_from,
    pseudonym_id,
    signed_answer,
    signed_entry,
)
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.topics import checked_name

KEY, OTHER_KEY = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
STUDY = {"tenant": "clinic", "task": "watch"}
ID, OTHER_ID = "p" + "0" * 32, "p" + "1" * 32
ENTRY = signed_entry(**STUDY, pseudonym=ID, csr="a request", key=KEY)
REQUEST = PseudonymRequest(format="covey-pseudonym-request-1", **STUDY, pseudonyms=(ENTRY,))
ISSUED = IssuedCertificate(id=ID, certificate="a certificate")
ANSWER = signed_answer(**STUDY, ca="a CA", certificates=[ISSUED], key=KEY)
FILES: list[tuple[Any, Any]] = [(REQUEST, PseudonymRequest), (ANSWER, PseudonymAnswer)]


@given(at_s=st.floats(0, 4e9), days=st.integers(2, 366), count=st.integers(1, 64))
def test_periods_follow_each_other_from_the_present_one_on(at_s: float, days: int, count: int) -> None:
    periods = periods_from(at_s, period_days=days, count=count)
    assert len(periods) == count
    assert periods[0].begins_s <= at_s < periods[0].ends_s
    for one, following in pairwise(periods):
        assert one.ends_s == following.begins_s
        # Never more than two certificates of a row are valid.
        assert one.not_after_s - following.not_before_s == 2 * OVERLAP_S <= one.ends_s - one.begins_s
    for one in periods:
        assert Period.of_validity(one.not_before_s, one.not_after_s) == one


@given(at_s=st.floats(0, 4e9), later_s=st.floats(0, 1), days=st.integers(2, 366))
def test_who_is_admitted_later_in_a_period_gets_the_same_dates(at_s: float, later_s: float, days: int) -> None:
    first = periods_from(at_s, period_days=days, count=3)
    moment = first[0].begins_s + later_s * (days * DAY_S - 1)
    assert periods_from(moment, period_days=days, count=3) == first


@pytest.mark.parametrize("days", [-1, 0, 1, 367])
def test_a_period_that_is_too_short_or_too_long_is_refused(days: int) -> None:
    with pytest.raises(LocalMisuseError, match="period_days: expected 2 to 366"):
        periods_from(0.0, period_days=days, count=1)


def test_a_name_follows_from_study_and_keys_and_stays_so() -> None:
    settings: dict[str, Any] = {**STUDY, "signing_key": bytes(32), "tls_key": b"spki"}
    name = pseudonym_id(**settings)
    # MessagePack written out by hand: an array of two strings and two binaries.
    hashed = b"covey v1 pseudonym\0" + b"\x94\xa6clinic\xa5watch\xc4\x20" + bytes(32) + b"\xc4\x04spki"
    assert name == "p" + hashlib.sha256(hashed).hexdigest()[:32]
    assert checked_name(name, "name") == name
    changed: list[dict[str, Any]] = [
        {"tenant": "clinix"},
        {"task": "watcH"},
        {"tenant": "clinicw", "task": "atch"},
        {"signing_key": b"\x01" + bytes(31)},
        {"tls_key": b"spkj"},
    ]
    assert len({pseudonym_id(**{**settings, **change}) for change in changed} | {name}) == len(changed) + 1


def test_an_entry_is_valid_only_as_it_was_signed() -> None:
    assert entry_signature_is_valid(ENTRY, **STUDY)
    other = OTHER_KEY.public_key().public_bytes_raw().hex()
    for changed in (
        replace(ENTRY, id=OTHER_ID),
        replace(ENTRY, csr="another"),
        replace(ENTRY, signing_key=other),
        replace(ENTRY, signature="0" * 128),
        replace(ENTRY, signing_key="f" * 64),
    ):
        assert not entry_signature_is_valid(changed, **STUDY)
    assert not entry_signature_is_valid(ENTRY, tenant="clinic", task="other")
    assert not entry_signature_is_valid(ENTRY, tenant="other", task="watch")


def test_an_answer_is_valid_only_as_it_was_signed() -> None:
    assert answer_signature_is_valid(ANSWER, KEY.public_key())
    assert not answer_signature_is_valid(ANSWER, OTHER_KEY.public_key())
    for changed in (
        replace(ANSWER, tenant="other"),
        replace(ANSWER, task="other"),
        replace(ANSWER, ca="another CA"),
        replace(ANSWER, aggregator_key="0" * 64),
        replace(ANSWER, certificates=(replace(ISSUED, certificate="another"),)),
        replace(ANSWER, certificates=(replace(ISSUED, id=OTHER_ID),)),
        replace(ANSWER, certificates=(ISSUED, ISSUED)),
    ):
        assert not answer_signature_is_valid(changed, KEY.public_key())


def test_files_are_read_back_however_they_were_laid_out() -> None:
    for content, kind in FILES:
        written = encode_file(content)
        assert decode_file(written, kind) == content
        assert decode_file(json.dumps(json.loads(written)).encode(), kind) == content


def test_a_request_holds_these_fields_and_no_others() -> None:
    """Whoever adds one has to say in ADR 10 what it tells about the device."""
    assert PseudonymRequest.__struct_fields__ == ("format", "tenant", "task", "pseudonyms")
    assert PseudonymEntry.__struct_fields__ == ("id", "signing_key", "csr", "signature")


def _set(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(changes)


@pytest.mark.parametrize(
    "spoil",
    [
        _set(host="anna-watch"),
        _set(format="covey-pseudonym-answer-1"),
        _set(format="covey-pseudonym-request-2"),
        _set(tenant="Clinic"),
        _set(task=""),
        _set(pseudonyms=[]),
        _set(pseudonyms=None),
        lambda content: content.update(pseudonyms=content["pseudonyms"] * (MAX_PSEUDONYMS + 1)),
        lambda content: content.pop("format"),
        lambda content: content["pseudonyms"][0].update(id="anna-watch"),
        lambda content: content["pseudonyms"][0].update(id="p" + "0" * 31),
        lambda content: content["pseudonyms"][0].update(id="p" + "0" * 32 + "\n"),
        lambda content: content["pseudonyms"][0].update(id="P" + "0" * 32),
        lambda content: content["pseudonyms"][0].update(signing_key="0" * 63),
        lambda content: content["pseudonyms"][0].update(signing_key="G" * 64),
        lambda content: content["pseudonyms"][0].update(signature="A" * 128),
        lambda content: content["pseudonyms"][0].update(csr="x" * 4097),
        lambda content: content["pseudonyms"][0].update(serial="0123"),
        lambda content: content["pseudonyms"][0].pop("csr"),
    ],
)
def test_a_request_out_of_form_is_refused(spoil: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(encode_file(REQUEST))
    spoil(content)
    with pytest.raises(ProtocolError, match="not a pseudonym request"):
        decode_file(json.dumps(content).encode(), PseudonymRequest)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 5000, b"1e999", b" " * (MAX_FILE_BYTES + 1)])
def test_a_file_of_something_else_is_refused(data: bytes) -> None:
    for _, kind in FILES:
        with pytest.raises(ProtocolError, match="not a pseudonym"):
            decode_file(data, kind)


@given(st.binary(max_size=300), st.integers(0, 700), st.integers(0, 50))
def test_nothing_but_a_protocol_error_ever_escapes(noise: bytes, start: int, length: int) -> None:
    for content, kind in FILES:
        written = encode_file(content)
        with suppress(ProtocolError):
            decode_file(written[:start] + noise + written[start + length :], kind)
