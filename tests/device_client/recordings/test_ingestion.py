"""Ingestion: what fits a model is cut into windows exactly, what does not is refused, and memory is bounded."""

from __future__ import annotations

import json
import math
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_client.errors import StoreError
from device_client.recordings.ingestion import (
    MAX_WINDOW_VALUES,
    StreamTarget,
    Windows,
    encode_reply,
    ingest,
    windows_from,
)
from device_client.recordings.recording_msg import (
    MAX_MESSAGE_BYTES,
    Recording,
    RecordingError,
    decode_recording,
    recording_of,
)
from fl_protocol.model_manifest import InputSchema, LabelSchema

NOW_S = 1_700_000_000.0
WATCH = InputSchema(shape=(4, 3), channels=("ax", "ay", "wz"), units=("g", "g", "rad/s"), sampling_rate_hz=50.0)
IMAGE = InputSchema(shape=(2, 3, 1), channels=("grey",), units=("1/255",), sampling_rate_hz=0.0)
FEATURES = InputSchema(shape=(3,), channels=("a", "b", "c"), units=("1", "1", "1"), sampling_rate_hz=0.0)
WALK_OR_RUN = LabelSchema(kind="class", names=("walk", "run"))
PULSE = LabelSchema(kind="value", names=("pulse", "stress"), units=("1/min", "1"))
SIGNS = LabelSchema(kind="binary", names=("tremor", "fall"))
ITSELF = LabelSchema(kind="input")


def message(samples: int = 4, /, **changes: Any) -> dict[str, Any]:
    """A recording that fits, as it is sent; a change of None leaves the field out."""
    fields: dict[str, Any] = {
        "channels": ["ax", "ay", "wz"],
        "units": ["g", "g", "rad/s"],
        "sampling_rate_hz": 50,
        "x": [[i, i + 0.25, -i] for i in range(samples)],
        "label": "run",
        **changes,
    }
    return {name: value for name, value in fields.items() if value is not None}


def windows_of(
    fields: dict[str, Any], *, takes: InputSchema = WATCH, label: LabelSchema = WALK_OR_RUN, encoding: Any = "json"
) -> Windows:
    encode = msgspec.json.encode if encoding == "json" else msgspec.msgpack.encode
    return windows_from(decode_recording(encode(fields), encoding), input=takes, label=label)


def test_a_recording_of_one_window_is_one_record() -> None:
    made = windows_of(message())
    assert made.x.dtype == np.float32
    np.testing.assert_array_equal(made.x, [[[i, i + 0.25, -i] for i in range(4)]])
    assert made.y.dtype == np.int32
    assert made.y.tolist() == [1]
    assert made.notes == ()


def test_rows_of_json_and_of_messagepack_and_its_bytes_are_the_same_record() -> None:
    fields = message(9)
    packed = message(9, x=np.array(fields["x"], "<f4").tobytes(), shape=[9, 3])
    one, two, three = windows_of(fields), windows_of(fields, encoding="msgpack"), windows_of(packed, encoding="msgpack")
    np.testing.assert_array_equal(one.x, two.x)
    np.testing.assert_array_equal(one.x, three.x)


@settings(max_examples=200, deadline=None)
@given(samples=st.integers(4, 60), hop=st.none() | st.integers(1, 70))
def test_window_k_begins_k_hops_after_the_first_and_no_window_is_missing(samples: int, hop: int | None) -> None:
    x = np.arange(samples * 3, dtype=np.float32).reshape(samples, 3)
    made = windows_from(recording_of(x, 0, input=WATCH, hop=hop), input=WATCH, label=WALK_OR_RUN)
    step = hop or 4
    expected = [x[start : start + 4] for start in range(0, samples - 3, step)]
    np.testing.assert_array_equal(made.x, expected)
    assert made.x.flags.c_contiguous
    assert len(made.y) == len(expected)


def test_samples_that_are_too_few_for_another_window_are_reported() -> None:
    (note,) = windows_of(message(11)).notes
    assert note == "the last 3 samples were less than a window of 4 and were left out"
    (note,) = windows_of(message(7, hop=2)).notes
    assert note.startswith("the last 1 samples")


def test_channels_in_another_order_are_put_in_the_models() -> None:
    rows = [[-i, i, i + 0.25] for i in range(4)]
    made = windows_of(message(channels=["wz", "ax", "ay"], units=["rad/s", "g", "g"], x=rows))
    np.testing.assert_array_equal(made.x, windows_of(message()).x)


