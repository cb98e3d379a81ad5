"""From a verified bundle to a checked file for phones and microcontrollers.

The bundle's own ``infer`` is the judge twice: the Keras model that was read back has to agree with it before anything
is converted, and the converted graph has to agree with it within what its precision explains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fl_protocol.bundle import ModelBundle
from fl_protocol.errors import LocalMisuseError
from models.export.comparison import (
    Comparison,
    ExportError,
    autoencoder_targets,
    compare,
    probabilities_of,
    random_examples,
    require_same,
)
from models.export.convert import STATEFUL, Precision, convert, logits_model, with_probabilities
from models.export.data import Examples
from models.export.micro import MicroRunner, check_operators
from models.export.run import GraphRunner
from models.flatbuffer import operators
from models.keras_bundle import keras_model

ExportFormat = Literal["float32", "float16", "int8", "tflm"]
Floats = NDArray[np.float32]

_CALIBRATION_EXAMPLES = 200
"""More of them hardly widen the range of the activations."""


@dataclass(frozen=True)
class ExportRequest:
    """What is wanted.

    Args:
        format: ``tflm`` is int8 for one example a call, held to TensorFlow Lite Micro's operators.
        params: float32 [d] in place of the bundle's own.
        examples: to calibrate and to measure with; needed for int8.
        probabilities: end in the softmax or sigmoid that the loss contains.
        int8_io: of ``int8``: input and output are int8 as well; ``tflm`` always has them so.
        keep_float: of ``tflm``: float32 after all.
        max_drop: refuse a larger drop, in points or in the unit of the error.
    """

    format: ExportFormat
    params: Floats | None = None
    examples: Examples | None = None
    probabilities: bool = False
    int8_io: bool = False
    keep_float: bool = False
    max_drop: float | None = None

    @property
    def precision(self) -> Precision:
        """Of the weights."""
        if self.format == "tflm":
            return "float32" if self.keep_float else "int8"
        return self.format


@dataclass(frozen=True)
class Exported:
    """A checked export.

    Args:
        graph: the flatbuffer.
        output: what it gives: ``logits``, ``probabilities`` or ``values``.
        comparison: with the bundle's own ``infer``, of `reference_bytes`.
        calibrated_on: examples that fixed the scales, none of which is in the comparison; 0 for float.
        runtime: what ran it.
        takes_any_number: of examples a call; otherwise one.
        keeps_state: the caller has to reset it before every example.
        arena_bytes: what TensorFlow Lite Micro needed; None if it was not asked.
    """

    graph: bytes
    output: str
    comparison: Comparison
    reference_bytes: int
    calibrated_on: int
    runtime: str
    takes_any_number: bool
    keeps_state: bool
    arena_bytes: int | None


def export_bundle(
    bundle: ModelBundle, request: ExportRequest, *, say: Callable[[str], None] = lambda _: None
) -> Exported:
    """Convert, run and compare; runs at whoever ships the model.

    Args:
        bundle: verified.
        request: what is wanted.
        say: told what is being done.

    Raises:
        LocalMisuseError: int8 without examples, probabilities of a model that gives values, or an unknown layer.
        ConversionError: the model has no such form.
        ExportError: it does, but not one that does what the bundle does, or the drop is too large.
    """
    manifest, loss = bundle.manifest, bundle.manifest.loss
    params = bundle.params if request.params is None else request.params
    say("reading the Keras model")
    whole = keras_model(bundle, params)
    model = logits_model(whole, loss)
    calibration, measured = _split(request, whole)
    say("running the bundle's infer")
    template = bundle.inference_model(params)
    expected = GraphRunner(template)(measured.x)
    scores = model.predict(measured.x, verbose=0).reshape(expected.shape)
    require_same(compare(manifest, expected, scores, None), precision="float32", what="The Keras model")
    output = "logits" if manifest.label.kind in ("class", "binary") else "values"
    if request.probabilities:
        model, output, expected = with_probabilities(model, loss), "probabilities", probabilities_of(expected, loss)
    say(f"converting to {request.precision}")
    graph = _converted(model, request, output=output, calibration=calibration)
    say(f"running {len(measured.x)} examples through it")
    runner = MicroRunner(graph) if request.format == "tflm" and MicroRunner.is_installed() else GraphRunner(graph)
    y = autoencoder_targets(whole, measured.x) if manifest.label.kind == "input" and request.examples else measured.y
    comparison = compare(manifest, expected, runner(measured.x), y, probabilities=request.probabilities)
    _require(comparison, request)
    return Exported(
        graph=graph,
        output=output,
        comparison=comparison,
        reference_bytes=len(template),
        calibrated_on=0 if calibration is None else len(calibration),
        runtime=runner.runtime,
        takes_any_number=isinstance(runner, GraphRunner) and runner.takes_any_number,
        keeps_state=STATEFUL in operators(graph),
        arena_bytes=runner.arena_bytes() if isinstance(runner, MicroRunner) else None,
    )


def _converted(model: Any, request: ExportRequest, *, output: str, calibration: Floats | None) -> bytes:
    """The flatbuffer."""
    micro = request.format == "tflm"
    graph = convert(
        model,
        precision=request.precision,
        output=output,
        calibration=calibration,
        int8_io=request.int8_io or micro,
        one_example=micro,
    )
    if micro:
        check_operators(graph, precision=request.precision)
    return graph


def _split(request: ExportRequest, model: Any) -> tuple[Floats | None, Examples]:
    """Examples to calibrate with, if any are needed, and others to measure with."""
    examples = request.examples
    if request.precision != "int8":
        return None, examples or Examples(random_examples(model), None)
    if examples is None or len(examples.x) < 2:
        raise LocalMisuseError(f"{request.format}: the scales of 8-bit numbers come from recordings: give --data.")
    order = np.random.default_rng(0).permutation(len(examples.x))
    count = min(_CALIBRATION_EXAMPLES, len(order) // 2)
    return examples.x[order[:count]], examples.rows(np.sort(order[count:]))


def _require(comparison: Comparison, request: ExportRequest) -> None:
    """The export is the same model, and as good as was asked for."""
    require_same(comparison, precision=request.precision, what=f"The {request.format} export")
    limit, drop = request.max_drop, comparison.drop
    if limit is None:
        return
    if drop is None:
        raise LocalMisuseError("--max-drop: the drop is measured on labels: give --data with an array y.")
    if drop > limit:
        raise ExportError(f"{request.format}: the drop of {drop:.3g} is above --max-drop {limit:g}; no file was kept.")
