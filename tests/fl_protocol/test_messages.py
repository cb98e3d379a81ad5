"""The codec: one encoding per message; anything else is a `ProtocolError`, and nothing but a `ProtocolError`."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import UNSET
from msgspec.structs import replace

from fl_protocol import messages
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.joining import EnrolmentRequestMsg
from fl_protocol.message_base import Msg
from fl_protocol.messages import (
    ChunkMsg,
    ChunkView,
    DeltaMsg,
    FeatureMsg,
    NackMsg,
    PresenceMsg,
    RecipientKeyMsg,
    RoundManifestMsg,
    SecureTermsMsg,
    StatisticsPlanMsg,
    TrainingPlanMsg,
    UpdateBodyMsg,
    UpdateBodyView,
    UpdateEnvelopeMsg,
    UpdateEnvelopeView,
    UpdateHeaderMsg,
    decode,
    encode,
)
from tests.fl_protocol.examples import (
    CHUNK,
    CONTROL_DIGEST,
    DELTA,
    EVALUATION_PLAN,
    EXAMPLES,
    HEADER,
    HISTOGRAM,
    MOMENTS,
    NACK,
    PLAN,
    RENEWAL_REQUEST,
    SCAFFOLD_PLAN,
    STATISTICS_PLAN,
    UPDATE_ID,
    as_map,
    manifest,
    packed,
    secure_manifest,
    secure_terms,
)
from tests.ids import short_id

KINDS = sorted({type(message) for message in EXAMPLES}, key=lambda kind: kind.__name__)
MAY_BE_MISSING: dict[type[Msg], set[str]] = {EnrolmentRequestMsg: {"proof"}}
any_example = pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)


def refused(data: bytes, kind: type[Msg]) -> str:
    """The error's text; any other outcome fails the test."""
    with pytest.raises(ProtocolError) as caught:
        decode(data, kind)
    return str(caught.value)


def decodes_or_is_refused(data: bytes, kind: type[Msg]) -> None:
    """Decoding gives a message whose one encoding is `data`, or a `ProtocolError`."""
    try:
        message = decode(data, kind)
    except ProtocolError:
        return
    assert encode(message) == data


@any_example
def test_every_message_survives_the_round_trip(message: Msg) -> None:
    assert decode(encode(message), type(message)) == message


@any_example
def test_a_field_too_many_is_refused(message: Msg) -> None:
    assert "unknown field `extra`" in refused(packed({**as_map(message), "extra": 1}), type(message))


@any_example
def test_every_missing_field_is_refused_even_one_with_a_default(message: Msg) -> None:
    fields = as_map(message)
    for name in fields.keys() - MAY_BE_MISSING.get(type(message), set()):
        refused(packed({key: value for key, value in fields.items() if key != name}), type(message))


def test_a_renewal_without_a_proof_is_read_so_that_the_desk_can_say_what_is_missing() -> None:
    fields = as_map(RENEWAL_REQUEST)
    del fields["proof"]
    assert decode(packed(fields), EnrolmentRequestMsg).proof is UNSET


@any_example
def test_a_field_given_twice_is_refused(message: Msg) -> None:
    fields = as_map(message)
    entries = encode(message)[1 if len(fields) < 16 else 3 :]
    for name, value in fields.items():
        header = b"\xde" + (len(fields) + 1).to_bytes(2, "big")
        refused(header + entries + packed({name: value})[1:], type(message))


@any_example
def test_fields_in_another_order_are_refused(message: Msg) -> None:
    refused(packed(dict(reversed(as_map(message).items()))), type(message))


@any_example
@pytest.mark.parametrize("version", [0, 2, 1.0, "1", True, None, 2**64 - 1])
def test_another_version_is_refused(message: Msg, version: object) -> None:
    refused(packed({**as_map(message), "v": version}), type(message))


