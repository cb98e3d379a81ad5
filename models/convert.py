"""From pure functions to one ``.tflite`` with builtin operators only."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from models import steps
from models.errors import ConversionError
from models.flatbuffer import operators
from models.memory_sharing import kept_apart
from models.network import Network

_Signature = tuple[Callable[..., Any], Mapping[str, tf.TensorSpec]]


def convert_network(network: Network, *, batch_size: int) -> bytes:
    """The trainable graph, with the signatures ``train``, ``train_few``, ``infer`` and ``evaluate``.

    Args:
        network: the model.
        batch_size: B, static in every signature but ``train_few``.

    Raises:
        ConversionError: an operator is not builtin, so a device without Flex could not run it.
    """
    tensors = input_tensors(network, batch_size=batch_size)
    step = functools.partial(steps.clipped_step, network)
    trainings = {
        name: (step, input_tensors(network, batch_size=rows)) for name, rows in training_rows(batch_size).items()
    }
    return convert_signatures(
        trainings
        | {
            "infer": (functools.partial(steps.infer, network), _pick(tensors, "params", "x")),
            "evaluate": (functools.partial(steps.evaluate, network), _pick(tensors, "params", "x", "y", "mask")),
        }
    )


def training_rows(batch_size: int) -> dict[str, int]:
    """The signatures that train and how many rows each takes: ``train`` B, and ``train_few`` a quarter, unless none.

    A Poisson batch is seldom a multiple of B, and a row of padding costs as much as one with a record.
    """
    few = batch_size // 4
    return {"train": batch_size, "train_few": few} if few else {"train": batch_size}


def convert_infer(network: Network, *, batch_size: int) -> bytes:
    """The ``infer`` signature alone, parameters still an input; `models.template` turns them into a constant."""
    tensors = input_tensors(network, batch_size=batch_size)
    return convert_signatures({"infer": (functools.partial(steps.infer, network), _pick(tensors, "params", "x"))})


def input_tensors(network: Network, *, batch_size: int) -> dict[str, tf.TensorSpec]:
    """What ``train`` takes, in order: params [d], x [B, ...], y, mask [B], clip [], and dropout [B, units] if any."""
    tensors = {
        "params": tf.TensorSpec([network.num_parameters], tf.float32, name="params"),
        "x": tf.TensorSpec([batch_size, *network.spec.input.shape], tf.float32, name="x"),
        "y": network.loss.label_tensor(batch_size),
        "mask": tf.TensorSpec([batch_size], tf.float32, name="mask"),
        "clip": tf.TensorSpec([], tf.float32, name="clip"),
    }
    units = sum(mask.units for mask in network.dropout)
    if units:
        tensors["dropout"] = tf.TensorSpec([batch_size, units], tf.float32, name="dropout")
    return tensors


def convert_signatures(signatures: Mapping[str, _Signature]) -> bytes:
    """Convert functions, each with its named inputs, to one flatbuffer.

    Raises:
        ConversionError: the converter refused, or an operator is not builtin.
    """
    concrete = {
        name: tf.function(function, autograph=False).get_concrete_function(**tensors)
        for name, (function, tensors) in signatures.items()
    }
    # The converter takes several signatures only from a saved model on disk.
    with tempfile.TemporaryDirectory() as folder:
        saved = str(Path(folder) / "model")
        tf.saved_model.save(tf.Module(), saved, signatures=concrete)
        converter = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=list(signatures))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            graph = bytes(converter.convert())
        except ConverterError as error:
            raise ConversionError(f"The converter refused the graph: {error}") from error
    foreign = sorted({name for name in operators(graph) if name.startswith("CUSTOM")})
    if foreign:
        raise ConversionError(f"The graph needs operators that are not builtin: {', '.join(foreign)}.")
    return kept_apart(graph)


def _pick(tensors: Mapping[str, tf.TensorSpec], *names: str) -> dict[str, tf.TensorSpec]:
    """The named inputs only."""
    return {name: tensors[name] for name in names}
