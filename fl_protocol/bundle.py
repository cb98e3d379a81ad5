"""Model bundles (``*.covey``): a signed zip that holds everything a device needs to train one model.

Members: ``manifest.json``, ``graph.tflite`` (signatures ``train``, ``infer``, ``evaluate`` on B rows, and mostly
``train_few``, the same as ``train`` on fewer), ``infer.tflite`` (inference only, parameters stored as one constant),
``params.npy`` (float32 [d]), ``keras.json`` (the Keras model, for tools that have TensorFlow; a device does not read
it), ``frozen.npy`` (the weights of its frozen layers, which the graphs hold as constants) and ``signature`` (0 to 16
Ed25519 signatures of publishers over the bytes of ``manifest.json``, `fl_protocol.publishers`). The manifest carries
the SHA-256 of every other member, so each signature covers all of them.

Order of checks in `open_bundle`: size caps from the zip directory, then the signatures, then the manifest, then the
version, then the digests; nothing is parsed before what vouches for it has been checked. Publishers, who are about to
vouch for a bundle or look who has, use `examine_bundle`. No I/O: bytes in, bytes out.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fl_protocol.errors import BundleError, LocalMisuseError
from fl_protocol.model_manifest import BundleManifest, decode_manifest
from fl_protocol.publishers import (
    MOST_PUBLISHERS,
    Publishers,
    check_signed,
    signatures_by,
    signatures_in,
    signers_among,
)
from fl_protocol.vector_files import checked_vector, load_vector, save_vector

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
    def shared_digest(self) -> bytes:
        """SHA-256 of `shared_params`, little-endian: what an aggregator's versions and approvals name a model by."""
        return hashlib.sha256(self.shared_params.astype("<f4").tobytes()).digest()

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
        return np.concatenate([checked_vector(shared, count), self.params[count:]])

    def inference_model(self, params: NDArray[np.float32]) -> bytes:
        """An inference-only ``.tflite`` (float32) that holds `params` [d] in place of the template's constant."""
        vector = checked_vector(params, self.manifest.num_parameters).tobytes()
        start = self.manifest.infer_params_offset
        return self.infer_template[:start] + vector + self.infer_template[start + len(vector) :]


class ExaminedBundle(NamedTuple):
    """A bundle that is whole, whoever has signed it or not.

    Args:
        bundle: what is in it.
        signed: the bytes that publishers sign, the same however many have.
        signatures: of whom is not said; 64 bytes each.
        manifest_digest: SHA-256 of ``manifest.json``, which stands for everything but the signatures.
    """

    bundle: ModelBundle
    signed: bytes
    signatures: list[bytes]
    manifest_digest: bytes

    def signers(self, keys: Iterable[Ed25519PublicKey]) -> tuple[Ed25519PublicKey, ...]:
        """Those of `keys` that have signed it."""
        return signers_among(keys, self.signed, self.signatures)

    def kept(self, only: Collection[Ed25519PublicKey]) -> list[bytes]:
        """Its signatures; where `only` has keys, those by them."""
        return signatures_by(only, self.signed, self.signatures) if only else self.signatures


def pack_bundle(
    manifest: BundleManifest,
    *,
    graph: bytes,
    infer_template: bytes,
    params: NDArray[np.float32],
    keras_json: bytes,
    frozen: NDArray[np.float32],
    publisher_key: Ed25519PrivateKey | None,
) -> bytes:
    """Zip a bundle, and sign it if there is a key; runs at the publisher, or at an aggregator without a key.

    Args:
        manifest: ``members`` is filled in here.
        graph: the trainable TFLite flatbuffer.
        infer_template: the inference-only flatbuffer whose constant starts at ``infer_params_offset``.
        params: float32 [d].
        keras_json: the Keras model's configuration.
        frozen: the weights of its frozen layers, float32.
        publisher_key: signs the manifest; None for a bundle that publishers sign later (`add_signature`).

    Returns:
        The bytes of the ``.covey`` file; the same arguments give the same bytes.

    Raises:
        LocalMisuseError: `params` is not a finite float32 vector of the manifest's length, `frozen` is not finite, or
            the manifest contradicts itself.
    """
    members = {
        GRAPH: graph,
        INFER: infer_template,
        PARAMS: save_vector(params, manifest.num_parameters),
        KERAS: keras_json,
        FROZEN: save_vector(frozen, len(frozen)),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    text = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, members=digests)), indent=1)
    _check_opens(text)
    signature = b"" if publisher_key is None else publisher_key.sign(_SIGNING_CONTEXT + text)
    return _zipped({_MANIFEST: text, _SIGNATURE: signature, **members})


def add_signature(data: bytes, key: Ed25519PrivateKey, *, only: Collection[Ed25519PublicKey] = ()) -> bytes:
    """One more signature on a bundle; runs at a publisher.

    Args:
        data: bytes of the ``.covey`` file, untrusted; it may have been signed by others.
        key: the publisher's.
        only: whose signatures stay; empty for everybody's.

    Returns:
        The bytes of the file with the signature behind those that were there, everything else as it was; the same
        arguments give the same bytes.

    Raises:
        BundleError: it is not whole, so that no device could open it.
        LocalMisuseError: this key has signed it already, or as many as it can hold have.
    """
    examined = examine_bundle(data)
    if examined.signers([key.public_key()]):
        raise LocalMisuseError(
            "This key has signed the bundle already; a second signature of the same publisher counts for nothing: have "
            "another publisher sign it."
        )
    kept = examined.kept(only)
    if len(kept) >= MOST_PUBLISHERS:
        raise LocalMisuseError(
            f"The bundle has {len(kept)} signatures, as many as it can hold: leave out those of nobody you know with "
            "--publisher HEX for each publisher."
        )
    signatures = b"".join([*kept, key.sign(examined.signed)])
    return _zipped({**_read_members(data), _SIGNATURE: signatures})


