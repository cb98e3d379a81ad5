"""From a Keras model to the files that phones and microcontrollers run: float32, float16 or full 8-bit integers.

The graph is converted from Keras itself, not from the trainable one, so that it has the operators that every runtime
has a fast kernel for: CONV_2D and FULLY_CONNECTED instead of the slices and products that per-example gradients need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.python.convert_phase import ConverterError

from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import LossSpec
from models.errors import ConversionError
from models.flatbuffer import operators, read_model
from models.losses import FINAL_ACTIVATION
from models.memory_sharing import kept_apart

Precision = Literal["float32", "float16", "int8"]
Floats = NDArray[np.float32]

STATEFUL = "UNIDIRECTIONAL_SEQUENCE_LSTM"
"""An operator that keeps its state from one call to the next unless the caller resets it."""


def logits_model(model: Any, loss: LossSpec) -> Any:
    """`model`, which is changed, without the final softmax or sigmoid that its loss contains: what ``infer`` gives."""
    last = model.layers[-1]
    ending = FINAL_ACTIVATION.get(loss.name)
    if isinstance(last, tf.keras.layers.Softmax) and ending == "softmax":
        return tf.keras.Model(model.input, last.input)
    if ending is not None and getattr(getattr(last, "activation", None), "__name__", "") == ending:
        last.activation = tf.keras.activations.linear
    return model


def with_probabilities(model: Any, loss: LossSpec) -> Any:
    """A model of logits, with the softmax or sigmoid that its loss contains at its end.

    Raises:
        LocalMisuseError: its outputs are values.
    """
    ending = FINAL_ACTIVATION.get(loss.name)
    if ending is None:
        raise LocalMisuseError(f"--probabilities: with the loss {loss.name} the outputs are values, not scores.")
    return tf.keras.Model(model.input, tf.keras.layers.Activation(ending)(model.output))


def convert(
    model: Any,
    *,
    precision: Precision,
    output: str = "logits",
    calibration: Floats | None = None,
    int8_io: bool = False,
    one_example: bool = False,
) -> bytes:
    """A flatbuffer with input ``x`` and one output, for any number of examples a call where the operators allow it.

    Args:
        model: a Keras model.
        precision: of the weights; with ``int8`` of all computation.
        output: the name of the output.
        calibration: examples float32 [n, ...] whose range of activations fixes the scales; for ``int8``.
        int8_io: input and output are int8 too, instead of float32 that the graph converts; for ``int8``.
        one_example: exactly one example a call, as microcontrollers want it.

    Raises:
        ConversionError: an operator is not builtin, or has no 8-bit form.
    """
    if precision != "float32":
        _refuse_untried(_converted(_converter(model, 1, output), "float32"), precision)
    batches: tuple[int | None, ...] = (1,) if one_example else (None, 1)
    for batch in batches:
        converter = _converter(model, batch, output)
        _set_precision(converter, precision, calibration, int8_io=int8_io)
        try:
            graph = _converted(converter, precision)
            break
        except ConversionError:
            # A recurrent layer's memory is planned for a known number of examples.
            if batch == batches[-1]:
                raise
    if precision == "int8":
        _refuse_float(graph)
    return graph


def float_operators(graph: bytes) -> list[str]:
    """Operators of an int8 graph that still compute in float32, other than those that convert input and output."""
    model = read_model(graph)
    names = iter(operators(graph))
    found = []
    for subgraph in model.subgraphs:
        ends = {*subgraph.inputs, *subgraph.outputs}
        for operator in subgraph.operators:
            name = next(names)
            tensors = [index for index in (*operator.inputs, *operator.outputs) if index >= 0]
            wide = [i for i in tensors if subgraph.tensors[i].type == schema.TensorType.FLOAT32]
            is_border = name in ("QUANTIZE", "DEQUANTIZE")
            if any(not (is_border and index in ends) for index in wide):
                found.append(name)
    return found


def _converter(model: Any, batch: int | None, output: str) -> Any:
    """A converter of the model's forward pass for `batch` examples, or for any number."""
    shape = [batch, *model.input_shape[1:]]
    function = tf.function(lambda x: {output: model(x, training=False)})
    concrete = function.get_concrete_function(x=tf.TensorSpec(shape, tf.float32, name="x"))
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete], model)


def _set_precision(converter: Any, precision: Precision, calibration: Floats | None, *, int8_io: bool) -> None:
    """What the converter is asked for."""
    if precision == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":
        if calibration is None:
            raise LocalMisuseError("int8: expected examples to calibrate with, got none.")
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: _one_by_one(calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        if int8_io:
            converter.inference_input_type = converter.inference_output_type = tf.int8


def _one_by_one(examples: Iterable[Floats]) -> Iterator[list[Floats]]:
    """Each example as a batch of one."""
    for example in examples:
        yield [example[None]]


def _converted(converter: Any, precision: Precision) -> bytes:
    """The graph, with builtin operators only."""
    try:
        graph = bytes(converter.convert())
    # ValueError and RuntimeError come from the calibrator.
    except (ConverterError, ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"{precision}: the converter refused the model: {first}") from error
    foreign = sorted({name for name in operators(graph) if name.startswith("CUSTOM")})
    if foreign:
        raise ConversionError(f"{precision}: the model needs operators that are not builtin: {', '.join(foreign)}.")
    return kept_apart(graph)


def _refuse_untried(graph: bytes, precision: Precision) -> None:
    """What TensorFlow 2.15's converter must not be given, seen in the float32 graph: it would not come back."""
    used = operators(graph)
    if precision == "int8" and "WHILE" in used:
        # Its calibrator crashes the whole process.
        raise ConversionError(
            "int8: a recurrent layer became a loop, which cannot be quantised: use LSTM instead of GRU, or float16."
        )
    if precision == "float16" and STATEFUL in used:
        # It runs forever.
        raise ConversionError("float16: an LSTM cannot be converted to float16: use float32 or int8.")


def _refuse_float(graph: bytes) -> None:
    """What is called int8 computes in int8."""
    left = set(float_operators(graph))
    if left:
        names = sorted(left - {"QUANTIZE", "DEQUANTIZE"} or left)
        raise ConversionError(
            f"int8: {', '.join(names)} would stay in float32, so it is no integer model: use float16, or tflm --float."
        )
