"""What a model is: plain frozen values, without TensorFlow.

A model is a tuple of layer specs over one window of samples. Each spec class has one layer implementation, found in
`models.layers`; adding a kind of layer means one dataclass here and one file there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fl_protocol.bundle import InputSchema, LabelSchema, TrainingDefaults

Shape = tuple[int, ...]
Initializer = Literal["glorot_uniform", "zeros"]


class FixedStage(Protocol):
    """A parameter-free stage in front of the trained layers, such as feature extraction.

    Nothing in it may come from recordings: a constant learnt from people's data would leave the privacy ledger.
    """

    @property
    def description(self) -> str:
        """What it computes, for people; goes into the bundle's manifest."""
        ...

    def output_shape(self, input_shape: Shape) -> Shape:
        """The shape of one example's output, given one example's input."""
        ...

    def apply(self, x: Any) -> Any:
        """Map a tensor [B, *input_shape] to [B, *output_shape], each row from its own row only."""
        ...


class Augmentation(Protocol):
    """Several versions of each window, for training only.

    The gradient of an example is the mean over its versions, and only that mean is clipped: an example stays one
    record, so the privacy guarantee is the same as without (De et al. 2022, arXiv 2204.13650, section 3).
    """

    @property
    def description(self) -> str:
        """What it does, for people; goes into the bundle's manifest."""
        ...

    @property
    def copies(self) -> int:
        """How many versions it makes of a window."""
        ...

    def apply(self, x: Any) -> Any:
        """Map [B, ...] to [B·copies, ...], the versions of an example side by side."""
        ...


@dataclass(frozen=True)
class Dense:
    """A fully connected layer on [B, features]; kernel [features, units] and, unless left out, bias [units]."""

    name: str
    units: int
    initializer: Initializer = "glorot_uniform"
    use_bias: bool = True


@dataclass(frozen=True)
class Conv1D:
    """A convolution over time, stride 1, no padding; kernel [kernel_size, channels, filters] and bias [filters]."""

    name: str
    filters: int
    kernel_size: int
    initializer: Initializer = "glorot_uniform"


@dataclass(frozen=True)
class MaxPool1D:
    """The maximum over `pool_size` neighbouring samples, without overlap; left-over samples are dropped."""

    pool_size: int


@dataclass(frozen=True)
class GlobalAveragePool1D:
    """The mean over time: [B, samples, channels] to [B, channels]."""


@dataclass(frozen=True)
class ReLU:
    """The rectifier max(x, 0)."""


@dataclass(frozen=True)
class Flatten:
    """All values of an example in one row: [B, ...] to [B, features]."""


@dataclass(frozen=True)
class Fixed:
    """A parameter-free stage; only the first layers of a model may be of this kind."""

    stage: FixedStage


LayerSpec = Dense | Conv1D | MaxPool1D | GlobalAveragePool1D | ReLU | Flatten | Fixed


@dataclass(frozen=True)
class ModelSpec:
    """One model of the catalogue.

    Args:
        name: such as ``watch_cnn``.
        description: what it is for, in one or two sentences.
        input: one window of samples.
        label: class names; the last layer has as many outputs.
        layers: from the window to the logits.
        defaults: hyper-parameters that were tried.
        augmentation: versions of each window that ``train`` sees; ``infer`` and ``evaluate`` see the window itself.
        seed: of the initial parameters.
    """

    name: str
    description: str
    input: InputSchema
    label: LabelSchema
    layers: tuple[LayerSpec, ...]
    defaults: TrainingDefaults
    augmentation: Augmentation | None = None
    seed: int = 0

    @property
    def preprocessing(self) -> str:
        """What the graph does to a window before the trained layers; the host hands over raw samples."""
        stages = [layer.stage.description for layer in self.layers if isinstance(layer, Fixed)]
        text = " Then: ".join(stages) if stages else "None: the samples enter the trained layers as they are."
        return text if self.augmentation is None else f"{text} In training only: {self.augmentation.description}"

    @property
    def copies(self) -> int:
        """How many versions of each window ``train`` sees."""
        return 1 if self.augmentation is None else self.augmentation.copies