def merge_signatures(data: bytes, others: Sequence[bytes], *, only: Collection[Ed25519PublicKey] = ()) -> bytes:
    """The signatures of copies of one bundle that publishers signed apart, on one of them.

    Args:
        data: a bundle file.
        others: copies of it; they may have other signatures, and nothing else that is other.
        only: whose signatures stay; empty for everybody's.

    Returns:
        The bytes of the first with the others' signatures behind its own, each once.

    Raises:
        BundleError: one is damaged, or not a copy of the first.
        LocalMisuseError: together they have more signatures than a bundle can hold.
    """
    first = examine_bundle(data)
    signatures = dict.fromkeys(first.kept(only))
    for number, other in enumerate(others, 2):
        examined = examine_bundle(other)
        if examined.manifest_digest != first.manifest_digest:
            raise BundleError(
                f"Bundle {number} is not a copy of the first: its publishers signed {examined.manifest_digest.hex()}, "
                f"those of the first {first.manifest_digest.hex()}."
            )
        signatures |= dict.fromkeys(examined.kept(only))
    if len(signatures) > MOST_PUBLISHERS:
        raise LocalMisuseError(
            f"expected at most {MOST_PUBLISHERS} signatures together, got {len(signatures)}: leave out those of nobody "
            "you know with --publisher HEX for each publisher"
        )
    return _zipped({**_read_members(data), _SIGNATURE: b"".join(signatures)})


def open_bundle(data: bytes, *, publisher: Publishers | Ed25519PublicKey, minimum_version: int = 0) -> ModelBundle:
    """Verify a bundle and return what is in it; runs at devices, aggregators and tools.

    Args:
        data: bytes of the ``.covey`` file, untrusted.
        publisher: who is pinned: several publishers of whom so many must have signed, or the only one.
        minimum_version: refuse anything lower (anti-rollback).

    Raises:
        BundleError: with what was expected, what came and what to do.
    """
    publishers = publisher if isinstance(publisher, Publishers) else Publishers((publisher,), threshold=1)
    members = _read_members(data)
    check_signed(publishers, _SIGNING_CONTEXT + members[_MANIFEST], signatures_in(members[_SIGNATURE]))
    return _checked_bundle(members, minimum_version)


def examine_bundle(data: bytes) -> ExaminedBundle:
    """A bundle that nobody vouches for yet, for who is about to sign it or to see who has; a device never uses it.

    Args:
        data: bytes of the ``.covey`` file, untrusted.

    Raises:
        BundleError: it is damaged or contradicts itself, so that no device could open it whoever signed it.
    """
    members = _read_members(data)
    return ExaminedBundle(
        _checked_bundle(members, 0),
        signed=_SIGNING_CONTEXT + members[_MANIFEST],
        signatures=signatures_in(members[_SIGNATURE]),
        manifest_digest=hashlib.sha256(members[_MANIFEST]).digest(),
    )


def check_derived(bundle: ModelBundle, origin: ModelBundle) -> None:
    """Whether a bundle is what training from another can give; runs at a publisher, before it signs.

    Args:
        bundle: that an aggregator exported.
        origin: that the training started from.

    Raises:
        BundleError: more differs than shared parameters, version and description, or the version is lower.
    """
    # Security: an aggregator that is not to be trusted could have put in a graph that clips nothing.
    if bundle.manifest.version < origin.manifest.version:
        raise BundleError(
            f"The bundle is version {bundle.manifest.version} and its origin version {origin.manifest.version}: "
            "expected at least that."
        )
    shared = origin.manifest.num_shared_parameters
    differs = {
        "manifest": _constant_part(bundle.manifest) != _constant_part(origin.manifest),
        GRAPH: bundle.graph != origin.graph,
        INFER: bundle.infer_template != origin.infer_template,
        KERAS: bundle.keras_json != origin.keras_json,
        FROZEN: bundle.frozen.tobytes() != origin.frozen.tobytes(),
        "personal parameters": bundle.params[shared:].tobytes() != origin.params[shared:].tobytes(),
    }
    names = [name for name, is_other in differs.items() if is_other]
    if names:
        raise BundleError(
            f"The bundle has another {', '.join(names)} than its origin, and training changes shared parameters alone: "
            "do not sign it; ask who exported it, or name the bundle of the task as the origin."
        )


def _constant_part(manifest: BundleManifest) -> BundleManifest:
    """A manifest without what differs from version to version."""
    return msgspec.structs.replace(manifest, version=0, description="", members={})


def _checked_bundle(members: dict[str, bytes], minimum_version: int) -> ModelBundle:
    """What the members hold, held against the manifest."""
    manifest = decode_manifest(members[_MANIFEST])
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
        params=load_vector(PARAMS, members[PARAMS], manifest.num_parameters),
        keras_json=members[KERAS],
        frozen=load_vector(FROZEN, members[FROZEN], None),
    )


def _zipped(members: dict[str, bytes]) -> bytes:
    """The file that holds the members, always in the same order."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in (_MANIFEST, _SIGNATURE, *_HASHED):
            # A fixed time keeps the bytes reproducible.
            info = zipfile.ZipInfo(name, date_time=(2026, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, members[name])
    return out.getvalue()


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
