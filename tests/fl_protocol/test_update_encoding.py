"""Encodings of updates: what comes back, what it costs, what is refused, and that it is the same bits everywhere."""

from __future__ import annotations

import contextlib
import hashlib
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fl_protocol.encoding import rotated_int8, scaled_half, top_k
from fl_protocol.encoding.rotation import block_length, rotate, rotate_back
from fl_protocol.errors import LocalMisuseError, ProtocolError, RefusalReason, RefusedError
from fl_protocol.limits import MAX_PARAMETERS
from fl_protocol.messages import EncodingName, TrainingPlanMsg, UpdateBodyMsg
from fl_protocol.plans import EvaluationPlanMsg
from fl_protocol.update_encoding import decode_values, encode_values, open_values, rotation_seed, usable_encoding
from tests.device_client.ports import make_manifest, make_plan

Float32 = NDArray[np.float32]
NAMES: tuple[EncodingName, ...] = ("float32", "float16", "int8", "top_k")
SEED = bytes(range(32))

vectors = st.integers(1, 300).flatmap(
    lambda d: arrays(np.float32, d, elements=st.floats(-(2.0**62), 2.0**62, width=32, allow_nan=False))
)


def some_values(count: int, *, seed: int = 1, scale: float = 1.0) -> Float32:
    return (scale * np.random.default_rng(seed).normal(size=count)).astype(np.float32)


def distinct_values(count: int) -> Float32:
    """Of different magnitudes, and from integers alone: a machine's own logarithms do not enter."""
    magnitudes = Random(1).sample(range(1, 60_000), count)  # noqa: S311 - test data
    return np.array([one if one % 2 else -one for one in magnitudes], np.float32) / np.float32(1000)


def seeded(seed: int = 1) -> Callable[[int], bytes]:
    return Random(seed).randbytes  # noqa: S311 - test data


def encoded(values: Float32, name: EncodingName, *, fraction: float = 0.1, entropy_seed: int = 1) -> bytes:
    return encode_values(values, name, seed=SEED, entropy=seeded(entropy_seed), fraction=fraction)


def decoded(raw: bytes, name: EncodingName, count: int) -> Float32:
    return decode_values(raw, name, num_parameters=count, seed=SEED)


def relative_error(values: Float32, name: EncodingName) -> float:
    back = decoded(encoded(values, name), name, len(values)).astype(np.float64)
    return float(np.linalg.norm(back - values) / np.linalg.norm(values.astype(np.float64)))


# What comes back.


@given(vectors)
def test_float32_comes_back_as_it_was(values: Float32) -> None:
    assert decoded(encoded(values, "float32"), "float32", len(values)).tobytes() == values.tobytes()


@given(vectors)
def test_float16_keeps_eleven_bits_of_all_that_is_not_tiny_beside_the_largest(values: Float32) -> None:
    back = decoded(encoded(values, "float16"), "float16", len(values)).astype(np.float64)
    exact = values.astype(np.float64)
    floor = max(np.abs(exact).max() * 2.0**-28, 2.0**-114)
    assert (np.abs(back - exact) <= 2.0**-11 * np.maximum(np.abs(exact), floor)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e6, 1e15])
def test_float16_is_as_good_at_any_scale(scale: float) -> None:
    """Plain halves would be infinite above 65504 and zero below 6e-8."""
    assert relative_error(some_values(1000, scale=scale), "float16") < 3e-4


def test_a_half_that_rounds_up_to_the_next_power_of_two_takes_the_next_exponent() -> None:
    values = np.array([np.nextafter(np.float32(1), np.float32(0)), 0.25], np.float32)
    back = decoded(encoded(values, "float16"), "float16", 2)
    np.testing.assert_array_equal(back, [1, 0.25])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 378, 4096, 4097, 8711, 20_000])
def test_int8_errs_by_about_a_hundredth_whatever_the_length(count: int) -> None:
    assert relative_error(some_values(count), "int8") < 0.02


def test_int8_is_as_good_when_few_coordinates_hold_all_the_energy() -> None:
    """Without the rotation, all but the largest would round to nothing but noise."""
    values = some_values(8711, scale=1e-3)
    values[5], values[8000] = 10, -7
    assert relative_error(values, "int8") < 0.02


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.1, 0.3, 1.0])
def test_top_k_brings_the_largest_and_nothing_else(fraction: float) -> None:
    values = some_values(1000)
    back = decoded(encoded(values, "top_k", fraction=fraction), "top_k", 1000)
    count = max(1, int(np.ceil(fraction * 1000)))
    order = np.argsort(-np.abs(values))
    np.testing.assert_array_equal(back[order[:count]], values[order[:count]])
    assert not back[order[count:]].any()