@pytest.mark.parametrize(
    ("units", "factors"),
    [
        (["m/s^2", "m/s²", "rad/s"], [1 / 9.80665, 1 / 9.80665, 1.0]),
        (["g", "mg", "deg/s"], [1.0, 0.001, math.pi / 180]),
        (["g", "g", "°/s"], [1.0, 1.0, math.pi / 180]),
    ],
)
def test_equal_quantities_are_converted_and_the_sender_is_told(units: list[str], factors: list[float]) -> None:
    made = windows_of(message(units=units))
    np.testing.assert_allclose(made.x, windows_of(message()).x * np.array(factors), rtol=2e-7)
    assert sum("converted from" in note for note in made.notes) == len({f for f in factors if f != 1.0})


def test_standard_gravity_is_exact() -> None:
    in_si = InputSchema(shape=(1, 1), channels=("ax",), units=("m/s^2",), sampling_rate_hz=50.0)
    made = windows_of(message(channels=["ax"], units=["g"], x=[[1]]), takes=in_si)
    assert made.x[0, 0, 0] == np.float32(9.80665)
    assert made.notes == ("ax: converted from g to m/s^2",)


def test_microvolts_become_millivolts_in_both_spellings_of_micro() -> None:
    ecg = InputSchema(shape=(1, 1), channels=("ecg",), units=("mV",), sampling_rate_hz=50.0)
    for unit in ("uV", "\u00b5V", "\u03bcV"):
        made = windows_of(message(channels=["ecg"], units=[unit], x=[[1500.0]]), takes=ecg)
        assert made.x[0, 0, 0] == np.float32(1.5)


@pytest.mark.parametrize(
    ("given_label", "schema", "expected"),
    [
        ("walk", WALK_OR_RUN, [0, 0]),
        (1, WALK_OR_RUN, [1, 1]),
        (1.0, WALK_OR_RUN, [1, 1]),
        ([61.5, 2], PULSE, [[61.5, 2], [61.5, 2]]),
        ([0, 1], SIGNS, [[0, 1], [0, 1]]),
        (7, LabelSchema(kind="value", names=("pulse",)), [[7], [7]]),
        (None, ITSELF, [0, 0]),
    ],
)
def test_a_label_is_that_of_every_window(given_label: Any, schema: LabelSchema, expected: Any) -> None:
    made = windows_of(message(8, label=given_label), label=schema)
    np.testing.assert_array_equal(made.y, expected)
    assert made.y.dtype == (np.int32 if schema.kind in {"class", "input"} else np.float32)


def test_a_label_that_the_model_does_not_take_is_not_stored() -> None:
    made = windows_of(message(label="private"), label=ITSELF)
    assert made.y.tolist() == [0]
    assert made.notes == ("the model takes no label; the label was not stored",)


def test_an_image_is_exactly_one_example() -> None:
    image = message(channels=["grey"], units=["1/255"], sampling_rate_hz=None, x=[[[1], [2], [3]], [[4], [5], [6]]])
    assert windows_of(image, takes=IMAGE).x.tolist() == [image["x"]]
    wide = {**image, "x": [[[1], [2], [3]]] * 3}
    with pytest.raises(RecordingError, match=r"exactly one example of shape \(2, 3, 1\), got \(3, 3, 1\)"):
        windows_of(wide, takes=IMAGE)
    with pytest.raises(RecordingError, match="hop: expected none"):
        windows_of({**image, "hop": 1}, takes=IMAGE)
    with pytest.raises(RecordingError, match="expected 0, as this model's input has no time axis, got 50 Hz"):
        windows_of({**image, "sampling_rate_hz": 50}, takes=IMAGE)


def test_an_example_may_be_a_row_of_features() -> None:
    row = message(channels=["c", "a", "b"], units=["1"] * 3, sampling_rate_hz=None, x=[3, 1, 2])
    assert windows_of(row, takes=FEATURES).x.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("rate", [49.5, 50.0, 50.49])
def test_a_rate_within_one_percent_is_taken_as_it_is(rate: float) -> None:
    np.testing.assert_array_equal(windows_of(message(sampling_rate_hz=rate)).x, windows_of(message()).x)


