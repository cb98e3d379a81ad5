"""The entropy that real devices use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from device_client.adapters.system_entropy import system_entropy

LARGE = 100_000


def check_every_request_is_fresh(entropy: Callable[[int], bytes]) -> None:
    """No 16-byte block comes twice, within a request or over several: by chance with probability below 2^-95."""
    drawn = [entropy(LARGE) for _ in range(3)]
    blocks = [data[i : i + 16] for data in drawn for i in range(0, LARGE, 16)]
    assert len(set(blocks)) == len(blocks)


def test_every_request_is_fresh() -> None:
    check_every_request_is_fresh(system_entropy)


def test_a_generator_that_keeps_its_key_is_caught() -> None:
    def keeps_its_key(count: int) -> bytes:
        return Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor().update(bytes(count))

    with pytest.raises(AssertionError):
        check_every_request_is_fresh(keeps_its_key)


@pytest.mark.parametrize("count", [0, 1, 16, 1024, 1025, 4096, LARGE])
def test_as_many_bytes_come_as_were_asked_for(count: int) -> None:
    assert len(system_entropy(count)) == count


def test_bits_are_even() -> None:
    # 800,000 bits; the share of ones is within six standard deviations of a half: false alarm 2e-9.
    ones = sum(byte.bit_count() for byte in system_entropy(LARGE))
    assert abs(ones - 4 * LARGE) < 6 * (2 * LARGE) ** 0.5
