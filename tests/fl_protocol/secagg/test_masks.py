"""Masks: the same for all who have the seed, uniform for the others, and never the same for two purposes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from scipy import stats

from fl_protocol.secagg import masks as masks_module
from fl_protocol.secagg.masks import Masks, PrgName
from tests.enrolments import broken_copy

FALSE_ALARM_RATE = 1e-6
SEED = bytes(range(16))


def mask(
    seed: bytes = SEED, context: bytes = b"here", *, length: int = 1000, bits: int = 16, prg: str = "aes128-gcm-zeros"
):  # type: ignore[no-untyped-def]
    masks = Masks(length=length, bits=bits, prg=prg)  # type: ignore[arg-type]
    words = masks.zeros()
    masks.add(seed, context, words)
    return masks.reduced(words)


@pytest.mark.parametrize("prg", ["aes128-gcm-zeros", "chacha20"])
@pytest.mark.parametrize("bits", [12, 16, 17, 32])
def test_a_mask_is_uniform(prg: PrgName, bits: int) -> None:
    """False-alarm rate: FALSE_ALARM_RATE."""
    words = mask(length=200_000, bits=bits, prg=prg)
    assert words.max() < 1 << bits
    cells = np.bincount(words >> np.uint32(bits - 6), minlength=64)
    assert stats.chisquare(cells).pvalue > FALSE_ALARM_RATE
    low = np.bincount(words & np.uint32(63), minlength=64)
    assert stats.chisquare(low).pvalue > FALSE_ALARM_RATE


def from_plain_aes(length: int, bits: int) -> NDArray[Any]:
    """The mask of SEED, made the plain way: AES-CTR, for every block of 256 KiB from its own counter on."""
    info = b"covey v1 mask\0aes128-gcm-zeros\0here"
    key = HKDF(algorithm=SHA256(), length=16, salt=None, info=info).derive(SEED)
    word = np.dtype("<u2" if bits <= 16 else "<u4")
    stream = b""
    for block in range(-(-length * word.itemsize // 2**18)):
        counter = block.to_bytes(12, "big") + (2).to_bytes(4, "big")
        stream += Cipher(AES(key), CTR(counter)).encryptor().update(bytes(2**18))
    return np.frombuffer(stream, word, count=length) & word.type((1 << bits) - 1)


@pytest.mark.parametrize("bits", [12, 16, 17, 32])
@pytest.mark.parametrize("length", [1, 7, 1000, 300_001])
def test_the_keystream_is_that_of_aes_in_counter_mode(length: int, bits: int) -> None:
    np.testing.assert_array_equal(mask(length=length, bits=bits), from_plain_aes(length, bits))


def blocks_that_occur_twice(module: ModuleType, prg: PrgName) -> int:
    """Of AES's blocks of 16 bytes in a keystream of three and a half blocks of 256 KiB."""
    masks = module.Masks(length=7 * 2**15, bits=32, prg=prg)
    words = masks.zeros()
    masks.add(SEED, b"here", words)
    found = words.tobytes()
    return len(found) // 16 - len({found[start : start + 16] for start in range(0, len(found), 16)})


@pytest.mark.parametrize("prg", ["aes128-gcm-zeros", "chacha20"])
def test_no_part_of_a_keystream_comes_again(prg: PrgName) -> None:
    """The difference of two parts of an update would be plain to see. Chance alone: below 1e-28 for ChaCha20."""
    assert blocks_that_occur_twice(masks_module, prg) == 0


def test_a_copy_that_uses_a_nonce_twice_is_caught() -> None:
    broken = broken_copy(
        "fl_protocol.secagg.masks", ("block.to_bytes(_NONCE_BYTES", "(block // 2).to_bytes(_NONCE_BYTES")
    )
    assert blocks_that_occur_twice(broken, "aes128-gcm-zeros") >= 2**14


def test_a_longer_mask_begins_with_the_shorter() -> None:
    np.testing.assert_array_equal(mask(length=200_001)[:1000], mask(length=1000))


@pytest.mark.parametrize(
    "other", [{"seed": bytes(16)}, {"context": b"there"}, {"prg": "chacha20"}], ids=["seed", "context", "prg"]
)
def test_another_seed_purpose_or_keystream_gives_another_mask(other: dict[str, object]) -> None:
    """Two words in a thousand agree by chance more than ten times with a probability below 1e-20."""
    assert (mask() == mask(**other)).sum() < 10


@pytest.mark.parametrize("bits", [12, 16, 20])
def test_masks_that_were_added_are_taken_away_by_their_sum(bits: int) -> None:
    masks = Masks(length=500, bits=bits, prg="aes128-gcm-zeros")
    total, masked = masks.zeros(), masks.zeros()
    for index in range(100):
        seed = bytes([index]) * 16
        masks.add(seed, b"here", total)
        masks.add(seed, b"here", masked)
        masked += np.ones(500, masked.dtype)
    masked -= total
    assert masks.reduced(masked).tolist() == [100] * 500


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_seed_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="expected 16 bytes"):
        mask(bytes(length))