ROWS = message(6)["x"]
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"channels": ["ax", "ay", "gz"]}, "expected ax, ay, wz, each once, in any order; missing wz; unknown gz"),
    ({"channels": ["ax", "ax", "ay", "wz"], "units": ["g"] * 4, "x": [[1] * 4] * 4}, "one is there twice"),
    ({"channels": []}, "channels"),
    ({"units": ["g", "g"]}, "units: expected one for each of 3 channels, got 2"),
    ({"units": ["g", "furlong/s^2", "rad/s"]}, "expected g for channel ay, got 'furlong/s\\^2'; convert it before"),
    ({"units": ["g", "g", "m/s^2"]}, "expected rad/s for channel wz, got 'm/s\\^2'"),
    ({"units": ["g", "g", "G"]}, "expected rad/s for channel wz, got 'G'"),
    ({"sampling_rate_hz": 50.6}, "expected 50 Hz within 1%, got 50.6 Hz; resample to 50 Hz"),
    ({"sampling_rate_hz": 49.4}, "got 49.4 Hz; resample"),
    ({"sampling_rate_hz": None}, "sampling_rate_hz: expected 50 Hz, got none"),
    ({"sampling_rate_hz": -50}, "sampling_rate_hz"),
    ({"x": []}, "x: expected a list of rows"),
    ({"x": "AAAAAA=="}, "x: expected a list of rows"),
    ({"x": [1.0, 2.0]}, r"x: expected rows of 3 numbers, got an array of shape \(2,\)"),
    ({"x": ROWS[:3]}, "x: expected at least one window of 4 samples, got 3"),
    (
        {"x": [*ROWS[:2], [1, 2], *ROWS]},
        r"x, row 2 \(the first is 0\): expected 3 numbers, one for each channel, got 2",
    ),
    ({"x": [[1, 2], *ROWS]}, "x, row 0 .*: expected 3 numbers, one for each channel, got 2"),
    ({"x": [*ROWS, [1, "2", 3]]}, "x, row 6 .*: expected 3 numbers, got '2' in column 1"),
    ({"x": [*ROWS, [1, 2, None]]}, "x, row 6 .*: expected 3 numbers, got None in column 2"),
    ({"x": [*ROWS, [True, 2, 3]]}, "x, row 6 .*: expected 3 numbers, got True in column 0"),
    ({"x": [*ROWS, 5]}, "x, row 6 .*: expected 3 numbers, got 5"),
    ({"x": [*ROWS, [1, 2, 1e39]]}, "x, row 6 .*: expected finite numbers in the range of float32"),
    ({"x": [[[[[[1]]]]]]}, "expected at most 4 axes"),
    ({"shape": [4, 3]}, "shape: expected only beside x as bytes"),
    ({"label": None}, "label: expected one of walk, run, or its index from 0 to 1, got none"),
    ({"label": "jump"}, "label: expected one of walk, run, or its index from 0 to 1, got 'jump'"),
    ({"label": 2}, "got 2"),
    ({"label": -1}, "got -1"),
    ({"label": 0.5}, "got 0.5"),
    ({"label": [0]}, r"got \(0.0,\)"),
    ({"label": True}, "label"),
    ({"hop": 0}, "hop"),
    ({"at_s": NOW_S}, "unknown field `at_s`"),
    ({"stream": "../etc"}, "stream"),
    ({"lable": "run"}, "unknown field `lable`"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSALS, ids=[str(number) for number in range(len(REFUSALS))])
def test_what_does_not_fit_is_refused_with_what_to_do(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecordingError, match=sentence):
        windows_of(message(**changes))


@pytest.mark.parametrize(
    ("given_label", "schema", "sentence"),
    [
        ([1], PULSE, "a number for each of pulse, stress; .*takes 2 numbers"),
        ("fast", PULSE, "a number for each of pulse, stress, got 'fast'"),
        ([1, 1e39], PULSE, "not finite"),
        ([0, 2], SIGNS, "0 or 1 for each of tremor, fall; .*other than 0 and 1"),
    ],
)
def test_labels_of_other_kinds_are_checked(given_label: Any, schema: LabelSchema, sentence: str) -> None:
    with pytest.raises(RecordingError, match=sentence):
        windows_of(message(label=given_label), label=schema)


def test_python_senders_of_nan_are_told_the_row() -> None:
    broken = message(6)
    broken["x"][3][1] = math.nan
    with pytest.raises(RecordingError, match=r"x, row 3 \(the first is 0\): expected finite numbers"):
        decode_recording(json.dumps(broken).encode(), "json")
    elsewhere = json.dumps(message(sampling_rate_hz=math.nan)).encode()
    with pytest.raises(RecordingError, match="expected one recording in json, got something else"):
        decode_recording(elsewhere, "json")