@any_example
def test_a_field_of_another_type_is_refused(message: Msg) -> None:
    fields = as_map(message)
    for name, value in fields.items():
        wrong: list[object] = [{}, b"x" if not isinstance(value, bytes) else "x" * len(value)]
        wrong += [[None], [[]], [1.5], dict.fromkeys(map(str, value))] if isinstance(value, list) else [[], [value]]
        wrong += [True] if not isinstance(value, bool) else [0, 1]
        wrong += [2**64 - 1, -1, "x"] if not isinstance(value, str) else [1]
        optional = {"recipient", "most_participations", "delta", "control_digest", "secure", "credential"}
        optional |= {"token", "enrolment", "pins", "publisher_key"}
        wrong += [None] if name not in optional else []
        for other in wrong:
            refused(packed({**fields, name: other}), type(message))


@any_example
def test_trailing_bytes_and_truncations_are_refused(message: Msg) -> None:
    data = encode(message)
    refused(data + b"\0", type(message))
    refused(data + data, type(message))
    for length in range(len(data)):
        refused(data[:length], type(message))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\xc1",  # never used by MessagePack
        b"\x80",
        b"\x81\xa1\xff\x01",  # a field name that is not UTF-8
        b"\x81\xa1v" + b"\x91" * 100_000,  # nested in a known field
        b"\x81\xa1q" + b"\x91" * 100_000,  # nested in an unknown one
        b"\x81" * 100_000,
        b"\xdf\xff\xff\xff\xff",  # a map of four billion entries
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc7\x05\x01abcde",  # an extension type
        b"\xd6\xff\0\0\0\0",  # a timestamp
        b"\x81\xa1v\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
    ids=lambda data: data[:8].hex(),
)
def test_bytes_that_are_no_message_are_refused(kind: type[Msg], data: bytes) -> None:
    refused(data, kind)


def test_text_that_is_not_utf8_is_refused() -> None:
    data = encode(PresenceMsg(state="online", software="AAAA"))
    assert "utf-8" in refused(data.replace(b"AAAA", b"A\xff\xfeA"), PresenceMsg)


def test_an_integer_in_a_longer_form_is_refused() -> None:
    data = encode(PLAN)
    at = data.index(b"\xa1v\x01") + 2
    assert "shortest form" in refused(data[:at] + b"\xcc\x01" + data[at + 1 :], TrainingPlanMsg)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name, now in as_map(PLAN).items() if type(now) is float for value in (math.nan, math.inf)),
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.5),
        ("local_steps", 0),
        ("local_steps", 100_001),
        ("learning_rate", 0.0),
        ("l2_norm_clip", -1.0),
        ("noise_multiplier", -0.5),
        ("expected_batch_size", 0.0),
        ("momentum", -0.1),
        ("momentum", 1.0),
        ("proximal_mu", -0.01),
        ("control_variates", True),  # with momentum and proximal_mu
        ("learning_rate", 1),  # an integer where a float belongs has two encodings
    ],
)
def test_a_plan_out_of_range_is_refused(name: str, value: float) -> None:
    assert "TrainingPlanMsg" in refused(packed({**as_map(PLAN), name: value}), TrainingPlanMsg)
    # Nested in a manifest too.
    nested = {**as_map(manifest()), "plan": {**as_map(PLAN), name: value}}
    refused(packed(nested), RoundManifestMsg)


@pytest.mark.parametrize("kind", ["Train", "training", "", 1, None, b"train"])
def test_a_plan_of_another_kind_is_refused(kind: object) -> None:
    refused(packed({**as_map(PLAN), "kind": kind}), TrainingPlanMsg)
    refused(packed({**as_map(manifest()), "plan": {**as_map(PLAN), "kind": kind}}), RoundManifestMsg)


