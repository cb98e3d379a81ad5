"""SCAFFOLD's own control variate c_i on the device, which changes only with rounds that counted.

A training proposes the next c_i (S. P. Karimireddy et al., arXiv 1910.06378, option II). The aggregator's c moves only
if it has this device's update and commits the round, so c_i is taken over when both are known: the receipt has come,
and a manifest of a later round names another model (an aborted round leaves the model as it was). Otherwise c_i stays.

Like all that is computed from noisy sums, it reveals nothing that was not charged; it never leaves the device.
"""

from __future__ import annotations

import msgspec
import numpy as np

from device_client.errors import StoreError
from device_client.ports import Float32, Store
from fl_protocol.messages import RoundManifestMsg


class _Proposed(msgspec.Struct, frozen=True):
    """What a round's training proposed."""

    round: int
    model_digest: bytes
    values: bytes
    delivered: bool = False


class _Kept(msgspec.Struct, frozen=True):
    """What is stored: little-endian float32; `values` is empty for zeros."""

    values: bytes = b""
    proposed: _Proposed | None = None


class ControlVariate:
    """The c_i of one study.

    Args:
        store: where it is kept.
        name: of the blob.
        length: shared parameters of the model.
    """

    def __init__(self, store: Store, *, name: str, length: int) -> None:
        self._store, self._name, self._length = store, name, length

    def at(self, manifest: RoundManifestMsg) -> Float32:
        """c_i as this round starts from it, float32 [length]; zeros at first. Raises StoreError."""
        kept = self._load()
        proposed = kept.proposed
        if proposed is not None and manifest.round > proposed.round:
            counted = proposed.delivered and manifest.model_digest != proposed.model_digest
            kept = _Kept(proposed.values if counted else kept.values)
            self._write(kept)
        if not kept.values:
            return np.zeros(self._length, np.float32)
        return np.frombuffer(kept.values, "<f4").astype(np.float32)

    def propose(self, manifest: RoundManifestMsg, values: Float32) -> None:
        """Keep aside what a round's training gives. Raises StoreError."""
        raw = np.ascontiguousarray(values, "<f4").tobytes()
        self._write(_Kept(self._load().values, _Proposed(manifest.round, manifest.model_digest, raw)))

    def delivered(self, round_number: int) -> None:
        """The round's update has its receipt. Raises StoreError."""
        kept = self._load()
        if kept.proposed is not None and kept.proposed.round == round_number:
            self._write(msgspec.structs.replace(kept, proposed=msgspec.structs.replace(kept.proposed, delivered=True)))

    def _load(self) -> _Kept:
        """What is stored."""
        raw = self._store.read(self._name)
        if raw is None:
            return _Kept()
        try:
            kept = msgspec.msgpack.decode(raw, type=_Kept)
        except msgspec.DecodeError as error:
            raise StoreError(f"the control variate in {self._name} cannot be read ({error})") from error
        if kept.values and len(kept.values) != 4 * self._length:
            raise StoreError(
                f"{self._name} holds {len(kept.values) // 4} parameters, the model has {self._length}; a model with "
                "other layers needs a task of its own"
            )
        return kept

    def _write(self, kept: _Kept) -> None:
        self._store.write(self._name, msgspec.msgpack.encode(kept))
