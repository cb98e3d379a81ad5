"""Public keys for which anybody can sign are refused, wherever they come from; all others are taken."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from fl_protocol import ed25519_keys
from fl_protocol.ed25519_keys import public_key_from_bytes
from fl_protocol.errors import LocalMisuseError
from fl_protocol.signing import public_key_from_hex
from tests.enrolments import broken_copy

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]


def added(a: Point, b: Point) -> Point:
    """RFC 8032, section 5.1.4, in affine coordinates."""
    product = D * a[0] * b[0] * a[1] * b[1]
    x = (a[0] * b[1] + a[1] * b[0]) * pow(1 + product, -1, P) % P
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P) % P
    return x, y


def with_y(y: int) -> list[Point]:
    """The points that have this y."""
    squared = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(squared, (P + 3) // 8, P)
    if x * x % P != squared:
        x = x * pow(2, (P - 1) // 4, P) % P
    return [(x, y), (-x % P, y)] if x * x % P == squared else []


def of_small_order() -> set[Point]:
    """All points that eight times themselves are the neutral one, from any of order 8."""
    found: set[Point] = {(0, 1)}
    # Eight times a base point of the whole curve's order, divided by the prime order, is of order 8.
    order = 2**252 + 27742317777372353535851937790883648493
    for y in range(2, 50):
        for point in with_y(y):
            small = (0, 1)
            for bit in f"{order:b}":
                small = added(small, small)
                small = added(small, point) if bit == "1" else small
            multiple = small
            while multiple not in found:
                found.add(multiple)
                multiple = added(multiple, small)
    return found


def encodings() -> Iterator[bytes]:
    """Of the points of small order, those too that RFC 8032 says not to decode."""
    for y in {point[1] for point in of_small_order()}:
        for written in {y, y + P}:
            for sign in (0, 2**255):
                if written < 2**255:
                    yield (written + sign).to_bytes(32, "little")


def check_none_is_taken(module: ModuleType) -> None:
    for raw in encodings():
        with pytest.raises(ValueError, match="anybody can sign for"):
            module.public_key_from_bytes(raw)


def test_there_are_eight_such_points_in_fourteen_encodings_and_none_is_taken() -> None:
    assert len(of_small_order()) == 8
    # 10 of canonical y, and 4 of y + p for the y that are small enough: 0 and 1.
    assert len(set(encodings())) == 14
    check_none_is_taken(ed25519_keys)


@pytest.mark.parametrize(
    "change",
    [
        ("y >= _P or y in", "y in"),
        ("frozenset({0, ", "frozenset({"),
        ("{0, 1, _P - 1,", "{0, _P - 1,"),
        ("1, _P - 1,", "1,"),
        ("_Y_OF_ORDER_8, _P - _Y", "_P - _Y"),
        (", _P - _Y_OF_ORDER_8}", "}"),
    ],
)
def test_a_check_that_leaves_some_out_is_caught(change: tuple[str, str]) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_none_is_taken(broken_copy("fl_protocol.ed25519_keys", change))


def test_anybody_can_sign_for_them() -> None:
    """Why they are refused: this signature was made without a key."""
    neutral = (1).to_bytes(32, "little")
    signature = neutral + bytes(32)
    Ed25519PublicKey.from_public_bytes(neutral).verify(signature, b"a bundle that nobody published")
    with pytest.raises(InvalidSignature):
        Ed25519PrivateKey.generate().public_key().verify(signature, b"a bundle that nobody published")


@given(st.binary(min_size=32, max_size=32))
def test_the_keys_of_anybody_are_taken(seed: bytes) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    assert public_key_from_bytes(key.public_bytes_raw()) == key


def test_in_files_and_configurations_too() -> None:
    with pytest.raises(LocalMisuseError, match="anybody can sign for"):
        public_key_from_hex("01" + "00" * 31)
    with pytest.raises(LocalMisuseError, match="64 hex digits"):
        public_key_from_hex("01" + "00" * 30)
