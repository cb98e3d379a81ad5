"""Features of a motion window that need no statistic of anybody's recordings.

Posture (means), how much and how fast each channel moves (logarithms of deviation and rate), and how the channels
follow one another (correlation of every channel with every other one, a fifth of a second before). The vector has
length 1, so the gradient of a linear layer on it is bounded by the error of the prediction alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tensorflow as tf

from models.errors import ModelSpecError
from models.layers.fixed import FixedStage, register_fixed


@register_fixed
class MotionFeatures(FixedStage):
    """From [N, samples, 6] (3 × g, 3 × rad/s) to [N, 54]; every constant is a unit, a round number or a sampling fact.

    Which round numbers was decided by comparing accuracy on people held out, as any hyper-parameter is.

    Args:
        sampling_rate_hz: of the window.
        rotation_unit: rad/s that count as much as 1 g; one turn per second.
        stillness: units; movement below it is treated as rest.
        reference: units; the movement whose logarithm is zero.
        rate_time_s: the rate is expressed as change per this time.
        lag: samples between a channel and the ones it is correlated with.
    """

    def __init__(
        self,
        *,
        sampling_rate_hz: float = 50.0,
        rotation_unit: float = 2 * math.pi,
        stillness: float = 0.05,
        reference: float = 0.3,
        rate_time_s: float = 0.1,
        lag: int = 10,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self._constants = {
            "sampling_rate_hz": sampling_rate_hz,
            "rotation_unit": rotation_unit,
            "stillness": stillness,
            "reference": reference,
            "rate_time_s": rate_time_s,
        }
        self._rotation_unit, self._stillness, self._reference = rotation_unit, stillness, reference
        self._samples_per_rate, self._lag = rate_time_s * sampling_rate_hz, lag

    @property
    def description(self) -> str:
        """What it computes, for the manifest."""
        return (
            f"54 features of the window, unit L2 norm: per channel (rotation / {self._rotation_unit:g} rad/s) the "
            f"mean, the log deviation and the log rate of change, and the 6x6 correlations at a lag of {self._lag} "
            "samples. Windows of the other wrist must be mirrored by the host: ax, wy and wz change sign."
        )

    def build(self, input_shape: Any) -> None:
        """Six channels, and more samples than the lag."""
        if len(input_shape) != 3 or input_shape[1] <= self._lag or input_shape[2] != 6:
            raise ModelSpecError(
                f"Layer {self.name}: MotionFeatures expected (more than {self._lag} samples, 6), "
                f"got {tuple(input_shape)[1:]}."
            )
        super().build(input_shape)

    def get_config(self) -> dict[str, Any]:
        """The constants, so that a bundle's Keras model can be read back."""
        return {**super().get_config(), **self._constants, "lag": self._lag}

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Features [N, 54] of [N, samples, 6]."""
        motion = x * np.array([1.0] * 3 + [1.0 / self._rotation_unit] * 3, np.float32)
        mean = tf.reduce_mean(motion, 1, keepdims=True)
        deviation = motion - mean
        spread = tf.sqrt(tf.reduce_mean(deviation * deviation, 1, keepdims=True) + self._stillness**2)
        rate = self._rate(motion)
        # Reshaped by -1, not squeezed: the converter keeps the -1, so that inference takes any number of windows.
        features = tf.concat(
            [
                tf.reshape(mean, [-1, 6]),
                tf.reshape(tf.math.log(spread / self._reference), [-1, 6]),
                tf.math.log((rate + self._stillness) / self._reference),
                self._lagged_correlation(deviation / spread),
            ],
            1,
        )
        # A watch at rest has features too (its logarithms), so the length is never near zero.
        return features / tf.sqrt(tf.reduce_sum(features * features, 1, keepdims=True) + 1e-9)

    def _rate(self, motion: tf.Tensor) -> tf.Tensor:
        """The mean absolute change of each channel per `rate_time_s`, [B, 6]."""
        steps = motion.shape[1] - 1
        later, earlier = tf.split(motion, [1, steps], 1)[1], tf.split(motion, [steps, 1], 1)[0]
        # The absolute value as a maximum: ABS of tflite-runtime 2.14 takes 20 ns per element outside XNNPACK.
        change = tf.maximum(later - earlier, earlier - later)
        return tf.reduce_mean(change, 1) * self._samples_per_rate

    def _lagged_correlation(self, z: tf.Tensor) -> tf.Tensor:
        """Σₜ zᵢ[t]·zⱼ[t − lag] / samples of every pair of channels, [B, 36]."""
        samples = z.shape[1]
        overlap = samples - self._lag
        now, before = tf.split(z, [self._lag, overlap], 1)[1], tf.split(z, [overlap, self._lag], 1)[0]
        return tf.reshape(tf.matmul(now, before, transpose_a=True), [-1, 36]) / float(samples)
