"""Parameters that stay on the device: personal layers, and SCAFFOLD's own control variate. Kept in its store."""

from __future__ import annotations

import numpy as np

from device_client.errors import StoreError
from device_client.ports import Float32, Store


class KeptVector:
    """A vector of one study, float32 [length of `initial`].

    Args:
        store: where it is kept.
        name: of the blob.
        initial: what holds until something is kept; empty for a study that keeps none.
    """

    def __init__(self, store: Store, *, name: str, initial: Float32) -> None:
        self._store, self._name, self.initial = store, name, initial

    @property
    def values(self) -> Float32:
        """The current values.

        Raises:
            StoreError: what is stored does not fit the model.
        """
        raw = self._store.read(self._name) if self.initial.size else None
        if raw is None:
            return self.initial
        if len(raw) != 4 * self.initial.size:
            raise StoreError(
                f"{self._name} holds {len(raw) // 4} parameters, the model has {self.initial.size}; a model with "
                "other layers needs a task of its own"
            )
        return np.frombuffer(raw, "<f4").astype(np.float32)

    def keep(self, values: Float32) -> None:
        """Durably replace them. Raises StoreError."""
        if self.initial.size:
            self._store.write(self._name, np.ascontiguousarray(values, "<f4").tobytes())