def test_packed_nan_is_refused_by_row() -> None:
    x = np.zeros((6, 3), "<f4")
    x[5, 2] = np.nan
    with pytest.raises(RecordingError, match="x, row 5"):
        windows_of(message(x=x.tobytes(), shape=[6, 3]), encoding="msgpack")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shape": [5, 3]}, r"float32 of shape \(5, 3\) with 3 channels last, got 48 bytes"),
        ({"shape": [3, 4]}, "with 3 channels last"),
        ({"shape": [1 << 62, 3]}, "got 48 bytes"),
        ({"shape": None}, "shape: expected one beside x as bytes"),
        ({"shape": [0, 3]}, "shape"),
        ({"sampling_rate_hz": math.nan}, "sampling_rate_hz"),
    ],
)
def test_packed_rows_have_to_have_the_shape_they_say(changes: dict[str, Any], sentence: str) -> None:
    packed = {"x": b"\0" * 48, "shape": [4, 3], **changes}
    with pytest.raises(RecordingError, match=sentence):
        windows_of(message(**packed), encoding="msgpack")


@pytest.mark.parametrize(
    "x", [[["1", "2", "3"]], [[None] * 3], [[1, 2], [3]], "123", [[1 + 2j, 0, 0]], np.array([[True, False, True]])]
)
def test_python_arrays_of_anything_but_numbers_are_refused(x: Any) -> None:
    with pytest.raises(RecordingError, match="expected an array of numbers"):
        recording_of(x, 0, input=WATCH)


def test_python_labels_may_be_numpys() -> None:
    recording = recording_of(np.zeros((4, 3)), np.int64(1), input=WATCH)
    assert windows_from(recording, input=WATCH, label=WALK_OR_RUN).y.tolist() == [1]
    recording = recording_of(np.zeros((4, 3)), np.array([1, 0]), input=WATCH)
    assert windows_from(recording, input=WATCH, label=SIGNS).y.tolist() == [[1, 0]]
    for label in (True, 10**400, "1"):
        with pytest.raises(RecordingError, match="label: expected"):
            windows_from(recording_of(np.zeros((4, 3)), label, input=WATCH), input=WATCH, label=PULSE)
    with pytest.raises(RecordingError, match="hop: expected at least 1 sample, got 0"):
        recording_of(np.zeros((4, 3)), 0, input=WATCH, hop=0)


def test_a_small_hop_cannot_fill_the_memory() -> None:
    long = InputSchema(shape=(4096, 1), channels=("ax",), units=("g",), sampling_rate_hz=50.0)
    most = MAX_WINDOW_VALUES // 4096
    x = np.zeros((4096 + most, 1), np.float32)
    with pytest.raises(RecordingError, match="hop: 1 samples would make 1,025 windows"):
        windows_from(recording_of(x, 0, input=long, hop=1), input=long, label=WALK_OR_RUN)
    made = windows_from(recording_of(x[:-1], 0, input=long, hop=1), input=long, label=WALK_OR_RUN)
    assert made.x.size == MAX_WINDOW_VALUES


HEAD = b'{"channels":["ax","ay","wz"],"units":["g","g","rad/s"],"sampling_rate_hz":50,"label":"run","x":['


@pytest.mark.parametrize("part", [b"[]", b"[0,0,0]", b"0", b"[[[[]]]]", b'""', b"{}", b"NaN"])
def test_the_worst_message_of_the_largest_size_takes_bounded_memory(part: bytes) -> None:
    count = (MAX_MESSAGE_BYTES - len(HEAD) - 2) // (len(part) + 1)
    payload = HEAD + b",".join([part] * count) + b"]}"
    assert MAX_MESSAGE_BYTES - 16 < len(payload) <= MAX_MESSAGE_BYTES
    tracemalloc.start()
    reply = ingest(payload, "json", streams={"default": target([])}, now_s=NOW_S)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reply.keys() in ({"error"}, {"stored", "notes"})
    assert peak < 128 * 1024 * 1024


@pytest.mark.parametrize(("encoding", "opening"), [("json", b"["), ("msgpack", b"\x91")])
def test_endless_nesting_is_refused_with_a_sentence(encoding: Any, opening: bytes) -> None:
    start = HEAD if encoding == "json" else b"\x81\xa1x"
    with pytest.raises(RecordingError, match=f"expected one recording in {encoding}, got something else"):
        decode_recording(start + opening * 100_000, encoding)
    with pytest.raises(RecordingError, match=f"expected one recording in {encoding}, got something else"):
        decode_recording(start + opening * 100_000 + b"NaN", encoding)