@pytest.mark.parametrize("plan", [PLAN, EVALUATION_PLAN, STATISTICS_PLAN], ids=lambda plan: type(plan).__name__)
def test_a_plan_says_its_kind_first_and_has_no_other_plans_fields(plan: Msg) -> None:
    fields = as_map(plan)
    assert next(iter(fields)) == "kind"
    without = {name: value for name, value in fields.items() if name != "kind"}
    for wrong in (without, {**without, "kind": fields["kind"]}):
        refused(packed(wrong), type(plan))
        refused(packed({**as_map(manifest()), "plan": wrong}), RoundManifestMsg)
    for kind in {"train", "evaluate", "statistics"} - {fields["kind"]}:
        refused(packed({**as_map(manifest()), "plan": {**fields, "kind": kind}}), RoundManifestMsg)
        refused(packed({**fields, "kind": kind}), type(plan))


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        (EVALUATION_PLAN, {"sampling_rate": 0.0}),
        (EVALUATION_PLAN, {"sampling_rate": 1.1}),
        (EVALUATION_PLAN, {"noise_multiplier": -1.0}),
        (EVALUATION_PLAN, {"noise_multiplier": math.inf}),
        (EVALUATION_PLAN, {"loss_bound": 0.0}),
        (EVALUATION_PLAN, {"loss_bound": math.inf}),
        (EVALUATION_PLAN, {"loss_bound": math.nan}),
        (MOMENTS, {"name": ""}),
        (MOMENTS, {"name": "x" * 65}),
        (MOMENTS, {"statistic": "median"}),
        (MOMENTS, {"channel": -1}),
        (MOMENTS, {"channel": 4096}),
        (MOMENTS, {"low": 20.0}),  # nothing between low and high
        (MOMENTS, {"low": math.nan}),
        (MOMENTS, {"low": -math.inf}),
        (MOMENTS, {"high": math.inf}),
        (MOMENTS, {"bins": 2}),
        (HISTOGRAM, {"bins": 1}),
        (HISTOGRAM, {"bins": 0}),
        (HISTOGRAM, {"bins": 257}),
        (STATISTICS_PLAN, {"features": []}),
        (STATISTICS_PLAN, {"features": [as_map(MOMENTS)] * 65}),
        (STATISTICS_PLAN, {"features": [{**as_map(MOMENTS), "low": 20.0}]}),
        (STATISTICS_PLAN, {"noise_multiplier": math.nan}),
        (STATISTICS_PLAN, {"sampling_rate": 2.0}),
        (DELTA, {"from_digest": bytes(31)}),
        (DELTA, {"digest": bytes(33)}),
        (DELTA, {"total_bytes": 0}),
        (DELTA, {"total_bytes": 16 * 1024 * 1024 + 1}),
    ],
    ids=short_id,
)
def test_what_is_asked_out_of_range_is_refused(plan: Msg, changes: dict[str, object]) -> None:
    fields = {**as_map(plan), **changes}
    refused(packed(fields), type(plan))
    # Nested where it belongs, too.
    match plan:
        case FeatureMsg():
            refused(packed({**as_map(STATISTICS_PLAN), "features": [fields]}), StatisticsPlanMsg)
        case DeltaMsg():
            refused(packed({**as_map(manifest()), "delta": fields}), RoundManifestMsg)
        case _:
            refused(packed({**as_map(manifest()), "plan": fields}), RoundManifestMsg)


def test_an_update_is_as_long_as_what_is_asked() -> None:
    assert manifest().update_length == 3
    assert manifest(plan=EVALUATION_PLAN).update_length == 3
    assert manifest(plan=STATISTICS_PLAN).update_length == 1 + 2 + 19


@pytest.mark.parametrize("name", ["momentum", "proximal_mu"])
def test_control_variates_go_with_plain_steps_only(name: str) -> None:
    text = refused(packed({**as_map(SCAFFOLD_PLAN), name: 0.5}), TrainingPlanMsg)
    assert "control_variates need plain steps" in text
    with pytest.raises(ValueError, match="plain steps"):
        msgspec.structs.replace(SCAFFOLD_PLAN, **{name: 0.5}).__post_init__()


def test_a_plan_written_before_these_options_is_plain_sgd() -> None:
    options = ("momentum", "proximal_mu", "control_variates")
    fields = {name: getattr(PLAN, name) for name in PLAN.__struct_fields__ if name not in options}
    plain = TrainingPlanMsg(**fields)
    assert [getattr(plain, name) for name in options] == [0.0, 0.0, False]
    assert set(options) < set(as_map(plain))  # every field is always encoded


