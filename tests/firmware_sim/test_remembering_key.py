"""A key that remembers accepts exactly what the key itself does."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from firmware_sim import remembering_key
from tests.enrolments import broken_copy

KEY = Ed25519PrivateKey.from_private_bytes(b"\x05" * 32)
DATA = [b"", b"a", b"ab", b"b"]
SIGNATURES = [KEY.sign(data) for data in DATA] + [
    b"",
    bytes(64),
    Ed25519PrivateKey.from_private_bytes(b"\x06" * 32).sign(b"a"),
]


def accepts(key: Any, signature: bytes, data: bytes) -> bool:
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def differences(module: Any, asked: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Questions that the key that remembers answers otherwise than the key."""
    mine, right = module.RememberingKey(KEY.public_key()), KEY.public_key()
    return [
        (one, two)
        for one, two in asked
        if accepts(mine, SIGNATURES[one], DATA[two]) != accepts(right, SIGNATURES[one], DATA[two])
    ]


@given(st.lists(st.tuples(st.integers(0, len(SIGNATURES) - 1), st.integers(0, len(DATA) - 1)), max_size=30))
def test_it_accepts_exactly_what_the_key_accepts(asked: list[tuple[int, int]]) -> None:
    assert differences(remembering_key, asked) == []


@pytest.mark.parametrize(
    "wrong",
    ["if signature not in self._known:", "if data not in self._known.values():"],
    ids=["any data of a known signature", "any signature of known data"],
)
def test_a_key_that_remembers_a_half_is_caught(wrong: str) -> None:
    broken = broken_copy("firmware_sim.remembering_key", ("if self._known.get(signature) != data:", wrong))
    everything = [(one, two) for one in range(len(SIGNATURES)) for two in range(len(DATA))]
    assert differences(broken, [(1, 1), *everything])
    assert differences(remembering_key, [(1, 1), *everything]) == []


def test_what_it_remembers_is_bounded_and_nothing_that_changes_later() -> None:
    key, data = remembering_key.RememberingKey(KEY.public_key()), bytearray(b"first")
    signature = KEY.sign(b"first")
    key.verify(signature, data)
    data[:] = b"other"
    with pytest.raises(InvalidSignature):
        key.verify(signature, data)
    for number in range(600):
        one = b"%d" % number
        key.verify(KEY.sign(one), one)
    assert len(key._known) <= remembering_key._MOST
