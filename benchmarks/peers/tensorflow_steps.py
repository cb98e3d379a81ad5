"""The step in TensorFlow, and with TensorFlow Privacy; a script for the ``tensorflow`` environment, see ``serve``.

Every step is one call of a ``tf.function`` on a batch that is already a tensor; ``_xla`` compiles it. ``dp_model``:
``DPSequential.train_step`` as ``fit`` would call it, per-example gradients by ``vectorized_map``. ``dp_model_fast``:
the same class with the library's layer registry, its fast gradient clipping. ``vectorized``:
``VectorizedDPKerasSGDOptimizer.minimize``, per-example gradients by the tape's Jacobian.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import serve
import tensorflow as tf
from tensorflow_privacy import DPSequential, VectorizedDPKerasSGDOptimizer
from tensorflow_privacy.privacy.fast_gradient_clipping import layer_registry

CLASSES, CHANNELS, WINDOW = 6, 6, 128
PACKAGES = ("tensorflow", "tensorflow-privacy", "keras", "numpy")


def main() -> None:
    """Serve."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    modes = {"dp_model_fast": serve.Mode(fast_trainer, private=True)}
    for suffix, xla in (("", False), ("_xla", True)):
        modes |= {
            f"plain{suffix}": serve.Mode(functools.partial(plain_trainer, xla=xla), private=False),
            f"dp_model{suffix}": serve.Mode(functools.partial(dp_model_trainer, xla=xla), private=True),
            f"vectorized{suffix}": serve.Mode(functools.partial(vectorized_trainer, xla=xla), private=True),
        }
    serve.main(
        serve.Library(
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
            parameters=tf.keras.Sequential(layers()).count_params(),
            modes=modes,
            naive_gradients=naive_gradients,
        )
    )


def layers() -> list[tf.keras.layers.Layer]:
    """The CNN, always with the same initial parameters; input [B, 128, 6]."""
    tf.keras.utils.set_random_seed(0)
    return [
        tf.keras.layers.Input((WINDOW, CHANNELS)),
        tf.keras.layers.Conv1D(32, 5, activation="relu"),
        tf.keras.layers.MaxPooling1D(2),
        tf.keras.layers.Conv1D(32, 5, activation="relu"),
        tf.keras.layers.GlobalAveragePooling1D(),
        tf.keras.layers.Dense(64, activation="relu"),
        tf.keras.layers.Dense(CLASSES),
    ]


def batch(size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Windows and labels; a smaller batch is the beginning of a larger one."""
    generator = np.random.default_rng(1)
    x = generator.standard_normal((serve.TIMED.batch_size, WINDOW, CHANNELS), dtype=np.float32)
    y = generator.integers(CLASSES, size=serve.TIMED.batch_size, dtype=np.int32)
    return tf.constant(x[:size]), tf.constant(y[:size])


def plain_trainer(setting: serve.Setting, *, xla: bool) -> serve.Trainer:
    """Mean loss, gradient tape, SGD."""
    model = tf.keras.Sequential(layers())
    optimizer = tf.keras.optimizers.SGD(setting.learning_rate, jit_compile=False)
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function(jit_compile=xla)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )
        return loss

    optimizer.build(model.trainable_variables)
    return trainer(model, step, setting)


def dp_model_trainer(
    setting: serve.Setting, *, xla: bool, registry: layer_registry.LayerRegistry | None = None
) -> serve.Trainer:
    """TensorFlow Privacy's Keras model."""
    model = DPSequential(
        l2_norm_clip=setting.clip,
        noise_multiplier=setting.noise_multiplier,
        use_xla=xla,
        layer_registry=registry,
        layers=layers(),
    )
    if registry is not None and not model._enable_fast_peg_computation:
        foreign = {type(part).__name__ for part in model.layers if part.weights and not registry.is_elem(part)}
        raise serve.UnsupportedError(f"fast gradient clipping has no rule for {', '.join(sorted(foreign))}")
    optimizer = tf.keras.optimizers.SGD(setting.learning_rate, jit_compile=False)
    model.compile(optimizer, tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return model.train_step((x, y))["loss"]

    return trainer(model, step, setting)


def fast_trainer(setting: serve.Setting) -> serve.Trainer:
    """The same with fast gradient clipping, which the model class would silently leave out where it cannot be had."""
    return dp_model_trainer(setting, xla=False, registry=layer_registry.make_default_layer_registry())


def vectorized_trainer(setting: serve.Setting, *, xla: bool) -> serve.Trainer:
    """TensorFlow Privacy's optimizer, which takes the loss of every example."""
    model = tf.keras.Sequential(layers())
    optimizer = VectorizedDPKerasSGDOptimizer(
        l2_norm_clip=setting.clip, noise_multiplier=setting.noise_multiplier, learning_rate=setting.learning_rate
    )
    losses_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")

    @tf.function(jit_compile=xla)
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape(persistent=True) as tape:
            losses = losses_of(y, model(x, training=True))
        optimizer.minimize(losses, model.trainable_variables, tape=tape)
        return losses

    return trainer(model, step, setting)


def trainer(
    model: tf.keras.Model, step: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], setting: serve.Setting
) -> serve.Trainer:
    """The step on its batch; reading the loss makes sure that it is over."""
    x, y = batch(setting.batch_size)
    return serve.Trainer(lambda: step(x, y).numpy(), lambda: flat(model.trainable_variables))


def naive_gradients(examples: int) -> list[list[float]]:
    """One tape for every example."""
    model = tf.keras.Sequential(layers())
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x, y = batch(examples)
    gradients = []
    for number in range(examples):
        with tf.GradientTape() as tape:
            loss = loss_of(y[number : number + 1], model(x[number : number + 1], training=True))
        gradients.append(flat(tape.gradient(loss, model.trainable_variables)))
    return gradients


def flat(tensors: Sequence[tf.Tensor]) -> list[float]:
    """One after the other."""
    values: list[float] = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0).numpy().tolist()
    return values


if __name__ == "__main__":
    main()
