"""Where a model to build comes from: the catalogue, a function in a Python file, or a saved Keras model."""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fl_protocol.errors import LocalMisuseError
from fl_protocol.model_manifest import (
    ClipGroup,
    InputSchema,
    LabelKind,
    LabelSchema,
    LossSpec,
    TrainingDefaults,
)
from models import catalog
from models.errors import ModelSpecError
from models.specs import ModelSpec

UNTRIED = TrainingDefaults(learning_rate=0.1, l2_norm_clip=1.0, server_momentum=0.9)
"""Where nobody has tried any."""


@dataclass(frozen=True)
class Description:
    """What the command line says of a model; None and empty leave what the model says, or a default.

    Args:
        name: of the bundle.
        description: for people.
        data: recordings and their licence.
        loss: overrides the compiled one; ``huber`` may carry its delta as ``huber:0.5``.
        label_kind: only ``input`` cannot be told from the loss.
        labels: names of classes, binary labels or values.
        label_units: of values.
        tolerance: of values.
        channels: names of the input's last axis.
        units: of the channels.
        sampling_rate_hz: of the input.
        learning_rate: default of a task.
        l2_norm_clip: default of a task.
        personal_layers: names.
        norm_clips: groups.
    """

    name: str | None = None
    description: str | None = None
    data: str | None = None
    loss: str | None = None
    label_kind: LabelKind | None = None
    labels: tuple[str, ...] = ()
    label_units: tuple[str, ...] = ()
    tolerance: float | None = None
    channels: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    sampling_rate_hz: float | None = None
    learning_rate: float | None = None
    l2_norm_clip: float | None = None
    personal_layers: tuple[str, ...] = ()
    norm_clips: tuple[ClipGroup, ...] = ()


def load_spec(source: str, said: Description) -> ModelSpec:
    """The model of a source.

    Args:
        source: a catalogue name, ``FILE.py:FUNCTION``, or the path of a saved Keras model.
        said: what the command line adds.

    Raises:
        LocalMisuseError: there is nothing of that kind, or the function failed.
        ModelSpecError: what came cannot be trained on a device.
    """
    if source in catalog.MODELS:
        return _amended(catalog.load(source), said)
    file, colon, function = source.rpartition(":")
    if colon and file.endswith(".py"):
        made = _call(Path(file), function)
    elif Path(source).exists():
        made = _saved(Path(source))
    else:
        raise LocalMisuseError(
            f"{source}: expected a model of the catalogue ({', '.join(catalog.MODELS)}), FILE.py:FUNCTION, or a saved "
            "Keras model (.keras)."
        )
    return _amended(made, said) if isinstance(made, ModelSpec) else describe(made, said)


def load_python(path: Path) -> Any:
    """Run a Python file as a module, for the models or layers that it defines.

    Raises:
        LocalMisuseError: there is no such file, or running it failed.
    """
    # A name of its own, so that a file called json.py does not take the place of another module.
    name = f"covey_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise LocalMisuseError(f"{path}: there is no such Python file.")
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as import does: dataclasses and pickles look their module up.
    sys.modules[name] = module
    # What lies beside it can be imported, as when Python runs the file.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        _guarded(lambda: spec.loader.exec_module(module), path)  # type: ignore[union-attr]
    finally:
        sys.path.pop(0)
    return module


def _call(path: Path, function: str) -> Any:
    """What the function in a Python file returns: a `ModelSpec` or a Keras model."""
    found = getattr(load_python(path), function, None)
    if not callable(found):
        raise LocalMisuseError(f"{path}: there is no function {function}() in it.")
    made = _guarded(found, path)
    if made is None:
        raise LocalMisuseError(f"{path}: {function}() returned None, expected a Keras model or a ModelSpec.")
    return made


def _guarded(action: Callable[[], Any], path: Path) -> Any:
    """The result of somebody's code; whatever it raises as one sentence that says where."""
    try:
        return action()
    except (ModelSpecError, LocalMisuseError):
        raise
    # SystemExit is no Exception: a file that ends the process would end it without a word.
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        raise LocalMisuseError(f"{path}: {type(error).__name__}{where}: {error}") from error