@pytest.mark.parametrize(
    "changes",
    [
        {"control_digest": CONTROL_DIGEST},
        {"plan": SCAFFOLD_PLAN},
        {"plan": SCAFFOLD_PLAN, "control_digest": CONTROL_DIGEST, "status": "finished", "recipient": None},
        {"status": "finished", "recipient": None, "control_digest": CONTROL_DIGEST},
        {"plan": SCAFFOLD_PLAN, "control_digest": CONTROL_DIGEST, "status": "paused", "recipient": None},
        {"plan": EVALUATION_PLAN, "control_digest": CONTROL_DIGEST},
    ],
    ids=["superfluous", "missing", "finished", "finished and superfluous", "paused", "not training"],
)
def test_a_control_digest_stands_exactly_where_control_variates_are_used(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="control_digest belongs to open rounds"):
        manifest(**changes)
    fields = as_map(manifest())
    fields |= {name: as_map(value) if name == "plan" else value for name, value in changes.items()}
    assert "control_digest" in refused(packed(fields), RoundManifestMsg)


@pytest.mark.parametrize(
    "changes",
    [
        {"secure": None},
        {"engine": "open"},
        {"status": "paused", "recipient": None},
        {"maximum_staleness": 1},
        {"encodings": ["int8"]},
        {"plan": SCAFFOLD_PLAN, "control_digest": CONTROL_DIGEST},
        {"minimum_cohort": 21, "goal": 21},
    ],
    ids=short_id,
)
def test_terms_belong_to_open_secure_rounds_and_go_with_nothing_that_needs_single_updates(changes: Any) -> None:
    fields = as_map(secure_manifest())
    fields |= {name: as_map(value) if name == "plan" else value for name, value in changes.items()}
    refused(packed(fields), RoundManifestMsg)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("l2_norm_clip", 0.0),
        ("l2_norm_clip", math.inf),
        ("step", 0.0),
        ("step", math.inf),
        ("bits", 11),
        ("bits", 33),
        ("most_updates", 0),
        ("device_noise_variance", -1.0),
        ("device_noise_variance", 2.0**26 + 1),
        ("device_noise_variance", math.nan),
        ("device_noise_variance", 5e-324),
        ("helper_noise_sigma", 0.5),
        ("helper_noise_sigma", 2.0**41),
        ("clip_bit", -1),
        ("clip_bit", 2**30 + 1),
        ("prg", "aes"),
        ("helpers", []),
        ("helpers", [b"key"] * 9),
        ("helpers", [bytes(4097)]),
    ],
    ids=short_id,
)
def test_secure_terms_out_of_range_are_refused(name: str, value: object) -> None:
    refused(packed({**as_map(secure_terms()), name: value}), SecureTermsMsg)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tenant", "Clinic"),
        ("tenant", ""),
        ("tenant", "clinic\n"),  # `$` in a pattern would let this pass
        ("tenant", "a/b"),
        ("task", "+"),
        ("task", "x" * 65),
        ("task", "é"),
        ("task", "-watch"),
        ("round", 0),
        ("round", 2**31),
        ("status", "closed"),
        ("engine", "secure"),  # without its terms
        ("engine", "plain"),
        ("model_digest", bytes(31)),
        ("graph_digest", bytes(33)),
        ("num_parameters", 0),
        ("num_parameters", 4_000_001),
        ("recipient", None),  # an open round needs one
        ("status", "finished"),  # with a recipient
        ("status", "paused"),
        ("status", "aborted"),
        ("opened_s", math.nan),
        ("opened_s", -1.0),
        ("deadline_s", math.inf),
        ("deadline_s", 999_999.0),  # before it was opened
        ("goal", 4),  # below the minimum cohort
        ("minimum_cohort", 0),
        ("participation_probability", 1.01),
        ("participation_probability", math.nan),
        ("minimum_separation_s", -math.inf),
        ("most_participations", 0),
        ("maximum_staleness", -1),
        ("maximum_staleness", 1001),
        ("required_tags", ["imu", "imu"]),
        ("required_tags", ["IMU"]),
        ("required_tags", [""]),
        ("required_tags", [f"tag-{number}" for number in range(17)]),
        ("encodings", []),
        ("encodings", ["float64"]),
        ("encodings", ["int8", "int8"]),
        ("encodings", ["float32", "float16", "int8", "top_k", "float32"]),
        ("top_k_fraction", 0.0),
        ("top_k_fraction", 1.01),
        ("top_k_fraction", math.nan),
    ],
)
def test_a_manifest_out_of_range_is_refused(name: str, value: object) -> None:
    refused(packed({**as_map(manifest()), name: value}), RoundManifestMsg)