def test_a_message_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(RecordingError, match=r"at most 2,097,152 bytes, got 2,097,153; send it in pieces"):
        decode_recording(b"[" * (MAX_MESSAGE_BYTES + 1), "json")


def target(stored: list[Any], *, takes: InputSchema = WATCH, label: LabelSchema = WALK_OR_RUN) -> StreamTarget:
    def append(x: Any, y: Any, *, at_s: float) -> int:
        stored.append((x, y, at_s))
        return len(stored)

    return StreamTarget(takes, label, append)


def test_ingest_stores_and_answers() -> None:
    stored: list[Any] = []
    reply = ingest(msgspec.json.encode(message(9)), "json", streams={"default": target(stored)}, now_s=NOW_S)
    assert reply == {
        "stored": 2,
        "notes": ["the last 1 samples were less than a window of 4 and were left out"],
    }
    ((x, y, at_s),) = stored
    assert (x.shape, y.tolist(), at_s) == ((2, 4, 3), [1, 1], NOW_S)
    assert json.loads(encode_reply(reply, "json")) == reply
    assert msgspec.msgpack.decode(encode_reply(reply, "msgpack")) == reply


def test_a_stream_takes_what_its_own_model_takes() -> None:
    watch: list[Any] = []
    features: list[Any] = []
    streams = {"default": target(watch), "daily": target(features, takes=FEATURES, label=ITSELF)}
    row = message(
        channels=["a", "b", "c"], units=["1"] * 3, sampling_rate_hz=None, label=None, x=[1, 2, 3], stream="daily"
    )
    assert ingest(msgspec.json.encode(row), "json", streams=streams, now_s=NOW_S) == {"stored": 1, "notes": []}
    assert (len(watch), len(features)) == (0, 1)
    reply = ingest(msgspec.json.encode(message(stream="night")), "json", streams=streams, now_s=NOW_S)
    assert reply == {"error": "stream: expected one of daily, default, got night"}


def test_a_refused_recording_stores_nothing() -> None:
    stored: list[Any] = []
    for changes, _ in REFUSALS:
        payload = msgspec.json.encode(message(4, **changes))
        assert ingest(payload, "json", streams={"default": target(stored)}, now_s=NOW_S).keys() == {"error"}
    assert stored == []


def test_a_store_that_does_not_take_it_is_an_answer() -> None:
    def full(x: Any, y: Any, *, at_s: float) -> int:
        raise StoreError("the disk is full; make room")

    streams = {"default": StreamTarget(WATCH, WALK_OR_RUN, full)}
    reply = ingest(msgspec.json.encode(message()), "json", streams=streams, now_s=NOW_S)
    assert reply == {"error": "the disk is full; make room"}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["ax", "g", "run"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from([*message(shape=1, stream=1, hop=1)]), JSON_VALUES),
    packed=st.booleans(),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3),
)
def test_whatever_comes_is_answered_and_never_half_stored(
    fields: dict[str, Any], packed: bool, flips: list[tuple[int, int]]
) -> None:
    stored: list[Any] = []
    whole = {**message(), **fields}
    try:
        payload = bytearray(msgspec.msgpack.encode(whole) if packed else json.dumps(whole).encode())
    except OverflowError:  # MessagePack has no integers beyond 64 bits
        return
    for place, value in flips:
        payload[place % len(payload)] = value
    encoding: Any = "msgpack" if packed else "json"
    reply = ingest(bytes(payload), encoding, streams={"default": target(stored)}, now_s=NOW_S)
    encode_reply(reply, encoding)
    if "error" in reply:
        assert isinstance(reply["error"], str)
        assert stored == []
    else:
        ((x, y, at_s),) = stored
        assert x.shape == (reply["stored"], 4, 3)
        assert np.isfinite(x).all()
        assert set(y.tolist()) <= {0, 1}
        assert at_s == NOW_S


@given(st.binary(max_size=200), st.sampled_from(["json", "msgpack"]))
def test_random_bytes_are_refused_with_a_sentence(payload: bytes, encoding: Any) -> None:
    assert ingest(payload, encoding, streams={}, now_s=NOW_S).keys() == {"error"}


def test_a_recording_keeps_what_its_sender_said() -> None:
    decoded = decode_recording(msgspec.json.encode(message(stream="left", hop=2)), "json")
    assert isinstance(decoded, Recording)
    assert (decoded.stream, decoded.hop, decoded.label) == ("left", 2, "run")
