"""What a device keeps in its store besides outbox and ledger: its identity, its records, its session state."""

from __future__ import annotations

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.errors import StoreError
from device_client.events import SessionState
from device_client.noise import Entropy
from device_client.ports import Store
from device_client.training import Records
from fl_protocol.model_manifest import LabelSchema, label_problem

_IDENTITY, _RECORDS, _SESSION = "identity", "records", "session"


class _StoredRecords(msgspec.Struct, frozen=True):
    """Records as they are stored, little-endian: x float32; y int32, or float32 with `label_columns` if there are."""

    shape: tuple[int, ...]
    x: bytes
    y: bytes
    label_columns: int = 0


def create_identity(store: Store, entropy: Entropy) -> Ed25519PrivateKey:
    """The device's signing key: the one in the store, or a new one, stored before it is returned."""
    raw = store.read(_IDENTITY)
    if raw is None:
        raw = entropy(32)
        store.write(_IDENTITY, raw)
    return Ed25519PrivateKey.from_private_bytes(raw)


def load_identity(store: Store) -> Ed25519PrivateKey:
    """The device's signing key. Raises StoreError where there is none yet."""
    raw = store.read(_IDENTITY)
    if raw is None:
        raise StoreError("this device has no identity yet; run covey-device init first")
    return Ed25519PrivateKey.from_private_bytes(raw)


def save_records(store: Store, records: Records) -> None:
    """Replace the stored records."""
    columns = records.y.shape[1] if records.y.ndim == 2 else 0
    stored = _StoredRecords(
        shape=records.x.shape,
        x=np.ascontiguousarray(records.x, "<f4").tobytes(),
        y=np.ascontiguousarray(records.y, "<f4" if columns else "<i4").tobytes(),
        label_columns=columns,
    )
    store.write(_RECORDS, msgspec.msgpack.encode(stored))


def load_records(store: Store, *, window_shape: tuple[int, ...], label: LabelSchema) -> Records:
    """The stored records, checked against the model's schema.

    Raises:
        StoreError: there are none, or they do not fit the model.
    """
    raw = store.read(_RECORDS)
    if raw is None:
        raise StoreError("this device holds no records; run covey-device import first")
    stored = msgspec.msgpack.decode(raw, type=_StoredRecords)
    x = np.frombuffer(stored.x, "<f4").reshape(stored.shape).astype(np.float32)
    if stored.label_columns:
        y = np.frombuffer(stored.y, "<f4").reshape(-1, stored.label_columns).astype(np.float32)
        records = Records(x, y)
    else:
        records = Records(x, np.frombuffer(stored.y, "<i4").astype(np.int32))
    check_records(records, window_shape=window_shape, label=label)
    return records


def check_records(records: Records, *, window_shape: tuple[int, ...], label: LabelSchema) -> None:
    """Whether records fit a model's schema.

    Raises:
        StoreError: they do not.
    """
    if records.x.shape[1:] != window_shape:
        raise StoreError(f"the windows are {records.x.shape[1:]}, the model takes {window_shape}; import others")
    if not np.isfinite(records.x).all():
        raise StoreError("the windows hold numbers that are not finite; import others")
    problem = label_problem(records.y, label)
    if problem:
        raise StoreError(f"{problem}; import others")


def save_session(store: Store, state: SessionState) -> None:
    """Replace the session's state."""
    store.write(_SESSION, msgspec.msgpack.encode(state))


def load_session(store: Store) -> SessionState:
    """The session's state; a fresh one where there is none."""
    raw = store.read(_SESSION)
    return SessionState() if raw is None else msgspec.msgpack.decode(raw, type=SessionState)
