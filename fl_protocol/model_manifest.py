"""What a model bundle says about itself: frozen structs, decoded strictly, checked for consistency. No I/O."""

from __future__ import annotations

import math
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fl_protocol.errors import BundleError

BUNDLE_FORMAT = 2

LabelKind = Literal["class", "binary", "value", "input"]
LossName = Literal["softmax_cross_entropy", "binary_cross_entropy", "mean_squared_error", "huber"]


class ParameterSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one tensor lies in the flat parameter vector.

    Args:
        name: layer and role, such as ``conv1/kernel``.
        shape: tensor shape, row-major.
        offset: index of its first element in ``params`` [d].
    """

    name: str
    shape: tuple[int, ...]
    offset: int


class InputSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One example: its ``shape``, the names and ``units`` of its last axis, float32, at ``sampling_rate_hz``.

    Args:
        shape: such as (samples, channels), or (rows, columns, channels) of an image.
        channels: one name per entry of the last axis.
        units: one per channel; ``1`` for a pure number.
        sampling_rate_hz: samples per second; 0 where the first axis is not time.
    """

    shape: tuple[int, ...]
    channels: tuple[str, ...]
    units: tuple[str, ...]
    sampling_rate_hz: float


class LabelSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a label means.

    Args:
        kind: ``class``: y int32 [B], an index into `names`. ``binary``: y float32 [B, K], 0 or 1 for each of `names`.
            ``value``: y float32 [B, K], one number for each of `names` in its unit. ``input``: the target is the
            example itself as the first trained layer sees it (an autoencoder); y is int32 [B] and its values are not
            used.
        names: of the classes, the binary labels or the values; empty for ``input``.
        units: of the values, one per name; empty for the other kinds.
        tolerance: ``value`` and ``input``: an example counts as correct when no output is off by more than this, in
            the label's unit.
    """

    kind: LabelKind
    names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    tolerance: float = 0.0


def label_array(given: Any, count: int, *, label: LabelSchema) -> NDArray[np.int32] | NDArray[np.float32]:
    """Labels as the graph takes them: int32 [n], or float32 [n, K] (a vector becomes [n, 1]).

    Args:
        given: an array, or None where there are no labels.
        count: n.
        label: what the model predicts; of kind ``input`` needs no labels and gets zeros.

    Raises:
        KeyError: there are none, and the model needs them.
        ValueError: they are not numbers, or class indices that are not whole.
    """
    if label.kind == "input":
        return np.zeros(count, np.int32)
    if given is None:
        raise KeyError("y")
    array = np.asarray(given)
    if label.kind == "class":
        whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise ValueError("y: expected class indices, got numbers that are not whole")
        return whole
    return array.astype(np.float32).reshape(len(array), -1)


def label_problem(y: NDArray[Any], label: LabelSchema) -> str:
    """What is wrong with labels of a model, as half a sentence; empty if nothing."""
    if label.kind == "input" or not len(y):
        return ""
    names = len(label.names)
    if label.kind == "class":
        wrong = y.min() < 0 or y.max() >= names
        return f"the labels run from {y.min()} to {y.max()}, the model knows 0 to {names - 1}" if wrong else ""
    if y.ndim != 2 or y.shape[1] != names:
        return f"the labels have shape {y.shape}, the model takes {names} numbers an example: {', '.join(label.names)}"
    if not np.isfinite(y).all():
        return "the labels hold numbers that are not finite"
    if label.kind == "binary" and not np.isin(y, (0.0, 1.0)).all():
        return "the labels hold numbers other than 0 and 1"
    return ""


class LossSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The loss of one example; over several outputs it is their mean, as in Keras.

    Args:
        name: which loss.
        delta: of ``huber``: where it turns from square to linear, in the label's unit.
    """

    name: LossName
    delta: float = 1.0


class TrainingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hyper-parameters that the publisher tried; a task may set others."""

    learning_rate: float
    l2_norm_clip: float
    server_momentum: float


class LayerInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer of the model, for people and tools.

    Args:
        name: as in the Keras model.
        kind: its Keras class.
        output_shape: of one example.
        num_parameters: trained ones.
        norm_methods: how per-example gradient norms are computed, by parameter role: ``gram``, ``materialised``
            or, of an embedding, ``by row``.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    num_parameters: int
    norm_methods: dict[str, str] = {}


class ClipGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers whose gradient is clipped together, to `share` times the norm clip.

    The squares of all shares add up to 1, so the whole clipped gradient is never longer than the norm clip and the
    noise is the same as for one flat clip (McMahan et al. 2018, arXiv 1710.06963, section 2).
    """

    layers: tuple[str, ...]
    share: float


