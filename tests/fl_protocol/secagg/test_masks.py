"""Masks: the same for all who have the seed, uniform for the others, and never the same for two purposes."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy import stats

from fl_protocol.secagg.masks import Masks, PrgName

FALSE_ALARM_RATE = 1e-6
SEED = bytes(range(16))


def mask(seed: bytes = SEED, context: bytes = b"here", *, length: int = 1000, bits: int = 16, prg: str = "aes128-ctr"):  # type: ignore[no-untyped-def]
    masks = Masks(length=length, bits=bits, prg=prg)  # type: ignore[arg-type]
    words = masks.zeros()
    masks.add(seed, context, words)
    return masks.reduced(words)


@pytest.mark.parametrize("prg", ["aes128-ctr", "chacha20"])
@pytest.mark.parametrize("bits", [12, 16, 17, 32])
def test_a_mask_is_uniform(prg: PrgName, bits: int) -> None:
    """False-alarm rate: FALSE_ALARM_RATE."""
    words = mask(length=200_000, bits=bits, prg=prg)
    assert words.max() < 1 << bits
    cells = np.bincount(words >> np.uint32(bits - 6), minlength=64)
    assert stats.chisquare(cells).pvalue > FALSE_ALARM_RATE
    low = np.bincount(words & np.uint32(63), minlength=64)
    assert stats.chisquare(low).pvalue > FALSE_ALARM_RATE


def test_the_keystream_is_that_of_aes_in_counter_mode() -> None:
    """Made another way: AES-GCM encrypts in counter mode, from 2 on where its nonce has 12 bytes."""
    key = HKDF(algorithm=SHA256(), length=16, salt=None, info=b"covey v1 mask\0aes128-ctr\0here").derive(SEED)
    from_two = np.frombuffer(AESGCM(key).encrypt(bytes(12), bytes(2000 - 32), None)[:-16], "<u2")
    np.testing.assert_array_equal(mask()[16:], from_two)


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
    masks = Masks(length=500, bits=bits, prg="aes128-ctr")
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
