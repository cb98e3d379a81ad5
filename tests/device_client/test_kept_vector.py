"""What stays on the device outlives a restart and fits its model."""

from __future__ import annotations

import numpy as np
import pytest

from device_client.errors import StoreError
from device_client.kept_vector import KeptVector
from tests.device_client.ports import MemoryStore

INITIAL = np.full(4, 0.25, np.float32)
NAME = "personal/watch"


def test_the_initial_values_hold_until_something_is_kept_and_that_outlives_a_restart() -> None:
    store = MemoryStore()
    vector = KeptVector(store, name=NAME, initial=INITIAL)
    np.testing.assert_array_equal(vector.values, INITIAL)
    vector.keep(np.arange(4, dtype=np.float32))
    again = KeptVector(store.after_restart(), name=NAME, initial=INITIAL)
    np.testing.assert_array_equal(again.values, [0, 1, 2, 3])
    np.testing.assert_array_equal(again.initial, INITIAL)
    assert again.values.dtype == np.float32


def test_another_name_has_its_own_values() -> None:
    store = MemoryStore()
    KeptVector(store, name=NAME, initial=INITIAL).keep(INITIAL * 2)
    np.testing.assert_array_equal(KeptVector(store, name="personal/other", initial=INITIAL).values, INITIAL)


def test_values_of_another_size_are_refused() -> None:
    store = MemoryStore()
    KeptVector(store, name=NAME, initial=INITIAL).keep(INITIAL * 2)
    with pytest.raises(StoreError, match="holds 4 parameters, the model has 3"):
        _ = KeptVector(store, name=NAME, initial=INITIAL[:3]).values


def test_a_disk_that_does_not_take_them_leaves_the_old_ones() -> None:
    store = MemoryStore()
    vector = KeptVector(store, name=NAME, initial=INITIAL)
    store.full = True
    with pytest.raises(StoreError):
        vector.keep(INITIAL * 2)
    np.testing.assert_array_equal(vector.values, INITIAL)


def test_what_is_read_can_be_changed_without_changing_what_is_kept() -> None:
    store = MemoryStore()
    vector = KeptVector(store, name=NAME, initial=INITIAL)
    vector.keep(INITIAL)
    vector.values[:] = 7
    np.testing.assert_array_equal(vector.values, INITIAL)


def test_a_model_that_keeps_nothing_stores_nothing() -> None:
    store = MemoryStore()
    none = KeptVector(store, name=NAME, initial=np.zeros(0, np.float32))
    none.keep(none.values)
    assert not store.operations
