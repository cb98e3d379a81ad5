"""Layers that stay on the device: the end of the parameter vector, kept in its store and never sent.

Personal layers after M. G. Arivazhagan et al. 2019, "Federated Learning with Personalization Layers", arXiv
1912.00818, trained together with the shared ones. Their noise is that of the shared layers: an update of later local
steps depends on them, so leaving it out would make the shared part less private than it is accounted.
"""

from __future__ import annotations

import numpy as np

from device_client.errors import StoreError
from device_client.ports import Float32, Store


class PersonalLayers:
    """The personal parameters of one task.

    Args:
        store: where they are kept.
        task: the study's task.
        initial: the publisher's values, float32 [d − shared]; empty for a model without personal layers.
    """

    def __init__(self, store: Store, *, task: str, initial: Float32) -> None:
        self._store, self._name, self._initial = store, f"personal/{task}", initial

    @property
    def values(self) -> Float32:
        """The current values, float32 [d − shared].

        Raises:
            StoreError: what is stored does not fit the model.
        """
        raw = self._store.read(self._name) if self._initial.size else None
        if raw is None:
            return self._initial
        if len(raw) != 4 * self._initial.size:
            raise StoreError(
                f"the personal layers hold {len(raw) // 4} parameters, the model has {self._initial.size}; a model "
                "with other personal layers needs a task of its own"
            )
        return np.frombuffer(raw, "<f4").astype(np.float32)

    def keep(self, values: Float32) -> None:
        """Durably replace them. Raises StoreError."""
        if self._initial.size:
            self._store.write(self._name, np.ascontiguousarray(values, "<f4").tobytes())
