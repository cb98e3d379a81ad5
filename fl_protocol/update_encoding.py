"""How the numbers of an update travel inside its seal: exactly, or in fewer bytes at the price of some error. Pure.

| name | bytes for d values | what is lost |
|---|---|---|
| ``float32`` | 4d | nothing |
| ``float16`` | 2d + 1 | rounding to 11 significant bits |
| ``int8`` | d + 4 for each block of up to 4096 | rounding to 255 levels, unbiased, after a random rotation |
| ``top_k`` | about 5 for each value sent | the other values, for now: the device sends them later |

The manifest names what the aggregator takes; the device chooses the first that it can use. Every encoding is a function
of what would have been sent anyway and of fresh or public randomness, so it reveals nothing that was not charged.

What is decoded here comes from devices that may be malicious. A vector has exactly one encoding (``int8``: one of each
outcome of its rounding), which is checked; what is decoded is finite, and the same bits on every machine.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fl_protocol.encoding.rotated_int8 import decode_int8, encode_int8
from fl_protocol.encoding.scaled_half import decode_half, encode_half
from fl_protocol.encoding.top_k import decode_top_k, encode_top_k
from fl_protocol.errors import LocalMisuseError, ProtocolError, RefusalReason, RefusedError
from fl_protocol.messages import EncodingName, RoundManifestMsg, TrainingPlanMsg, UpdateBodyMsg
from fl_protocol.squared_norm import squared_norm

Float32 = NDArray[np.float32]


def rotation_seed(model_digest: bytes, round_number: int) -> bytes:
    """The public seed of a round's rotation, 32 bytes.

    Args:
        model_digest: SHA-256 of the round's global model, as the manifest and every update's header name it.
        round_number: of the round that an update is *for*, from the same places.
    """
    return hashlib.sha256(b"covey v1 rotation\0" + model_digest + round_number.to_bytes(4, "big")).digest()


def usable_encoding(manifest: RoundManifestMsg) -> EncodingName | None:
    """The first of a manifest's encodings that its plan allows; None if there is none.

    ``top_k`` is for training alone: what is left for later is added to later changes of the same parameters, and
    evaluations and statistics have no such next time. Nor is it for SCAFFOLD, whose aggregator takes an update for the
    whole of what the device did.
    """
    allows_top_k = isinstance(manifest.plan, TrainingPlanMsg) and not manifest.plan.control_variates
    return next((name for name in manifest.encodings if allows_top_k or name != "top_k"), None)


def encode_values(
    values: Float32, name: EncodingName, *, seed: bytes, entropy: Callable[[int], bytes], fraction: float = 1.0
) -> bytes:
    """Encode an update's values; runs at the device.

    Args:
        values: float32 [d], finite, d at least 1; below 2^63 in magnitude for ``float16`` and ``int8``.
        name: of the encoding.
        seed: `rotation_seed` of the round, for ``int8``.
        entropy: cryptographic source for the rounding of ``int8``.
        fraction: share of the values that ``top_k`` sends, (0, 1].

    Raises:
        LocalMisuseError: values or fraction are outside these ranges.
    """
    _check_vector(values)
    if name == "float16":
        return encode_half(values)
    if name == "int8":
        return encode_int8(values, seed=seed, entropy=entropy)
    if name == "top_k":
        return encode_top_k(values, fraction=fraction)
    return bytes(float32_view(values))


def float32_view(values: Float32) -> memoryview:
    """What `encode_values` gives for ``float32``, as a view of the values: the largest updates are not copied.

    Args:
        values: float32 [d], finite, d at least 1; not to be changed as long as the view is used.

    Raises:
        LocalMisuseError: they are not that.
    """
    _check_vector(values)
    if not _are_finite(values):
        raise LocalMisuseError("values: expected finite numbers")
    return np.ascontiguousarray(values, "<f4").data.cast("B")


def decode_values(raw: bytes, name: EncodingName, *, num_parameters: int, seed: bytes) -> Float32:
    """Decode untrusted values; what is returned is finite.

    Args:
        raw: what `encode_values` gave, or anything else.
        name: of the encoding.
        num_parameters: d, known from elsewhere and at least 1; so much is allocated.
        seed: as in `encode_values`.

    Returns:
        float32 [d].

    Raises:
        ProtocolError: not the one encoding of any vector of d values.
        RefusedError: NOT_FINITE (a `ProtocolError` too): a value or a scale is NaN or infinite.
    """
    if name == "float16":
        return decode_half(raw, num_parameters)
    if name == "int8":
        return decode_int8(raw, num_parameters, seed=seed)
    if name == "top_k":
        return decode_top_k(raw, num_parameters)
    values = _float32_values(raw, num_parameters)
    if not _are_finite(values):
        raise RefusedError(RefusalReason.NOT_FINITE, "float32: a value is NaN or infinite")
    return values


def open_values(body: UpdateBodyMsg, *, seed: bytes, checks_float32: bool = True) -> Float32:
    """The values of an opened update, float32 [num_parameters], finite; runs at the aggregator.

    Args:
        body: from inside the seal, untrusted. Compare its `num_parameters` with what the round expects *before*: so
            much is allocated, whatever the length of the message.
        seed: `rotation_seed` of the round and model that the update's header names.
        checks_float32: whether it is looked through what came as float32; False for a caller that does so itself, and
            then only such values may not be finite.

    Raises:
        ProtocolError: as `decode_values`.
    """
    if body.encoding == "float32" and not checks_float32:
        return _float32_values(body.values, body.num_parameters)
    return decode_values(body.values, body.encoding, num_parameters=body.num_parameters, seed=seed)


def _check_vector(values: Float32) -> None:
    """Raises LocalMisuseError: it is no vector of float32."""
    if values.ndim != 1 or not values.size or values.dtype != np.float32:
        raise LocalMisuseError(f"values: expected float32 [d] with d > 0, got {values.dtype} {values.shape}")


def _float32_values(raw: bytes, num_parameters: int) -> Float32:
    """Values that came as they are, which may be anything. Raises ProtocolError."""
    if len(raw) != 4 * num_parameters:
        raise ProtocolError(f"float32: expected {4 * num_parameters} bytes for {num_parameters} values, got {len(raw)}")
    return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)


def _are_finite(values: Float32) -> bool:
    """Whether all values are; their sum of squares says so in half the time, unless it overflows."""
    return math.isfinite(squared_norm(values)) or bool(np.isfinite(values).all())
