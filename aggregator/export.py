"""The trained model as files: a signed bundle to train on from, and an inference-only ``.tflite``."""

from __future__ import annotations

from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from aggregator.store import StoredModel
from fl_protocol.bundle import ModelBundle, pack_bundle


class ExportedModel(NamedTuple):
    """Bytes of the two files."""

    bundle: bytes
    inference: bytes


def export_model(origin: ModelBundle, model: StoredModel, *, signing_key: Ed25519PrivateKey) -> ExportedModel:
    """Put trained parameters into the bundle that training started from; runs at the aggregator.

    Args:
        origin: the bundle of the task.
        model: the version to export.
        signing_key: the aggregator's; whoever uses the bundle pins its public half as the publisher.
    """
    params = origin.with_personal(model.model.params)
    manifest = replace(
        origin.manifest,
        version=origin.manifest.version + model.version,
        description=f"{origin.manifest.description} Trained federatedly for {model.version} rounds.",
    )
    bundle = pack_bundle(
        manifest,
        graph=origin.graph,
        infer_template=origin.infer_template,
        params=params,
        keras_json=origin.keras_json,
        frozen=origin.frozen,
        publisher_key=signing_key,
    )
    return ExportedModel(bundle, origin.inference_model(params))
