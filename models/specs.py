"""What a model is, beside its Keras layers: plain frozen values, without TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from fl_protocol.model_manifest import ClipGroup, InputSchema, LabelSchema, LossSpec, TrainingDefaults

Shape = tuple[int, ...]


class Augmentation(Protocol):
    """Several versions of each example, for training only.

    The gradient of an example is the mean over its versions, and only that mean is clipped: an example stays one
    record, so the privacy guarantee is the same as without (De et al. 2022, arXiv 2204.13650, section 3).
    """

    @property
    def description(self) -> str:
        """What it does, for people; goes into the bundle's manifest."""
        ...

    @property
    def copies(self) -> int:
        """How many versions it makes of an example."""
        ...

    def apply(self, x: Any) -> Any:
        """Map [B, ...] to [B·copies, ...], the versions of an example side by side."""
        ...


@dataclass(frozen=True)
class ModelSpec:
    """One model and what a device has to know about it.

    Args:
        name: such as ``watch_cnn``.
        description: what it is for, in one or two sentences.
        model: a ``tf.keras`` Sequential or functional model whose shapes are static; its weights are the start.
        input: one example.
        label: what the model predicts.
        loss: of one example.
        defaults: hyper-parameters that were tried.
        augmentation: versions of each example that ``train`` sees; ``infer`` and ``evaluate`` see the example itself.
        personal_layers: names of layers whose parameters never leave the device.
        norm_clips: groups of layers that are clipped together; empty for one flat clip.
        data: which recordings it is meant for or started from, with their licence.
    """

    name: str
    description: str
    model: Any = field(repr=False)
    input: InputSchema
    label: LabelSchema
    loss: LossSpec
    defaults: TrainingDefaults
    augmentation: Augmentation | None = None
    personal_layers: tuple[str, ...] = ()
    norm_clips: tuple[ClipGroup, ...] = ()
    data: str = ""

    @property
    def copies(self) -> int:
        """How many versions of each example ``train`` sees."""
        return 1 if self.augmentation is None else self.augmentation.copies
