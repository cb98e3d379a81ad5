"""One file per family of layers; importing this registers them all."""

from models.layers import (
    activations,
    convolution,
    dense,
    depthwise,
    dropout,
    embedding,
    fixed,
    merge,
    normalisation,
    pooling,
    recurrent,
    shaping,
)

__all__ = [
    "activations",
    "convolution",
    "dense",
    "depthwise",
    "dropout",
    "embedding",
    "fixed",
    "merge",
    "normalisation",
    "pooling",
    "recurrent",
    "shaping",
]
