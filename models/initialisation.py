"""The parameters a model starts from: the same seed gives the same bytes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from models.layers.layer import Parameter
from models.network import Network


def initial_parameters(network: Network) -> NDArray[np.float32]:
    """Float32 [d], drawn with the model's seed in the order of the flat vector."""
    rng = np.random.default_rng(network.spec.seed)
    drawn = [_draw(parameter, rng) for layer in network.trained for parameter in layer.parameters]
    return np.concatenate(drawn).astype(np.float32)


def _draw(parameter: Parameter, rng: np.random.Generator) -> NDArray[np.float64]:
    """One flat tensor; Glorot & Bengio 2010, eq. 16, with a convolution's receptive field in both fans."""
    size = math.prod(parameter.shape)
    if parameter.initializer == "zeros":
        return np.zeros(size)
    *field, inputs, outputs = parameter.shape
    limit = math.sqrt(6.0 / (math.prod(field) * (inputs + outputs)))
    return rng.uniform(-limit, limit, size)
