"""Where a sliding window looks: index tables that serve convolutions and pooling of any rank, stride and padding.

Positions of an example are numbered row-major over its spatial axes, S of them. A window has J places and stands at P
outputs; place j of output p lies on position ``table[p, j]``, or on S where it hangs over the edge (padding). All
copying is then one GATHER with constant indices, which took a third of the time of slices and a concat, and the way
back is a gather as well: TFLite has no builtin that adds into places.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from models.errors import ModelSpecError
from models.specs import Shape

Indices = NDArray[np.int32]


@dataclass(frozen=True)
class Geometry:
    """A sliding window over the spatial axes of one example.

    Args:
        name: of the Keras layer, for errors.
        spatial: sizes of the axes, S in all.
        size: of the window, J places in all.
        strides: per axis.
        dilation: per axis.
        padding: ``valid``, ``same`` (TensorFlow's, with the odd element at the end) or ``causal``.
    """

    name: str
    spatial: Shape
    size: Shape
    strides: Shape
    dilation: Shape
    padding: str

    def __post_init__(self) -> None:
        if self.padding not in ("valid", "same", "causal"):
            raise ModelSpecError(f"Layer {self.name}: padding {self.padding!r}; use valid, same or causal.")
        if min(self.output) < 1:
            raise ModelSpecError(
                f"Layer {self.name}: a window of {self.size} does not fit an input of {self.spatial}; use a smaller "
                "window, or padding='same'."
            )

    @property
    def output(self) -> Shape:
        """Outputs per axis, P in all."""
        return tuple(
            -(-length // stride)
            if self.padding == "same"
            else (length - (0 if self.padding == "causal" else self._reach(axis)) + stride - 1) // stride
            for axis, (length, stride) in enumerate(zip(self.spatial, self.strides, strict=True))
        )

    @property
    def positions(self) -> int:
        """S."""
        return math.prod(self.spatial)

    @property
    def outputs(self) -> int:
        """P."""
        return math.prod(self.output)

    @property
    def places(self) -> int:
        """J."""
        return math.prod(self.size)

    @cached_property
    def table(self) -> Indices:
        """Int32 [P, J]: which position each place of each output lies on; S for none."""
        corners = itertools.product(*(range(n) for n in self.output))
        places = list(itertools.product(*(range(n) for n in self.size)))
        return np.array([[self._position(corner, place) for place in places] for corner in corners], np.int32)

    @cached_property
    def inverse(self) -> Indices:
        """Int32 [S, R]: the entries j·P + p of `table` that lie on each position, filled up with P·J.

        Where no position is missed by a place other than at edges (stride 1), column j holds place j.
        """
        table = self.table
        found: list[list[int]] = [[] for _ in range(self.positions)]
        for place, output in itertools.product(range(self.places), range(self.outputs)):
            if table[output, place] < self.positions:
                found[table[output, place]].append(place * self.outputs + output)
        width = max(map(len, found))
        return np.array([row + [self.places * self.outputs] * (width - len(row)) for row in found], np.int32)

    @cached_property
    def inverse_by_place(self) -> Indices:
        """Int32 [S, J]: the output whose place j lies on each position; P for none."""
        result = np.full((self.positions, self.places), self.outputs, np.int32)
        for output, place in np.ndindex(*self.table.shape):
            if self.table[output, place] < self.positions:
                result[self.table[output, place], place] = output
        return result

    def _reach(self, axis: int) -> int:
        """From the first to the last place of the window, less one."""
        return self.dilation[axis] * (self.size[axis] - 1)

    def _edge(self, axis: int) -> int:
        """Missing elements before the first position."""
        if self.padding == "valid":
            return 0
        if self.padding == "causal":
            return self._reach(axis)
        wanted = (self.output[axis] - 1) * self.strides[axis] + self._reach(axis) + 1
        return max(wanted - self.spatial[axis], 0) // 2

    def _position(self, corner: Sequence[int], place: Sequence[int]) -> int:
        """The number of a position, or S outside."""
        number = 0
        for axis, length in enumerate(self.spatial):
            at = corner[axis] * self.strides[axis] + place[axis] * self.dilation[axis] - self._edge(axis)
            if not 0 <= at < length:
                return self.positions
            number = number * length + at
        return number


def geometry(layer: object, spatial: Shape, *, size: str) -> Geometry:
    """The geometry of a Keras layer; `size` names its attribute (``kernel_size``, ``pool_size``)."""
    rank = len(spatial)

    def per_axis(value: object) -> Shape:
        return (int(value),) * rank if isinstance(value, int) else tuple(int(n) for n in value)  # type: ignore[attr-defined]

    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise ModelSpecError(f"Layer {layer.name}: data_format must be channels_last.")  # type: ignore[attr-defined]
    return Geometry(
        name=str(layer.name),  # type: ignore[attr-defined]
        spatial=spatial,
        size=per_axis(getattr(layer, size)),
        strides=per_axis(layer.strides),  # type: ignore[attr-defined]
        dilation=per_axis(getattr(layer, "dilation_rate", 1)),
        padding=str(layer.padding),  # type: ignore[attr-defined]
    )


def picked(x: tf.Tensor, indices: Indices, *, fill: float = 0.0) -> tf.Tensor:
    """Rows of x [N, n, C] by constant indices of any shape [...], [N, ..., C]; index n reads `fill`."""
    if indices.max() == x.shape[1]:
        x = tf.pad(x, [[0, 0], [0, 1], [0, 0]], constant_values=fill)
    return tf.gather(x, indices, axis=1)


def windows(x: tf.Tensor, table: Indices) -> tf.Tensor:
    """The windows of x [N, n, C] by a table [P, J], each in one row: [N, P, J·C]."""
    positions, places = table.shape
    # An output of seven axes is one too many for XNNPACK, which therefore leaves the RESHAPE to the runtime, and that
    # does it in place; XNNPACK's copied the windows, a tenth of the whole step (measured on LiteRT 2.3 and 2.14).
    gathered = picked(x, table.reshape(positions, places, 1, 1, 1, 1))
    return tf.reshape(gathered, [-1, positions, places * x.shape[2]])


def image_windows(x: tf.Tensor, window: Geometry) -> tf.Tensor:
    """`windows` of an image in two steps, first pieces of rows and then those pieces: the same result."""
    height, width = window.spatial
    places_down, places_across = window.size
    across = window.output[1]
    lines, columns = _along(window, 1), _along(window, 0)
    starts = np.arange(height)[:, None, None] * width
    pieces = np.where(lines < width, starts + lines, height * width).reshape(-1, places_across)
    joined = windows(x, pieces.astype(np.int32))
    rows = columns[:, None, :] * across + np.arange(across)[None, :, None]
    table = np.where(columns[:, None, :] < height, rows, height * across).reshape(-1, places_down)
    return windows(joined, table.astype(np.int32))


def _along(window: Geometry, axis: int) -> Indices:
    """The table of one axis alone, [outputs, places]."""
    here = slice(axis, axis + 1)
    return Geometry(
        window.name,
        window.spatial[here],
        window.size[here],
        window.strides[here],
        window.dilation[here],
        window.padding,
    ).table


def total(parts: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum of tensors of one shape, as a chain: XNNPACK runs ADD, and ADD_N is left to a slower kernel."""
    return functools.reduce(operator.add, parts)


def flat_positions(x: tf.Tensor, positions: int) -> tf.Tensor:
    """[N, *spatial, C] as [N, S, C]."""
    return x if len(x.shape) == 3 else tf.reshape(x, [-1, positions, x.shape[-1]])