@pytest.mark.parametrize(
    "changes",
    [
        {"index": 2},
        {"count": 0},
        {"count": 65_537},
        {"total_bytes": 0},
        {"total_bytes": 16 * 1024 * 1024 + 1},
        {"data": b""},
        {"data": bytes(96 * 1024 + 1)},
        {"transfer_id": bytes(15)},
        {"index": 0},  # the first of two chunks cannot be shorter than the second
        {"count": 3, "index": 2, "total_bytes": 601},  # the 557 bytes before it do not divide by two
        {"count": 3, "index": 2},  # 256 bytes in two chunks: 128 each is needlessly small
        {"data": bytes(300)},  # nothing left for the first
    ],
    ids=short_id,
)
def test_a_chunk_that_no_cut_gives_is_refused(changes: dict[str, Any]) -> None:
    refused(packed({**as_map(CHUNK), **changes}), ChunkMsg)


def test_a_chunk_says_how_the_whole_was_cut() -> None:
    assert CHUNK.cut_bytes == 256
    first = msgspec.structs.replace(CHUNK, index=0, data=bytes(256))
    assert first.cut_bytes == 256


@pytest.mark.parametrize(
    "changes", [{"reason": "because"}, {"missing": bytes(8193)}, {"detail": "x" * 401}, {"device": "watch 1"}]
)
def test_a_nack_out_of_range_is_refused(changes: dict[str, object]) -> None:
    refused(packed({**as_map(NACK), **changes}), NackMsg)


@pytest.mark.parametrize("length", [0, 31, 1217])
def test_a_recipient_key_of_an_impossible_length_is_refused(length: int) -> None:
    refused(packed({"v": 1, "kem": "x25519", "public_key": bytes(length)}), RecipientKeyMsg)


def test_an_update_whose_length_contradicts_its_count_is_refused() -> None:
    fields = {"num_parameters": 3, "values": bytes(11), "encoding": "float32", "v": 1}
    assert "expected 12 bytes of values, got 11" in refused(packed(fields), UpdateBodyMsg)


def test_an_update_in_an_unknown_encoding_is_refused() -> None:
    for encoding in ("float64", "", None, 1):
        refused(packed({"num_parameters": 3, "values": bytes(12), "encoding": encoding, "v": 1}), UpdateBodyMsg)


LARGE: dict[type[Msg], tuple[str, Msg]] = {
    ChunkMsg: ("data", replace(CHUNK, index=0, count=1, total_bytes=70_000, data=bytes(70_000))),
    UpdateEnvelopeMsg: ("sealed", UpdateEnvelopeMsg(header=b"", signature=bytes(64), sealed=bytes(70_000))),
    UpdateBodyMsg: ("values", UpdateBodyMsg(num_parameters=17_500, values=bytes(70_000))),
}
VIEWS: dict[type[Msg], type[Msg]] = {
    ChunkMsg: ChunkView,
    UpdateEnvelopeMsg: UpdateEnvelopeView,
    UpdateBodyMsg: UpdateBodyView,
}
large_kinds = pytest.mark.parametrize("kind", LARGE, ids=lambda kind: kind.__name__)


def other_encodings(field: str, message: Msg) -> list[bytes]:
    """The same message in ways that are not its one encoding; what is bulk in it is empty bytes or none at all."""
    fields, good = as_map(message), encode(message)
    entry = packed({field: fields[field]})[1:]
    at = good.index(entry)
    bigger = bytes([good[0] + 1])
    longer = entry[: len(field) + 1] + b"\xc6" + len(fields[field]).to_bytes(4, "big") + fields[field]
    version = b"\xa1v\x01"
    assert good.endswith(version)
    return [
        good + b"\0",
        good[:-1],
        b"\0" + good,
        packed(dict(reversed(fields.items()))),
        packed({**fields, "extra": 1}),
        bigger + entry + good[1:],  # given twice, before
        bigger + good[1:at] + packed({field: b""})[1:] + good[at:],  # and first as nothing
        bigger + good[1:] + entry,  # and after
        bigger + good[1:at] + entry + packed({field: b""})[1:] + good[at + len(entry) :],
        good[: -len(version)] + b"\xa1v\xcc\x01",  # an integer in a longer form
        b"\xde" + (good[0] & 0x0F).to_bytes(2, "big") + good[1:],  # the map's header too
        *([good.replace(entry, longer)] if longer != entry else []),
    ]