class DropoutMask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Columns of the input ``dropout`` [B, sum of units]: each 1 with probability 1 − rate, else 0.

    The graph does the scaling by 1/(1 − rate). The masks of all layers lie side by side in the manifest's order.
    """

    layer: str
    rate: float
    units: int


class BundleManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is in a bundle.

    Args:
        name: model name, such as ``watch_features``.
        version: publisher's version; devices refuse one lower than they have.
        description: what the model is for and how it prepares its input, for people.
        data: which recordings the model is meant for or started from, and their licence.
        batch_size: B, the static batch dimension of every signature but ``train_few``, which says its own.
        parameters: layout of the flat vector; ``num_parameters`` is d.
        num_shared_parameters: how many of the d, from the start, leave the device; the rest are personal layers.
        norm_clips: groups of layers that are clipped together; one group with share 1 is a flat clip.
        dropout: the masks that the host feeds while training; empty for a model without dropout.
        train_flops: floating-point operations of one call of ``train``, counted from the graph.
        train_arena_bytes: working memory of ``train`` and ``train_few``, each of which keeps its own, planned from the
            graph.
        infer_params_offset: byte offset of the d little-endian float32 parameters within ``infer.tflite``.
        members: SHA-256 (hex) of every other member except the signature.
    """

    format: int
    name: str
    version: int
    description: str
    data: str
    batch_size: int
    num_parameters: int
    num_shared_parameters: int
    parameters: tuple[ParameterSpec, ...]
    layers: tuple[LayerInfo, ...]
    input: InputSchema
    label: LabelSchema
    loss: LossSpec
    preprocessing: str
    defaults: TrainingDefaults
    norm_clips: tuple[ClipGroup, ...]
    dropout: tuple[DropoutMask, ...]
    train_flops: int
    train_arena_bytes: int
    infer_params_offset: int
    members: dict[str, str] = {}

    @property
    def personal_layers(self) -> tuple[str, ...]:
        """Layers whose parameters stay on the device, in the order of the flat vector."""
        own = [spec.name.rpartition("/")[0] for spec in self.parameters if spec.offset >= self.num_shared_parameters]
        return tuple(dict.fromkeys(own))


def decode_manifest(text: bytes) -> BundleManifest:
    """The manifest, decoded strictly and checked for consistency.

    Raises:
        BundleError: it cannot be read, is of another format, or contradicts itself.
    """
    try:
        # The number first: another format has other fields, and should be named rather than called unreadable.
        bundle_format = msgspec.json.decode(text, type=_Format).format
        if bundle_format != BUNDLE_FORMAT:
            raise BundleError(
                f"The bundle has format {bundle_format}; this version of covey reads format {BUNDLE_FORMAT}."
            )
        manifest = msgspec.json.decode(text, type=BundleManifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"The bundle's manifest cannot be read ({error}): it was made by another version.") from error
    _check_layout(manifest)
    _check_training(manifest)
    return manifest


class _Format(msgspec.Struct):
    """The one field that every format has."""

    format: int


def _check_layout(manifest: BundleManifest) -> None:
    """The parameters tile the flat vector, and the personal ones are whole tensors at its end."""
    end, boundaries = 0, {0}
    for spec in manifest.parameters:
        if spec.offset != end or any(side <= 0 for side in spec.shape):
            raise BundleError(f"The bundle's parameter {spec.name} has offset {spec.offset}; {end} was expected.")
        end += math.prod(spec.shape)
        boundaries.add(end)
    if end != manifest.num_parameters:
        raise BundleError(f"The bundle's parameters add up to {end}, not to num_parameters={manifest.num_parameters}.")
    shared = manifest.num_shared_parameters
    if shared not in boundaries - {0}:
        raise BundleError(f"The bundle's num_shared_parameters={shared} is not the end of one of its parameters.")


def _check_training(manifest: BundleManifest) -> None:
    """Clips, dropout, labels and batch size are ones that a device can train with."""
    if manifest.batch_size < 1:
        raise BundleError(f"The bundle's batch_size is {manifest.batch_size}; at least 1 was expected.")
    shares = [group.share for group in manifest.norm_clips]
    # Security: shares whose squares add up to more than 1 would let a gradient be longer than the noise is made for.
    if not shares or not all(share > 0 for share in shares) or not math.fsum(share**2 for share in shares) <= 1 + 1e-6:
        raise BundleError(f"The bundle's norm_clips have shares {shares}; expected squares that add up to 1.")
    for mask in manifest.dropout:
        if not 0 <= mask.rate < 1 or mask.units < 1:
            raise BundleError(f"The bundle's dropout of {mask.layer} has rate {mask.rate} and {mask.units} units.")
    given, rate = manifest.defaults, manifest.input.sampling_rate_hz
    numbers = (given.learning_rate, given.l2_norm_clip, manifest.loss.delta)
    if not all(0 < number < math.inf for number in numbers) or not 0 <= given.server_momentum < 1:
        raise BundleError(
            f"The bundle's defaults are {given} and its loss {manifest.loss}; expected numbers above 0, "
            "momentum below 1."
        )
    if not 0 <= rate < math.inf or not 0 <= manifest.label.tolerance < math.inf:
        raise BundleError(
            f"The bundle's sampling rate is {rate} and its tolerance {manifest.label.tolerance}; expected 0 or more."
        )
    _check_label(manifest.label)


def _check_label(label: LabelSchema) -> None:
    """Names and units fit the kind of label."""
    if len(set(label.names)) != len(label.names):
        raise BundleError(f"The bundle's label names one thing twice: {', '.join(label.names)}.")
    if (label.kind == "input") == bool(label.names) or (label.units and len(label.units) != len(label.names)):
        raise BundleError(f"The bundle's label of kind {label.kind} has names {label.names} and units {label.units}.")
