"""Model bundles (``*.covey``): a signed zip that holds everything a device needs to train one model.

Members: ``manifest.json``, ``graph.tflite`` (signatures ``train``, ``infer``, ``evaluate`` on B rows, and mostly
``train_few``, the same as ``train`` on fewer), ``infer.tflite`` (inference only, parameters stored as one constant),
``params.npy`` (float32 [d]), ``keras.json`` (the Keras model, for tools that have TensorFlow; a device does not read
it), ``frozen.npy`` (the weights of its frozen layers, which the graphs hold as constants) and ``signature`` (Ed25519 of
the publisher over the bytes of ``manifest.json``). The manifest carries the SHA-256 of every other member, so the one
signature covers all of them.

Order of checks in `open_bundle`: size caps from the zip directory, then the signature, then the manifest, then the
version, then the digests; nothing is parsed before what vouches for it has been checked. No I/O: bytes in, bytes out.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Any

import msgspec
import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.model_manifest import BundleManifest, decode_manifest

MAX_MEMBER_BYTES = 64 * 1024 * 1024
"""Largest uncompressed member that is read; a zip that declares more is refused unread (zip bombs)."""

GRAPH, INFER, PARAMS, KERAS, FROZEN = "graph.tflite", "infer.tflite", "params.npy", "keras.json", "frozen.npy"
_MANIFEST, _SIGNATURE = "manifest.json", "signature"
_HASHED = (GRAPH, INFER, PARAMS, KERAS, FROZEN)
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SIGNING_CONTEXT = b"covey bundle v2\0"


class ModelBundle(msgspec.Struct, frozen=True):
    """A verified bundle.

    Args:
        manifest: what it says about itself.
        graph: the trainable TFLite flatbuffer.
        infer_template: the inference-only flatbuffer.
        params: the publisher's parameters, float32 [d].
        keras_json: the Keras model's configuration.
        frozen: the weights of frozen layers, float32, layer by layer as Keras has them.
    """

    manifest: BundleManifest
    graph: bytes
    infer_template: bytes
    params: NDArray[np.float32]
    keras_json: bytes
    frozen: NDArray[np.float32]

    @property
    def graph_digest(self) -> bytes:
        """SHA-256 of ``graph.tflite``; a round manifest names the graph it trains by it."""
        return hashlib.sha256(self.graph).digest()

    @property
    def shared_params(self) -> NDArray[np.float32]:
        """The publisher's parameters without the personal layers, float32 [num_shared_parameters]."""
        return self.params[: self.manifest.num_shared_parameters]

    def with_personal(self, shared: NDArray[np.float32]) -> NDArray[np.float32]:
        """All parameters, float32 [d]: `shared` [num_shared_parameters], then the publisher's personal layers.

        Raises:
            LocalMisuseError: `shared` is not a finite float32 vector of that length.
        """
        count = self.manifest.num_shared_parameters
        return np.concatenate([_checked_params(shared, count), self.params[count:]])

    def inference_model(self, params: NDArray[np.float32]) -> bytes:
        """An inference-only ``.tflite`` (float32) that holds `params` [d] in place of the template's constant."""
        vector = _checked_params(params, self.manifest.num_parameters).tobytes()
        start = self.manifest.infer_params_offset
        return self.infer_template[:start] + vector + self.infer_template[start + len(vector) :]


def pack_bundle(
    manifest: BundleManifest,
    *,
    graph: bytes,
    infer_template: bytes,
    params: NDArray[np.float32],
    keras_json: bytes,
    frozen: NDArray[np.float32],
    publisher_key: Ed25519PrivateKey,
) -> bytes:
    """Sign and zip a bundle; runs at the publisher.

    Args:
        manifest: ``members`` is filled in here.
        graph: the trainable TFLite flatbuffer.
        infer_template: the inference-only flatbuffer whose constant starts at ``infer_params_offset``.
        params: float32 [d].
        keras_json: the Keras model's configuration.
        frozen: the weights of its frozen layers, float32.
        publisher_key: signs the manifest.

    Returns:
        The bytes of the ``.covey`` file; the same arguments give the same bytes.

    Raises:
        LocalMisuseError: `params` is not a finite float32 vector of the manifest's length, `frozen` is not finite, or
            the manifest contradicts itself.
    """
    members = {
        GRAPH: graph,
        INFER: infer_template,
        PARAMS: _saved(params, manifest.num_parameters),
        KERAS: keras_json,
        FROZEN: _saved(frozen, len(frozen)),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, members=digests)), indent=1)
    _check_opens(text)
    signature = publisher_key.sign(_SIGNING_CONTEXT + text)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ((_MANIFEST, text), (_SIGNATURE, signature), *members.items()):
            # A fixed time keeps the bytes reproducible.
            info = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return out.getvalue()


