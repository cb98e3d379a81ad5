"""The trained model as files: a bundle to train on from, and an inference-only ``.tflite``.

The aggregator's own key never signs a bundle: whoever has the aggregator's machine could have devices run any model.
"""

from __future__ import annotations

from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec.structs import replace

from aggregator.store.models import Float32, ModelRecord
from fl_protocol.bundle import ModelBundle, pack_bundle


class ExportedModel(NamedTuple):
    """Bytes of the two files."""

    bundle: bytes
    inference: bytes


def export_model(
    origin: ModelBundle, record: ModelRecord, shared_params: Float32, *, publisher_key: Ed25519PrivateKey | None
) -> ExportedModel:
    """Put trained parameters into the bundle that training started from; runs at the aggregator.

    Args:
        origin: the bundle of the task.
        record: the version to export.
        shared_params: its parameters, float32 [shared parameters]; personal layers stay at the publisher's values.
        publisher_key: of a publisher, signs the bundle; None for one that publishers sign on machines of their own.
    """
    params = origin.with_personal(shared_params)
    manifest = replace(
        origin.manifest,
        version=origin.manifest.version + record.version,
        description=f"{origin.manifest.description} Version {record.version} of a federated training.",
    )
    bundle = pack_bundle(
        manifest,
        graph=origin.graph,
        infer_template=origin.infer_template,
        params=params,
        keras_json=origin.keras_json,
        frozen=origin.frozen,
        publisher_key=publisher_key,
    )
    return ExportedModel(bundle, origin.inference_model(params))
