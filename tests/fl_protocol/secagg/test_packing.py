"""Residues as bytes: every one as few bits as it needs, and one encoding for each vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_protocol.errors import ProtocolError
from fl_protocol.secagg.packing import pack, packed_bytes, unpack


@given(bits=st.integers(12, 32), length=st.integers(1, 100), seed=st.integers(0, 2**32 - 1))
def test_what_was_packed_comes_out_again_and_has_one_encoding(bits: int, length: int, seed: int) -> None:
    residues = np.random.default_rng(seed).integers(0, 1 << bits, length, dtype=np.uint32)
    raw = pack(residues, bits)
    assert len(raw) == packed_bytes(length, bits) == -(-length * bits // 8)
    assert unpack(raw, length, bits).tolist() == residues.tolist()
    as_number = sum(int(value) << (bits * index) for index, value in enumerate(residues))
    assert int.from_bytes(raw, "little") == as_number


@pytest.mark.parametrize("bits", [13, 16, 19, 31])
@pytest.mark.parametrize("length", [2**16 - 1, 2**16, 2**16 + 1, 150_003])
def test_long_vectors_are_packed_like_short_ones(bits: int, length: int) -> None:
    residues = np.random.default_rng(length).integers(0, 1 << bits, length, dtype=np.uint32)
    raw = pack(residues, bits)
    each_bit = (residues[:, np.newaxis] >> np.arange(bits, dtype=np.uint32) & 1).astype(np.uint8)
    assert raw == np.packbits(each_bit, bitorder="little").tobytes()
    np.testing.assert_array_equal(unpack(raw, length, bits), residues)


@given(bits=st.integers(12, 32), length=st.integers(1, 40), raw=st.binary(max_size=200))
def test_any_bytes_are_unpacked_to_what_packs_to_them_or_refused(bits: int, length: int, raw: bytes) -> None:
    whole = (raw * (packed_bytes(length, bits) // max(1, len(raw)) + 1))[: packed_bytes(length, bits)] or b""
    for candidate in (raw, whole):
        try:
            residues = unpack(candidate, length, bits)
        except ProtocolError:
            continue
        assert pack(residues, bits) == candidate


@pytest.mark.parametrize("bits", [13, 16, 20, 32])
def test_another_length_is_refused(bits: int) -> None:
    raw = pack(np.zeros(9, np.uint32), bits)
    for wrong in (raw[:-1], raw + b"\0", b""):
        with pytest.raises(ProtocolError, match=f"for 9 residues of {bits} bits"):
            unpack(wrong, 9, bits)


def test_bits_beyond_the_last_residue_are_refused() -> None:
    raw = bytearray(pack(np.zeros(3, np.uint32), 13))
    raw[-1] |= 0x80
    with pytest.raises(ProtocolError, match="are not zero"):
        unpack(bytes(raw), 3, 13)