def open_bundle(data: bytes, *, publisher: Ed25519PublicKey, minimum_version: int = 0) -> ModelBundle:
    """Verify a bundle and return what is in it; runs at devices, aggregators and tools.

    Args:
        data: bytes of the ``.covey`` file, untrusted.
        publisher: the pinned publisher key.
        minimum_version: refuse anything lower (anti-rollback).

    Raises:
        BundleError: with what was expected, what came and what to do.
    """
    members = _read_members(data)
    text = members[_MANIFEST]
    try:
        publisher.verify(members[_SIGNATURE], _SIGNING_CONTEXT + text)
    except InvalidSignature:
        raise BundleError(
            "The bundle is not signed by the pinned publisher: get it again, or pin the publisher who made it."
        ) from None
    manifest = decode_manifest(text)
    if manifest.version < minimum_version:
        raise BundleError(
            f"The bundle is version {manifest.version} but version {minimum_version} is installed: "
            "an older model is never accepted in place of a newer one."
        )
    params_end = manifest.infer_params_offset + 4 * manifest.num_parameters
    if manifest.infer_params_offset < 0 or params_end > len(members[INFER]):
        raise BundleError(
            f"The bundle's infer_params_offset {manifest.infer_params_offset} lies outside its {INFER} of "
            f"{len(members[INFER])} bytes."
        )
    for name in _HASHED:
        if hashlib.sha256(members[name]).hexdigest() != manifest.members.get(name):
            raise BundleError(
                f"The bundle's {name} does not match its signed digest: the file is damaged, get it again."
            )
    return ModelBundle(
        manifest=manifest,
        graph=members[GRAPH],
        infer_template=members[INFER],
        params=_load_vector(PARAMS, members[PARAMS], manifest.num_parameters),
        keras_json=members[KERAS],
        frozen=_load_vector(FROZEN, members[FROZEN], None),
    )


def _read_members(data: bytes) -> dict[str, bytes]:
    """The members' bytes, within the size caps, each exactly once."""
    expected = {_MANIFEST, _SIGNATURE, *_HASHED}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            if sorted(names) != sorted(expected):
                raise BundleError(f"The bundle should hold exactly {sorted(expected)}; it holds {sorted(names)[:8]}.")
            members = {}
            for entry in entries:
                # Security: LZMA lets the file choose how much memory its decoder takes.
                if entry.compress_type not in _COMPRESSIONS:
                    raise BundleError(f"The bundle's {entry.filename} is not stored or deflated: get it again.")
                if entry.file_size > MAX_MEMBER_BYTES:
                    raise BundleError(
                        f"The bundle's {entry.filename} declares {entry.file_size} bytes; "
                        f"at most {MAX_MEMBER_BYTES} are read."
                    )
                # Security: read() without a length inflates up to 2 GiB at once, whatever size was declared.
                with archive.open(entry) as stream:
                    members[entry.filename] = stream.read(entry.file_size + 1)
            return members
    except BundleError:
        raise
    # zipfile raises a wide family on hostile input (BadZipFile, zlib.error, struct.error, EOFError, ...).
    except Exception as error:
        raise BundleError(f"The bundle is not a readable zip ({error}): the file is damaged, get it again.") from error


def _check_opens(text: bytes) -> None:
    """Refuse to sign what nobody could open."""
    try:
        decode_manifest(text)
    except BundleError as error:
        raise LocalMisuseError(f"No device could open this bundle: {error}") from error


def _saved(vector: NDArray[np.float32], count: int) -> bytes:
    """A vector of `count` as ``.npy`` bytes."""
    stream = io.BytesIO()
    np.save(stream, _checked_params(vector, count))
    return stream.getvalue()


def _load_vector(member: str, raw: bytes, count: int | None) -> NDArray[np.float32]:
    """A vector of `count`, or of any length, from its ``.npy`` bytes; pickles are never loaded."""
    stream = io.BytesIO(raw)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):  # type: ignore[no-untyped-call]
            raise ValueError("expected .npy version 1.0")
        shape, _fortran, dtype = np.lib.format.read_array_header_1_0(stream)  # type: ignore[no-untyped-call]
        data = raw[stream.tell() :]
        wanted = len(data) // 4 if count is None else count
        if (shape, dtype.str) != ((wanted,), "<f4"):
            raise ValueError(f"expected <f4 [{wanted}], got {dtype.str} {list(shape)}")
        return _checked_params(np.frombuffer(data, "<f4").astype(np.float32), wanted)
    except ValueError as error:
        raise BundleError(f"The bundle's {member} cannot be used ({error}): get the bundle again.") from error


def _checked_params(params: Any, count: int) -> NDArray[np.float32]:
    """`params` as a contiguous float32 [count] vector of finite numbers."""
    array = np.ascontiguousarray(params)
    if array.dtype != np.float32 or array.shape != (count,):
        raise LocalMisuseError(f"parameters: expected float32 [{count}], got {array.dtype} {list(array.shape)}")
    if not np.isfinite(array).all():
        raise LocalMisuseError("parameters: expected finite numbers, got NaN or infinity")
    return array
