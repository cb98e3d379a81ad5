"""Norms and clipped sums agree with TensorFlow Privacy's fast gradient clipping, for the layers that it knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow
tf = pytest.importorskip("tensorflow")
clip_grads = pytest.importorskip("tensorflow_privacy.privacy.fast_gradient_clipping.clip_grads")

from layer_models import layers, spec_of, stack  # noqa: E402
from tensorflow_privacy.privacy.fast_gradient_clipping import layer_registry  # noqa: E402

from models import check  # noqa: E402
from models.convert import convert_network  # noqa: E402
from models.network import Network  # noqa: E402

TOLERANCE = 1e-4
BATCH = 6

MODELS: dict[str, Any] = {
    "dense": lambda: stack((7,), layers.Dense(9, activation="tanh"), layers.Dense(5, use_bias=False), layers.Dense(3)),
    "dense on every time step": lambda: stack(
        (4, 6), layers.Dense(5, activation="relu"), layers.Flatten(), layers.Dense(3)
    ),
    "embedding": lambda: stack((5,), layers.Embedding(40, 4), layers.GlobalAveragePooling1D(), layers.Dense(3)),
    "embedding of repeated ids": lambda: stack((9,), layers.Embedding(4, 6), layers.Flatten(), layers.Dense(3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_norms_and_clipped_sums_agree_with_tensorflow_privacy(name: str, runtime: str) -> None:
    model = MODELS[name]()
    network = Network(spec_of(model))
    batch = check.random_batch(network, batch_size=BATCH, seed=3) | {"params": network.initial_parameters}
    model.compile(loss=tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = tf.constant(batch["x"]), tf.constant(batch["y"])
    registry = layer_registry.make_default_layer_registry()
    norms = clip_grads.compute_gradient_norms(model, registry, x, y).numpy()
    clip = float(np.median(norms))
    clipped, _, _ = clip_grads.compute_clipped_gradients_and_outputs(model, clip, registry, x, y)
    # Its loss is the mean over the batch.
    grad = BATCH * np.concatenate([tf.convert_to_tensor(part).numpy().ravel() for part in clipped])

    graph = convert_network(network, batch_size=BATCH)
    train = check.interpreter(runtime, graph).get_signature_runner("train")
    got = train(**batch, mask=np.ones(BATCH, np.float32), clip=np.float32(clip))
    assert check.relative_error(got["norms"], norms) < TOLERANCE
    assert check.relative_error(got["grad"], grad.astype(np.float32)) < TOLERANCE