@large_kinds
def test_a_large_message_has_one_encoding_too(kind: type[Msg]) -> None:
    field, message = LARGE[kind]
    for decoded_as in (kind, VIEWS[kind]):
        decoded = decode(encode(message), decoded_as)
        assert encode(decoded) == encode(message)
        for data in other_encodings(field, message):
            refused(data, decoded_as)


@large_kinds
def test_a_codec_that_does_not_look_around_the_bulk_is_caught(kind: type[Msg], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_is_its_encoding", lambda _data, _message: True)
    with pytest.raises(pytest.fail.Exception):
        test_a_large_message_has_one_encoding_too(kind)


@large_kinds
@given(data=st.data())
def test_mutated_large_messages_are_refused_unless_they_are_another_message(
    kind: type[Msg], data: st.DataObject
) -> None:
    """Around the bulk, where a decoder could be made to read something else than a second one."""
    field, message = LARGE[kind]
    mutant = bytearray(encode(message))
    bulk = len(mutant) - 70_000
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, bulk))
        at = place if place < mutant.index(bytes(100)) else len(mutant) - 1 - (bulk - place) % 20
        match data.draw(st.sampled_from(["set", "insert", "delete", "repeat"])):
            case "set":
                mutant[at] = data.draw(st.integers(0, 255))
            case "insert":
                mutant[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del mutant[at]
            case _:
                mutant[at:at] = mutant[at : at + data.draw(st.integers(1, 40))]
    assert field in kind.__struct_fields__
    for decoded_as in (kind, VIEWS[kind]):
        decodes_or_is_refused(bytes(mutant), decoded_as)


def test_what_every_peer_would_refuse_cannot_be_sent() -> None:
    with pytest.raises(LocalMisuseError, match="PresenceMsg cannot be sent"):
        encode(PresenceMsg(state="online", software="x" * 65))
    with pytest.raises(LocalMisuseError, match=r"\$\.tenant"):
        encode(manifest(tenant="Clinic"))


def test_an_integer_given_for_a_float_is_sent_as_the_float() -> None:
    assert encode(manifest(opened_s=1_000_000)) == encode(manifest(opened_s=1_000_000.0))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.binary(max_size=300))
@example(data=b"\xc4\x00")
def test_random_bytes_decode_or_are_refused(kind: type[Msg], data: bytes) -> None:
    decodes_or_is_refused(data, kind)


@any_example
@given(data=st.data())
def test_mutated_messages_decode_or_are_refused(message: Msg, data: st.DataObject) -> None:
    mutant = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutant) - 1))
        match data.draw(st.sampled_from(["flip", "set", "insert", "delete", "repeat"])):
            case "flip":
                mutant[at] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                mutant[at] = data.draw(st.integers(0, 255))
            case "insert":
                mutant[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete" if len(mutant) > 1:
                del mutant[at]
            case _:
                mutant[at:at] = mutant[at : at + data.draw(st.integers(1, 40))]
    decodes_or_is_refused(bytes(mutant), type(message))


SCALAR = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
ANYTHING = st.recursive(SCALAR, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


@any_example
@given(data=st.data())
def test_structured_nonsense_decodes_or_is_refused(message: Msg, data: st.DataObject) -> None:
    fields = as_map(message)
    for name in data.draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=3)):
        fields[name] = data.draw(ANYTHING)
    decodes_or_is_refused(packed(fields), type(message))


def test_the_codec_names_what_was_expected() -> None:
    text = refused(packed({**as_map(manifest()), "round": "five"}), RoundManifestMsg)
    assert "RoundManifestMsg" in text
    assert "$.round" in text


def test_ids_are_bytes_of_fixed_length() -> None:
    assert len(UPDATE_ID) == 16
    refused(packed({**as_map(HEADER), "update_id": bytes(17)}), UpdateHeaderMsg)
