"""The same training by TensorFlow Privacy, on the bundle's Keras model: `DPKerasSGDOptimizer`, or `DPModel`.

Same start, clip, noise multiplier, learning rates, momentum, number of steps and Poisson batches; batch by batch the
same ones where the source is seeded. Every example is a microbatch. TensorFlow Privacy divides a batch's noisy sum by
the batch's own size, which under Poisson sampling is private and varies; the learning rate is scaled by that size over
the expected one, so that the divisor is the public one, and a batch of nobody is one example of weight 0.
Epsilon is dp-accounting's, for neighbours that differ by one record added or removed.

`DPKerasSGDOptimizer` takes the jacobian of a batch's losses, whose cost grows with the square of the batch; `DPModel`
differentiates each example by itself. The numbers are the same.

Not the same: TensorFlow draws noise in floating point from a generator that is not cryptographic, clips without groups,
draws its own dropout, and does not know an augmentation that is part of a bundle's graph.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.rdp import RdpAccountant
from tensorflow_privacy import DPKerasSGDOptimizer, DPModel

from device_client.ports import Float32
from device_client.training import Records, poisson_sample
from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import LocalMisuseError
from models.central.plan import CentralPlan
from models.central.training import Source, State, SystemSource, averaged
from models.keras_bundle import keras_model
from models.keras_losses import ending
from models.losses import FINAL_ACTIVATION

Method = Literal["optimizer", "model"]
"""`DPKerasSGDOptimizer` or `DPModel`."""


@dataclass(frozen=True)
class ReferenceResult:
    """What TensorFlow Privacy made of it.

    Args:
        params: float32 [d], in the bundle's order.
        epsilon: at the plan's delta, by dp-accounting's RDP accountant; infinite without noise.
        seconds: of all steps but the first.
        first_seconds: of the first step, in which TensorFlow traces and compiles.
        steps: taken.
        remarks: in what the training differs from the bundle's own.
    """

    params: Float32
    epsilon: float
    seconds: float
    first_seconds: float
    steps: int
    remarks: tuple[str, ...]

    def examples_per_second(self, plan: CentralPlan) -> float:
        """After the first step, by the expected size of a batch."""
        return (self.steps - 1) * plan.expected_batch_size / self.seconds if self.seconds else 0.0


def train_reference(
    bundle: ModelBundle,
    records: Records,
    plan: CentralPlan,
    *,
    method: Method = "optimizer",
    steps: int | None = None,
    source: Source | None = None,
    seed: int | None = None,
    on_step: Callable[[int], None] | None = None,
) -> ReferenceResult:
    """Train with TensorFlow Privacy.

    Args:
        bundle: verified; its parameters are the start.
        records: the training data.
        plan: of `plan_training`.
        method: by which of TensorFlow Privacy's classes.
        steps: how many, if not the plan's.
        source: of batches; the operating system's by default.
        seed: of TensorFlow's noise.
        on_step: called with the number of each step done.

    Raises:
        LocalMisuseError: every example's gradient of one batch would not fit into memory.
    """
    _check_memory(bundle, plan)
    total = plan.steps if steps is None else steps
    if seed is not None:
        tf.random.set_seed(seed)
    model = keras_model(bundle)
    rate = tf.Variable(plan.learning_rate, trainable=False, dtype=tf.float32)
    step = _compiled_step(bundle, model, plan, rate, method)
    drawn = source or SystemSource()
    state = State.fresh(flat_params(bundle, model))
    times = []
    for number in range(total):
        began = time.perf_counter()
        batch = np.flatnonzero(poisson_sample(len(records), plan.sampling_rate, drawn.stream(number, 0)))
        weight = np.ones(max(1, len(batch)), np.float32)
        if not len(batch):
            batch, weight = np.zeros(1, np.intp), np.zeros(1, np.float32)
        rate.assign(plan.learning_rate_at(number) * len(weight) / plan.expected_batch_size)
        step(tf.constant(records.x[batch]), tf.constant(records.y[batch]), tf.constant(weight))
        times.append(time.perf_counter() - began)
        if plan.averaging.kind != "none" or number == total - 1:
            params = flat_params(bundle, model).astype(np.float64)
            state = averaged(State(number + 1, params, params, state.weighted_sum, state.weight), plan)
        if on_step is not None:
            on_step(number + 1)
    return ReferenceResult(
        params=state.model(),
        epsilon=reference_epsilon(plan, total),
        seconds=math.fsum(times[1:]),
        first_seconds=times[0] if times else 0.0,
        steps=total,
        remarks=_remarks(bundle),
    )


def reference_epsilon(plan: CentralPlan, steps: int) -> float:
    """Epsilon of so many steps by dp-accounting, for Poisson batches and one record added or removed."""
    if not plan.is_private:
        return math.inf
    step = PoissonSampledDpEvent(plan.sampling_rate, GaussianDpEvent(plan.noise_multiplier))
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(accountant.compose(SelfComposedDpEvent(step, steps)).get_epsilon(plan.delta))


def flat_params(bundle: ModelBundle, model: Any) -> Float32:
    """The weights of a model of `keras_model` as the bundle's flat vector, float32 [d]."""
    names = dict.fromkeys(spec.name.rpartition("/")[0] for spec in bundle.manifest.parameters)
    weights = [weight.ravel() for name in names for weight in model.get_layer(name).get_weights()]
    flat: Float32 = np.concatenate(weights).astype(np.float32)
    return flat


