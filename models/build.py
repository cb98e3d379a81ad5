"""From a specification to a signed bundle."""

from __future__ import annotations

import itertools
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol.bundle import pack_bundle
from fl_protocol.model_manifest import BUNDLE_FORMAT, BundleManifest
from models.check import installed_runtimes, worst_errors
from models.convert import convert_infer, convert_network, training_rows
from models.cost import SignatureCost, signature_cost
from models.errors import ConversionError
from models.hostile import LARGEST_CONTRIBUTION, hostile_probes, worst_contribution
from models.keras_nodes import frozen_weights
from models.network import Network
from models.specs import ModelSpec
from models.template import with_constant_params

DEFAULT_BATCH_SIZE = 32
LARGEST_ERROR = 1e-4
"""Of a graph's outputs, relative to their largest value; float32 leaves a few 1e-6."""


def build_bundle(
    spec: ModelSpec,
    *,
    publisher_key: Ed25519PrivateKey,
    batch_size: int = DEFAULT_BATCH_SIZE,
    version: int = 1,
) -> bytes:
    """Convert, package and sign a model; runs at the publisher.

    Args:
        spec: the model.
        publisher_key: signs the bundle; devices pin its public half.
        batch_size: B, the static batch dimension of every signature but ``train_few``, at least 1.
        version: devices refuse one lower than they have.

    Returns:
        The bytes of a ``.covey`` file.

    Raises:
        ModelSpecError: the layers do not fit together.
        ConversionError: a device could not run the graph, or it does not clip what automatic differentiation gives,
            or not everything at the ends of float32.
    """
    network = Network(spec)
    params = network.initial_parameters
    template = with_constant_params(convert_infer(network, batch_size=batch_size), params)
    graph = convert_network(network, batch_size=batch_size)
    _hold_to_autodiff(network, graph, batch_size=batch_size)
    _hold_to_clip(network, graph, batch_size=batch_size)
    costs = [signature_cost(graph, signature) for signature in training_rows(batch_size)]
    cost = replace(costs[0], arena_bytes=sum(each.arena_bytes for each in costs))
    manifest = _manifest(
        network, cost, batch_size=batch_size, version=version, infer_params_offset=template.params_offset
    )
    return pack_bundle(
        manifest,
        graph=graph,
        infer_template=template.graph,
        params=params,
        keras_json=spec.model.to_json().encode(),
        frozen=frozen_weights(spec.model),
        publisher_key=publisher_key,
    )


def _hold_to_autodiff(network: Network, graph: bytes, *, batch_size: int) -> None:
    """Refuse a graph whose clipped sums are not those of automatic differentiation.

    A registered layer with a wrong gradient would clip wrongly, and every claim of privacy for the model be false.
    """
    for runtime, error in worst_errors(network, graph, batch_size=batch_size).items():
        if not error < LARGEST_ERROR:
            raise ConversionError(
                f"{network.spec.name}: on {runtime} its clipped gradients differ from automatic differentiation by "
                f"{error:.1e}, more than {LARGEST_ERROR:g}; is the gradient of a layer that you registered right?"
            )


def _hold_to_clip(network: Network, graph: bytes, *, batch_size: int) -> None:
    """Refuse a graph in which parameters at the ends of float32 let one record contribute more than the clip."""
    for runtime, (signature, rows) in itertools.product(installed_runtimes(), training_rows(batch_size).items()):
        probes = hostile_probes(network, batch_size=rows, gaps=(36.0, 44.0, 50.0), draws=4)
        ratio = worst_contribution(graph, runtime, probes, clips=(0.05,), signature=signature)
        if not ratio <= LARGEST_CONTRIBUTION:
            raise ConversionError(
                f"{network.spec.name}: on {runtime} one record can contribute {ratio:.3g} times the clip; does a layer "
                "that you registered measure its gradients other than through row_product and PerExample?"
            )


def _manifest(
    network: Network, cost: SignatureCost, *, batch_size: int, version: int, infer_params_offset: int
) -> BundleManifest:
    """What the bundle says about itself; the digests of its members are filled in when it is packed."""
    spec = network.spec
    return BundleManifest(
        format=BUNDLE_FORMAT,
        name=spec.name,
        version=version,
        description=spec.description,
        data=spec.data,
        batch_size=batch_size,
        num_parameters=network.num_parameters,
        num_shared_parameters=network.num_shared_parameters,
        parameters=network.parameters,
        layers=network.layers,
        input=spec.input,
        label=spec.label,
        loss=spec.loss,
        preprocessing=network.preprocessing,
        defaults=spec.defaults,
        norm_clips=network.norm_clips,
        dropout=network.dropout,
        train_flops=cost.flops,
        train_arena_bytes=cost.arena_bytes,
        infer_params_offset=infer_params_offset,
    )