@given(vectors)
def test_all_of_top_k_is_everything(values: Float32) -> None:
    np.testing.assert_array_equal(decoded(encoded(values, "top_k", fraction=1.0), "top_k", len(values)), values)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 7, 4096, 5000])
def test_zeros_come_back_as_zeros(name: EncodingName, count: int) -> None:
    assert not decoded(encoded(np.zeros(count, np.float32), name), name, count).any()


# The rotation.


def hadamard(b: int) -> NDArray[np.float64]:
    matrix = np.ones((1, 1))
    while len(matrix) < b:
        matrix = np.kron([[1.0, 1.0], [1.0, -1.0]], matrix)
    return matrix / np.sqrt(b)


def signs_of(count: int) -> NDArray[np.float64]:
    stream = np.frombuffer(hashlib.shake_256(SEED).digest((count + 7) // 8), np.uint8)
    return 1.0 - 2.0 * np.unpackbits(stream, bitorder="little")[:count]


@pytest.mark.parametrize(("count", "b"), [(1, 1), (8, 8), (11, 8), (31, 16), (4096, 4096), (6000, 4096), (9000, 4096)])
def test_the_rotation_is_the_transform_of_the_papers_on_blocks_and_on_the_last_coordinates(count: int, b: int) -> None:
    assert block_length(count) == b
    values, whole = some_values(count), count // b * b
    signs = signs_of(whole + (b if whole < count else 0))
    expected = values.astype(np.float64)
    expected[:whole] = ((expected[:whole] * signs[:whole]).reshape(-1, b) @ hadamard(b)).reshape(-1)
    if whole < count:
        expected[-b:] = (expected[-b:] * signs[whole:]) @ hadamard(b)
    np.testing.assert_allclose(rotate(values, SEED), expected, atol=2e-6)


@given(st.integers(1, 10_000), st.binary(min_size=1, max_size=40))
def test_a_rotation_keeps_the_length_and_is_undone(count: int, seed: bytes) -> None:
    values = some_values(count)
    rotated = rotate(values, seed)
    assert np.linalg.norm(rotated) == pytest.approx(np.linalg.norm(values), rel=1e-5)
    np.testing.assert_allclose(rotate_back(rotated, seed), values, atol=1e-5)


def test_what_is_decoded_is_the_same_bits_on_every_machine() -> None:
    """Digests of this test's first run; a transform through a library's matrix product would differ by the machine."""
    values = distinct_values(9000)
    digests = {
        name: hashlib.sha256(decoded(encoded(values, name), name, 9000).astype("<f4").tobytes()).hexdigest()[:16]
        for name in NAMES
    }
    assert digests == {
        "float32": "47549ef0021eba30",
        "float16": "37e14eb6779f2efd",
        "int8": "f090e8afd62cb9d5",
        "top_k": "6e1ffd1bcf45ffaf",
    }


PAGE_SEED = rotation_seed(bytes(32), 1)


@pytest.mark.parametrize(
    ("name", "raw", "values"),
    [
        ("float32", "0000803f000020c00000803e", [1, -2.5, 0.25]),
        ("float16", "f3007000f50068", [1, -2.5, 0.25]),
        ("int8", "9ca39f3c8fe6933b7fd081", [0.99569577, -2.5043044, 0.25608727]),
        ("top_k", "0102000000030000803f000020c0", [1, -2.5, 0]),
    ],
)
def test_the_examples_of_the_page_are_true(name: EncodingName, raw: str, values: list[float]) -> None:
    """docs/compression.md."""
    assert PAGE_SEED.hex() == "f04fdc5a61b1d87dc025c122c74b82ee79fae70cbd4e00d7c3af1307b3c86ef3"
    back = decode_values(bytes.fromhex(raw), name, num_parameters=3, seed=PAGE_SEED)
    np.testing.assert_array_equal(back, np.array(values, np.float32))
    page = (Path(__file__).parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")
    assert raw in page


def test_the_seed_differs_by_model_and_by_round_and_is_public() -> None:
    first = rotation_seed(b"\x01" * 32, 1)
    assert first == hashlib.sha256(b"covey v1 rotation\0" + b"\x01" * 32 + b"\0\0\0\1").digest()
    assert len({first, rotation_seed(b"\x02" * 32, 1), rotation_seed(b"\x01" * 32, 2)}) == 3


# Rounding keeps the mean.


def round_to_nearest(values: Float32, *, seed: bytes, entropy: Callable[[int], bytes]) -> bytes:
    """Broken: every draw is one half."""
    del entropy
    return rotated_int8.encode_int8(values, seed=seed, entropy=lambda count: b"\x00\x80" * (count // 2))


def round_down(values: Float32, *, seed: bytes, entropy: Callable[[int], bytes]) -> bytes:
    """Broken: never the upper neighbour."""
    del entropy
    return rotated_int8.encode_int8(values, seed=seed, entropy=lambda count: b"\xff\xff" * (count // 2))


def check_the_mean_of_many_encodings_is_the_value(encode: Callable[..., bytes]) -> None:
    """The entropy is seeded: it passes or fails for good. For a fresh seed the false-alarm rate is below 1e-4.

    The mean error of n encodings, in steps of its standard deviation summed over d = 500 coordinates, is about
    normal; rounding's standard deviation is at most half a level.
    """
    values, rounds = some_values(500), 400
    entropy = seeded()
    total = np.zeros(500)
    for _ in range(rounds):
        total += rotated_int8.decode_int8(encode(values, seed=SEED, entropy=entropy), 500, seed=SEED)
    level = np.abs(rotate(values, SEED)).max() / 127
    error = np.linalg.norm(total / rounds - values)
    assert error < 1.2 * 0.5 * level * np.sqrt(500 / rounds)


def test_rounding_keeps_the_mean() -> None:
    check_the_mean_of_many_encodings_is_the_value(rotated_int8.encode_int8)


@pytest.mark.parametrize("broken", [round_to_nearest, round_down])
def test_rounding_that_does_not_is_caught(broken: Callable[..., bytes]) -> None:
    with pytest.raises(AssertionError):
        check_the_mean_of_many_encodings_is_the_value(broken)


# What it costs.


def test_encodings_take_as_many_bytes_as_the_page_says() -> None:
    values = some_values(8711)
    assert len(encoded(values, "float32")) == 4 * 8711
    assert len(encoded(values, "float16")) == 2 * 8711 + 1
    assert len(encoded(values, "int8")) == 8711 + 4 * 3
    assert len(encoded(values, "top_k", fraction=0.01)) < 5.5 * 88
    assert len(encoded(values, "top_k", fraction=0.1)) < 5.1 * 872
    assert len(encoded(values, "top_k", fraction=1.0)) == 5 + 1089 + 4 * 8711


def test_int8_pads_nothing() -> None:
    for count in range(1, 300):
        blocks = -(-count // block_length(count))
        assert len(encoded(some_values(count), "int8")) == count + 4 * blocks
        assert blocks <= 2


@pytest.mark.parametrize(("name", "num_bytes"), [("top_k", 5), ("top_k", 16 << 20), ("int8", 9)])
def test_a_message_allocates_the_vector_and_its_own_size_at_most(name: EncodingName, num_bytes: int) -> None:
    raw = bytes(num_bytes)
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with contextlib.suppress(ProtocolError):
            decoded(raw, name, MAX_PARAMETERS)
        assert tracemalloc.get_traced_memory()[1] - before < 4 * MAX_PARAMETERS + 2 * len(raw) + 100_000
    finally:
        tracemalloc.stop()


# What is refused.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_encoded(name: EncodingName, bad: float) -> None:
    with pytest.raises(LocalMisuseError, match="finite"):
        encoded(np.array([1, bad, 2], np.float32), name)


@pytest.mark.parametrize("name", ["float16", "int8"])
def test_values_beyond_what_an_encoding_can_hold_are_not_encoded(name: EncodingName) -> None:
    with pytest.raises(LocalMisuseError, match="below 2"):
        encoded(np.array([1, 2.0**63], np.float32), name)


@pytest.mark.parametrize("values", [np.zeros(0, np.float32), np.zeros((2, 2), np.float32), np.zeros(3)])
def test_what_is_no_float32_vector_is_not_encoded(values: Float32) -> None:
    with pytest.raises(LocalMisuseError, match="float32"):
        encoded(values, "int8")


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5, float("nan")])
def test_a_fraction_out_of_its_range_is_not_used(fraction: float) -> None:
    with pytest.raises(LocalMisuseError, match="fraction"):
        encoded(some_values(3), "top_k", fraction=fraction)


@pytest.mark.parametrize("name", NAMES)
def test_another_number_of_bytes_is_refused(name: EncodingName) -> None:
    raw = encoded(some_values(50), name, fraction=0.5)
    for other in (raw[:-1], raw + b"\0", raw[1:], b""):
        with pytest.raises(ProtocolError):
            decoded(other, name, 50)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("float32", np.array([1, np.nan], "<f4").tobytes()),
        ("float16", b"\0" + np.array([2**14, np.inf], "<f2").tobytes()),
        ("float16", b"\0" + np.array([2**14, np.nan], "<f2").tobytes()),
        ("int8", np.array([np.inf], "<f4").tobytes() + b"\x7f\x00"),
        ("int8", np.array([np.nan], "<f4").tobytes() + b"\x7f\x00"),
        ("top_k", b"\0\1\0\0\0\0" + np.array([-np.inf], "<f4").tobytes()),
    ],
)
def test_what_is_not_finite_is_refused_by_name(name: EncodingName, raw: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        decoded(raw, name, 2)
    assert caught.value.reason is RefusalReason.NOT_FINITE


ONE = np.array([1], "<f4").tobytes()


@pytest.mark.parametrize(
    ("name", "count", "raw"),
    [
        # Another exponent than the vector's own, or out of range.
        ("float16", 2, b"\1" + np.array([2**13, 1], "<f2").tobytes()),
        ("float16", 2, b"\0" + np.array([2**15, 1], "<f2").tobytes()),
        ("float16", 2, b"\0" + bytes(4)),
        ("float16", 2, (49).to_bytes(1, "little") + np.array([2**14, 1], "<f2").tobytes()),
        ("float16", 2, (-101).to_bytes(1, "little", signed=True) + np.array([2**14, 1], "<f2").tobytes()),
        # -128, a scale without its 127, levels without a scale, signed zero, negative, tiny and huge scales.
        ("int8", 2, ONE + b"\x80\x7f"),
        ("int8", 2, ONE + b"\x7e\x01"),
        ("int8", 2, ONE + b"\x00\x00"),
        ("int8", 2, bytes(4) + b"\x7f\x00"),
        ("int8", 2, np.array([-0.0], "<f4").tobytes() + b"\x00\x00"),
        ("int8", 2, np.array([-1], "<f4").tobytes() + b"\x7f\x00"),
        ("int8", 2, np.array([1e-40], "<f4").tobytes() + b"\x7f\x00"),
        ("int8", 2, np.array([2.0**65], "<f4").tobytes() + b"\x7f\x00"),
        # Index beyond d; too long a number; not the shortest form; a gap without an end; more or fewer than promised.
        ("top_k", 100, b"\0\1\0\0\0\x64" + ONE),
        ("top_k", 100, b"\0\2\0\0\0\x63\x00" + ONE + ONE),
        ("top_k", 100, b"\0\1\0\0\0\x81\x80\x80\x80\x00" + ONE),
        ("top_k", 100, b"\0\1\0\0\0\x81\x00" + ONE),
        ("top_k", 100, b"\0\1\0\0\0\x81" + ONE),
        ("top_k", 100, b"\0\2\0\0\0\x01" + ONE + ONE),
        ("top_k", 100, b"\0\1\0\0\0\x01\x01" + ONE),
        ("top_k", 100, b"\0\0\0\0\0\x01"),
        ("top_k", 100, b"\0\xff\xff\xff\xff"),
        # The longer of the two forms, an unknown one, bits beyond d, a zero that is sent.
        ("top_k", 100, b"\1\1\0\0\0\x01" + bytes(12) + ONE),
        ("top_k", 8, b"\0\2\0\0\0\0\0" + ONE + ONE),
        ("top_k", 100, b"\2\1\0\0\0\1" + ONE),
        ("top_k", 4, b"\1\2\0\0\0\x11" + ONE + ONE),
        ("top_k", 4, b"\1\2\0\0\0\x01" + ONE + ONE),
        ("top_k", 100, b"\0\1\0\0\0\1" + bytes(4)),
        ("top_k", 100, b"\0\1\0\0\0\1" + np.array([-0.0], "<f4").tobytes()),
    ],
)
def test_what_no_encoder_makes_is_refused(name: EncodingName, count: int, raw: bytes) -> None:
    with pytest.raises(ProtocolError):
        decoded(raw, name, count)


def test_the_same_indices_in_their_own_form_are_taken() -> None:
    """The refusals above differ from these in one thing each."""
    assert decoded(b"\0\1\0\0\0\x63" + ONE, "top_k", 100)[99] == 1
    assert decoded(b"\1\2\0\0\0\x03" + ONE + ONE, "top_k", 8).sum() == 2
    assert decoded(ONE + b"\x7f\x01", "int8", 2).any()
    assert decoded(b"\0" + np.array([2**14, 1], "<f2").tobytes(), "float16", 2).tolist() == [2**14, 1]


def only_one_encoding_each(name: EncodingName, raw: bytes, count: int, decode: Callable[..., Float32]) -> None:
    """Anything that is taken is finite, and encodes to the very same bytes; no other error than ProtocolError."""
    try:
        values = decode(raw, count)
    except ProtocolError:
        return
    assert values.dtype == np.float32
    assert values.shape == (count,)
    assert np.isfinite(values).all()
    if name != "int8":
        assert encoded(values, name, fraction=1.0) == raw


@given(st.sampled_from(NAMES), st.binary(max_size=60), st.integers(1, 30))
def test_bytes_of_any_kind_are_refused_or_have_one_meaning(name: EncodingName, raw: bytes, count: int) -> None:
    only_one_encoding_each(name, raw, count, lambda raw, count: decoded(raw, name, count))


mutations = st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=3)


@given(st.sampled_from(NAMES), st.integers(1, 200), st.floats(0.01, 1.0), mutations)
def test_damaged_encodings_are_refused_or_have_one_meaning(
    name: EncodingName, count: int, fraction: float, changes: list[tuple[int, int]]
) -> None:
    raw = bytearray(encoded(some_values(count), name, fraction=fraction))
    for place, byte in changes:
        raw[place % len(raw)] = byte
    only_one_encoding_each(name, bytes(raw), count, lambda raw, count: decoded(raw, name, count))


def lax_half(raw: bytes, length: int) -> Float32:
    """Broken: any exponent will do."""
    exponent = int.from_bytes(raw[:1], "little", signed=True)
    return (np.frombuffer(raw, "<f2", offset=1).astype(np.float64) * 2.0**exponent).astype(np.float32)[:length]


def lax_bitmap(raw: bytes, length: int) -> Float32:
    """Broken: reads a bitmap where gaps would be shorter."""
    values = np.zeros(length, np.float32)
    bits = np.unpackbits(np.frombuffer(raw[5:-4], np.uint8), bitorder="little")
    values[np.flatnonzero(bits)] = np.frombuffer(raw[-4:], "<f4")
    return values


@pytest.mark.parametrize(
    ("name", "raw", "count", "broken", "honest"),
    [
        ("float16", b"\1" + np.array([2**13, 1], "<f2").tobytes(), 2, lax_half, scaled_half.decode_half),
        ("top_k", b"\1\1\0\0\0" + b"\1" + bytes(12) + ONE, 104, lax_bitmap, top_k.decode_top_k),
    ],
)
def test_a_decoder_that_takes_two_encodings_of_a_vector_is_caught(
    name: EncodingName, raw: bytes, count: int, broken: Callable[..., Float32], honest: Callable[..., Float32]
) -> None:
    only_one_encoding_each(name, raw, count, honest)
    with pytest.raises(AssertionError):
        only_one_encoding_each(name, raw, count, broken)


# Bodies and manifests.


@pytest.mark.parametrize("name", NAMES)
def test_an_opened_body_gives_its_values(name: EncodingName) -> None:
    values, seed = some_values(40), rotation_seed(b"\x01" * 32, 3)
    raw = encode_values(values, name, seed=seed, entropy=seeded(), fraction=1.0)
    opened = open_values(UpdateBodyMsg(num_parameters=40, values=raw, encoding=name), seed=seed)
    np.testing.assert_allclose(opened, values, atol=0.05)


def test_another_rounds_seed_gives_other_values() -> None:
    values = some_values(400)
    raw = encoded(values, "int8")
    other = decode_values(raw, "int8", num_parameters=400, seed=rotation_seed(b"\x01" * 32, 4))
    assert np.linalg.norm(other - values) > np.linalg.norm(values)


EVALUATION = EvaluationPlanMsg(sampling_rate=1.0, noise_multiplier=1.0, loss_bound=4.0)


@pytest.mark.parametrize(
    ("offered", "plan", "chosen"),
    [
        (("int8", "float32"), make_plan(), "int8"),
        (("top_k", "float32"), make_plan(), "top_k"),
        (("top_k", "float16"), make_plan(control_variates=True), "float16"),
        (("top_k", "float32"), EVALUATION, "float32"),
        (("top_k",), EVALUATION, None),
    ],
)
def test_a_device_takes_the_first_encoding_that_its_plan_allows(
    offered: tuple[EncodingName, ...], plan: TrainingPlanMsg, chosen: EncodingName | None
) -> None:
    changes = {"control_digest": b"\x09" * 32} if plan.control_variates else {}
    manifest = partial(make_manifest, plan=plan, **changes)
    assert usable_encoding(manifest(encodings=offered)) == chosen