def limit_threads(threads: int) -> None:
    """Let TensorFlow compute on as many threads as Covey's graphs do; without effect once it has started."""
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    except RuntimeError:
        return


def _compiled_step(bundle: ModelBundle, model: Any, plan: CentralPlan, rate: tf.Variable, method: Method) -> Any:
    """One step as a TensorFlow function of examples [b, ...], labels [b] or [b, K] and weights [b], for any b."""
    manifest = bundle.manifest
    is_index = manifest.label.kind in ("class", "input")
    labels = tf.TensorSpec([None], tf.int32) if is_index else tf.TensorSpec([None, len(manifest.label.names)])
    signature = [tf.TensorSpec([None, *manifest.input.shape]), labels, tf.TensorSpec([None])]
    make = _optimizer_step if method == "optimizer" else _model_step
    return tf.function(make(bundle, model, plan, rate), input_signature=signature)


def _optimizer_step(bundle: ModelBundle, model: Any, plan: CentralPlan, rate: tf.Variable) -> Any:
    """A step of `DPKerasSGDOptimizer`."""
    loss, target = _keras_loss(bundle, model, tf.keras.losses.Reduction.NONE), _target(bundle, model)
    optimizer = DPKerasSGDOptimizer(
        l2_norm_clip=plan.l2_norm_clip,
        noise_multiplier=plan.noise_multiplier,
        num_microbatches=None,
        learning_rate=lambda: rate,
        momentum=plan.momentum,
    )
    by_index = bundle.manifest.label.kind == "class"

    def step(x: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            output, wanted = model(x, training=True), target(x, y)
            if not by_index:
                # Keras averages the last axis only; the loss of an example is the mean over all its outputs.
                output, wanted = (tf.reshape(each, [tf.shape(x)[0], -1]) for each in (output, wanted))
            losses = weight * loss(wanted, output)
        optimizer.minimize(losses, model.trainable_variables, tape=tape)

    return step


def _model_step(bundle: ModelBundle, model: Any, plan: CentralPlan, rate: tf.Variable) -> Any:
    """A step of `DPModel`, which shares the layers of `model`."""
    private = DPModel(
        inputs=model.inputs,
        outputs=model.outputs,
        l2_norm_clip=plan.l2_norm_clip,
        noise_multiplier=plan.noise_multiplier,
        use_xla=False,
    )
    optimizer = tf.keras.optimizers.legacy.SGD(lambda: rate, plan.momentum)
    private.compile(optimizer, _keras_loss(bundle, model, tf.keras.losses.Reduction.AUTO))
    target = _target(bundle, model)

    def step(x: tf.Tensor, y: tf.Tensor, weight: tf.Tensor) -> None:
        private.train_step((x, target(x, y), weight))

    return step


def _keras_loss(bundle: ModelBundle, model: Any, reduction: str) -> Any:
    """Keras's own loss, for a model that ends in probabilities or in what comes before them."""
    loss = bundle.manifest.loss
    from_logits = ending(model) != FINAL_ACTIVATION.get(loss.name)
    if loss.name == "softmax_cross_entropy":
        return tf.keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits, reduction=reduction)
    if loss.name == "binary_cross_entropy":
        return tf.keras.losses.BinaryCrossentropy(from_logits=from_logits, reduction=reduction)
    if loss.name == "huber":
        return tf.keras.losses.Huber(loss.delta, reduction)
    return tf.keras.losses.MeanSquaredError(reduction)


def _target(bundle: ModelBundle, model: Any) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """What the outputs are compared with: the labels, or the examples as the first trained layer sees them."""
    if bundle.manifest.label.kind != "input":
        return lambda x, y: y
    first = next(layer for layer in model.layers if layer.trainable_variables)
    seen = tf.keras.Model(model.input, first.input)
    return lambda x, y: seen(x, training=True)


def _check_memory(bundle: ModelBundle, plan: CentralPlan) -> None:
    """TensorFlow Privacy holds every example's gradient of a batch at once."""
    needed = 4 * plan.expected_batch_size * bundle.manifest.num_parameters
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * needed > there:
        raise LocalMisuseError(
            f"--reference: TensorFlow Privacy would hold {needed / 1e9:.1f} GB of gradients of a batch at once, of "
            f"{there / 1e9:.1f} GB of memory: give a smaller --batch-size."
        )


def _remarks(bundle: ModelBundle) -> tuple[str, ...]:
    """What of the bundle's training graph TensorFlow Privacy does not do."""
    remarks = []
    if len(bundle.manifest.norm_clips) > 1:
        remarks.append("TensorFlow Privacy clips the whole gradient; the bundle clips groups of layers.")
    if "augment" in bundle.manifest.preprocessing.lower():
        remarks.append("TensorFlow Privacy trains without the augmentation that is part of the bundle's graph.")
    return tuple(remarks)