def _saved(path: Path) -> Any:
    """A saved Keras model. Raises LocalMisuseError."""
    # Security: loading the older formats runs Python code that they may hold; this one's configuration is looked at
    # first.
    if path.suffix != ".keras" or not zipfile.is_zipfile(path):
        raise LocalMisuseError(
            f"{path}: expected a model saved with model.save('NAME.keras'); HDF5 files and SavedModel folders can hold "
            "program code, so load those in a Python file of yours and give FILE.py:FUNCTION."
        )
    from models.keras_config import check_config  # noqa: PLC0415 - TensorFlow

    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
    except (OSError, KeyError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise LocalMisuseError(f"{path}: it cannot be read as a Keras model ({_first_line(error)}).") from error
    check_config(config, source=str(path))
    import tensorflow as tf  # noqa: PLC0415 - slow

    import models.layers  # noqa: PLC0415, F401 - TensorFlow; makes registered layers known to Keras

    try:
        return tf.keras.models.load_model(path, compile=True, safe_mode=True)
    except Exception as error:
        raise LocalMisuseError(
            f"{path}: it cannot be read as a Keras model ({_first_line(error)}); save it with "
            "model.save('NAME.keras'), or give FILE.py:FUNCTION if it has layers of its own."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _amended(spec: ModelSpec, said: Description) -> ModelSpec:
    """A complete specification with what the command line says in its place."""
    label = spec.label
    if said.labels or said.label_units or said.tolerance is not None:
        label = LabelSchema(
            kind=label.kind,
            names=said.labels or label.names,
            units=said.label_units or label.units,
            tolerance=label.tolerance if said.tolerance is None else said.tolerance,
        )
    window = spec.input
    return replace(
        spec,
        name=said.name or spec.name,
        description=said.description or spec.description,
        data=said.data or spec.data,
        loss=_parsed_loss(said.loss) if said.loss else spec.loss,
        label=label,
        input=InputSchema(
            shape=window.shape,
            channels=said.channels or window.channels,
            units=said.units or window.units,
            sampling_rate_hz=window.sampling_rate_hz if said.sampling_rate_hz is None else said.sampling_rate_hz,
        ),
        defaults=_defaults(spec.defaults, said),
        personal_layers=said.personal_layers or spec.personal_layers,
        norm_clips=said.norm_clips or spec.norm_clips,
    )


def describe(model: Any, said: Description) -> ModelSpec:
    """A specification of a bare Keras model."""
    from models.keras_losses import compiled_loss  # noqa: PLC0415 - TensorFlow
    from models.keras_nodes import input_shape  # noqa: PLC0415 - TensorFlow

    shape = input_shape(model)
    loss = _parsed_loss(said.loss) if said.loss else compiled_loss(model)
    outputs = tuple(model.output_shape[1:])
    if len(outputs) != 1 and said.label_kind != "input":
        raise ModelSpecError(
            f"Model {model.name}: its output is {outputs}, expected one row of numbers; end it with Flatten "
            "or a global pooling layer, and Dense."
        )
    count = outputs[0] or 0
    kinds: dict[str, LabelKind] = {"softmax_cross_entropy": "class", "binary_cross_entropy": "binary"}
    kind = said.label_kind or kinds.get(loss.name, "value")
    word = {"class": "class", "binary": "label", "value": "value"}.get(kind, "")
    names = () if kind == "input" else said.labels or tuple(f"{word} {i}" for i in range(count))
    return ModelSpec(
        name=said.name or model.name,
        description=said.description or f"The Keras model {model.name}.",
        model=model,
        input=InputSchema(
            shape=shape,
            channels=said.channels or tuple(f"channel {i}" for i in range(shape[-1])),
            units=said.units or ("1",) * shape[-1],
            sampling_rate_hz=said.sampling_rate_hz or 0.0,
        ),
        label=LabelSchema(
            kind=kind,
            names=names,
            units=said.label_units or (("1",) * len(names) if kind == "value" else ()),
            tolerance=said.tolerance or 0.0,
        ),
        loss=loss,
        defaults=_defaults(UNTRIED, said),
        personal_layers=said.personal_layers,
        norm_clips=said.norm_clips,
        data=said.data or "Not stated by the publisher.",
    )


def _defaults(given: TrainingDefaults, said: Description) -> TrainingDefaults:
    return TrainingDefaults(
        learning_rate=said.learning_rate or given.learning_rate,
        l2_norm_clip=said.l2_norm_clip or given.l2_norm_clip,
        server_momentum=given.server_momentum,
    )


def _parsed_loss(text: str) -> LossSpec:
    """``NAME`` or ``huber:DELTA``."""
    from models.losses import LABEL_KINDS  # noqa: PLC0415 - TensorFlow

    name, _, delta = text.partition(":")
    try:
        number = float(delta) if delta else 1.0
    except ValueError:
        number = 0.0
    known = {each: each for each in LABEL_KINDS}
    if name not in known or number <= 0 or (delta and name != "huber"):
        raise LocalMisuseError(f"--loss {text}: expected one of {', '.join(known)} (huber may be huber:DELTA).")
    return LossSpec(known[name], number)
