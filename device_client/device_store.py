"""What a device keeps in its store: identities, each session's state, pieces of downloads, a study's last model."""

from __future__ import annotations

import functools
import hashlib

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from device_client.errors import StoreError
from device_client.events import SessionState
from device_client.ports import Float32, Store
from fl_protocol.integer_noise import Entropy


@functools.lru_cache(maxsize=256)  # names of the same few blobs are asked for at every start and every message
def study_blob(kind: str, study: str) -> str:
    """Name of a study's blob of a kind; a digest, because a store's names hold no second slash."""
    return f"{kind}/{hashlib.sha256(study.encode()).hexdigest()[:32]}"


def create_identity(store: Store, study: str, entropy: Entropy) -> Ed25519PrivateKey:
    """The signing key of a study's fixed name: the one in the store, or a new one, stored before it is returned."""
    name = study_blob("identity", study)
    raw = store.read(name)
    if raw is None:
        raw = entropy(32)
        store.write(name, raw)
    return Ed25519PrivateKey.from_private_bytes(raw)


def load_identity(store: Store, study: str) -> Ed25519PrivateKey:
    """The signing key of a study's fixed name. Raises StoreError where there is none yet."""
    raw = store.read(study_blob("identity", study))
    if raw is None:
        raise StoreError(f"this device has no key for {study} yet; run covey-device init first")
    return Ed25519PrivateKey.from_private_bytes(raw)


def save_session(store: Store, state: SessionState) -> None:
    """Replace a session's state."""
    store.write(study_blob("session", state.study), msgspec.msgpack.encode(state))


def load_session(store: Store, study: str) -> SessionState:
    """A session's state; a fresh one where there is none. Raises StoreError."""
    raw = store.read(study_blob("session", study))
    if raw is None:
        return SessionState(study=study)
    try:
        return msgspec.msgpack.decode(raw, type=SessionState)
    except msgspec.DecodeError as error:
        raise StoreError(f"the session's state of {study} cannot be read ({error})") from error


def keep_chunk(store: Store, study: str, digest: bytes, *, index: int, payload: bytes) -> None:
    """Keep one verified piece of a study's download."""
    store.write(f"{_chunks_of(study)}{digest.hex()}-{index}", payload)


def kept_chunks(store: Store, study: str) -> dict[bytes, list[bytes]]:
    """By digest, the pieces of a study's downloads that were kept."""
    found: dict[bytes, list[bytes]] = {}
    for name in store.names(_chunks_of(study)):
        data = store.read(name)
        if data is not None:
            digest = bytes.fromhex(name.removeprefix(_chunks_of(study)).split("-")[0])
            found.setdefault(digest, []).append(data)
    return found


def drop_chunks(store: Store, study: str, digests: tuple[bytes, ...]) -> None:
    """Forget what is kept of a study's downloads."""
    for digest in digests:
        for name in list(store.names(f"{_chunks_of(study)}{digest.hex()}-")):
            store.delete(name)


def keep_model(store: Store, study: str, digest: bytes, params: Float32) -> None:
    """Keep a study's model instead of the one before, which goes first: flash never holds two. Raises StoreError."""
    for name in list(store.names(_model_of(study))):
        store.delete(name)
    store.write(f"{_model_of(study)}{digest.hex()}", np.ascontiguousarray(params, "<f4").tobytes())


def kept_model(store: Store, study: str) -> bytes:
    """Digest of the model that is kept for a study; empty if there is none."""
    names = list(store.names(_model_of(study)))
    return bytes.fromhex(names[0].removeprefix(_model_of(study))) if names else b""


def read_model(store: Store, study: str, digest: bytes) -> Float32 | None:
    """The kept model, float32 [d], if it is this one and its bytes are what its digest says. Raises StoreError."""
    raw = store.read(f"{_model_of(study)}{digest.hex()}")
    if raw is None or hashlib.sha256(raw).digest() != digest:
        return None
    return np.frombuffer(raw, "<f4").astype(np.float32)


def _model_of(study: str) -> str:
    """Where a study's last model is; an erasure takes it along, since it says that the device was in the study."""
    return f"{study_blob('download', f'last model of {study}')}-"


def _chunks_of(study: str) -> str:
    """Where a study's pieces are; apart from other studies', which it would take for left-overs of its own."""
    return f"{study_blob('download', study)}-"
