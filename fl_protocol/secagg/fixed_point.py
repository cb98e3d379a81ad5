"""Updates as integers modulo 2^b, whose sum is the sum of the updates as long as nothing overflows: which nothing can.

An update is clipped, rotated if the round says so (`fl_protocol.encoding.rotation`), divided by the grid step and
rounded up or down at random, so that its mean is kept. Rounding could lengthen it, and with that what one device can
change in the sum; so it is repeated until the norm is within a bound that holds for a third of all tries and more
(P. Kairouz, Z. Liu, T. Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", ICML 2021, arXiv 2102.06387, section 2.4 and proposition 22, with beta = exp(-1/2)). The number of bits
follows from how many updates are added, from the largest coordinate of each and from the largest noise.

With a clip bit the vector is one longer: its last coordinate is +m for an update that was no longer than the clip, and
-m for a longer one, so that the sum tells, with its noise, how many were (G. Andrew et al., "Differentially Private
Learning with Adaptive Clipping", NeurIPS 2021, arXiv 1905.03871). Update and bit have one sensitivity together. Pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_protocol.encoding.rotation import rotate, rotate_back
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.integer_noise import Entropy
from fl_protocol.squared_norm import squared_norm

LEAST_BITS, MOST_BITS = 12, 32
_FINEST = 2.0**MOST_BITS
_MOST_TRIES = 1000
"""Of a rounding that succeeds at least every third time: what fails so often has no random source."""
_SLACK = 2.0**-30
_BLOCK = 8192  # numbers that stay in the processor's cache from one operation to the next


@dataclass(frozen=True)
class FixedPoint:
    """How the updates of one round become integers.

    Args:
        length: numbers in an update, d.
        l2_norm_clip: C; a longer update is scaled down to it.
        step: of the grid, in the update's unit.
        most_updates: n, that are ever added up.
        noise_bound: largest magnitude of all noise in one coordinate of the sum, in grid steps.
        rotates: whether updates are rotated, which spreads large coordinates over all.
        bits: b, of the modulus 2^b; 0 for the least that holds every sum.
        clip_bit: m, grid steps of the clip bit; 0 for none.

    Raises:
        LocalMisuseError: a value is out of range, or the sum does not fit the bits, or 32 of them.
    """

    length: int
    l2_norm_clip: float
    step: float
    most_updates: int
    noise_bound: int = 0
    rotates: bool = False
    bits: int = 0
    clip_bit: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.most_updates < 1 or self.noise_bound < 0 or self.clip_bit < 0:
            raise LocalMisuseError(
                "expected length and most_updates of at least 1 and noise_bound and clip_bit of at least 0, got "
                f"{self.length}, {self.most_updates}, {self.noise_bound} and {self.clip_bit}"
            )
        if not (0 < self.step < math.inf and self.step <= self.l2_norm_clip < math.inf):
            raise LocalMisuseError(f"expected 0 < step <= l2_norm_clip < inf, got {self.step} and {self.l2_norm_clip}")
        if not self.l2_norm_clip / self.step <= _FINEST:  # which may be infinite, and no integer then
            raise LocalMisuseError(
                f"a clip of {self.l2_norm_clip} is more than 2^{MOST_BITS} steps of {self.step}; take a larger step"
            )
        least = max(LEAST_BITS, self.sum_bound.bit_length() + 1)
        bits = self.bits or least
        if not least <= bits <= MOST_BITS:
            raise LocalMisuseError(
                f"the sum of {self.most_updates} updates reaches {self.sum_bound} grid steps, which takes {least} bits "
                f"of {MOST_BITS}, and {bits} were given; take a larger step, or fewer updates"
            )
        object.__setattr__(self, "bits", bits)

    @property
    def vector_length(self) -> int:
        """Numbers in what is masked and added up: the update's, and the clip bit."""
        return self.length + (self.clip_bit > 0)

    @property
    def norm_bound(self) -> float:
        """Largest L2 norm of one vector, in grid steps: what accounting takes for its sensitivity."""
        return math.hypot(self.update_norm_bound, self.clip_bit)

    @property
    def update_norm_bound(self) -> float:
        """Largest L2 norm of one update after rounding, in grid steps."""
        clip, root = self.l2_norm_clip / self.step, math.sqrt(self.length)
        return min(clip + root, math.sqrt(clip * clip + self.length / 4 + clip + root / 2))

    @property
    def coordinate_bound(self) -> int:
        """Largest magnitude of one coordinate of one vector, in grid steps."""
        return max(self._update_coordinate_bound, self.clip_bit)

    @property
    def _update_coordinate_bound(self) -> int:
        """Largest magnitude of one coordinate of one update, in grid steps."""
        return min(math.floor(self.update_norm_bound), math.ceil(self.l2_norm_clip / self.step) + 1)

    @property
    def sum_bound(self) -> int:
        """Largest magnitude of one coordinate of the sum, noise included, in grid steps."""
        return self.most_updates * self.coordinate_bound + self.noise_bound

    def encode(self, values: NDArray[np.float32], *, rotation_seed: bytes, entropy: Entropy) -> NDArray[np.int64]:
        """An update in grid steps, int64 [vector_length]; runs at the device, before noise and masks are added.

        Args:
            values: float32 [d], finite.
            rotation_seed: public, the same for all devices of a round.
            entropy: for rounding.

        Raises:
            LocalMisuseError: wrong length, or not finite.
        """
        if values.shape != (self.length,) or values.dtype != np.float32 or not np.isfinite(values).all():
            raise LocalMisuseError(
                f"values: expected {self.length} finite float32 numbers, got {values.dtype} {values.shape}"
            )
        shrunk = self._clip_factor(values)
        if self.rotates:
            # In float32, on every machine the same bits; what that adds to the norm is taken away again.
            rotated = rotate(values * np.float32(shrunk), rotation_seed)
            integers = self._rounded(rotated, self._clip_factor(rotated) / self.step, entropy)
        else:
            integers = self._rounded(values, shrunk / self.step, entropy)
        if not self.clip_bit:
            return integers
        return np.append(integers, self.clip_bit if shrunk == 1 else -self.clip_bit)

    def decode(
        self,
        total: NDArray[np.unsignedinteger[Any]],
        *,
        count: int,
        rotation_seed: bytes,
        noise: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """The sum of updates, float64 [vector_length], from its residues; runs at the aggregator.

        With a clip bit the last number is how many updates were no longer than the clip less how many were longer.

        A wrong mask, or a vector that no device should have sent, is uniform noise modulo 2^b, and far longer than what
        updates add up to. What is short enough passes, whatever it is.

        Args:
            total: modulo 2^b, unsigned [vector_length].
            count: how many updates.
            rotation_seed: as in `encode`.
            noise: of the aggregator's own, int64 [vector_length] in grid steps: added while the sum is on the grid.

        Raises:
            ProtocolError: so many updates cannot add up to this.
        """
        signed = total.astype(np.int64)
        signed[signed >= 1 << (self.bits - 1)] -= 1 << self.bits
        largest, norm = int(np.abs(signed).max()), float(np.linalg.norm(signed.astype(np.float64)))
        most, longest = count * self.coordinate_bound + self.noise_bound, self._longest_sum(count)
        if largest > most or norm > longest:
            raise ProtocolError(
                f"{count} updates add up to at most {most} grid steps in a coordinate and {longest:.4g} in all; got "
                f"{largest} and {norm:.4g}"
            )
        if noise is not None:
            signed += noise
        summed: NDArray[np.float64] = signed * self.step
        if self.clip_bit:
            summed[-1] = signed[-1] / self.clip_bit
        if self.rotates:
            # One power of two for all, so that float32 has room; the rotation is linear.
            scale = 2.0 ** -math.ceil(math.log2(self.sum_bound * self.step))
            rotated = (summed[: self.length] * scale).astype(np.float32)
            summed[: self.length] = rotate_back(rotated, rotation_seed).astype(np.float64) / scale
        return summed

    def _longest_sum(self, count: int) -> float:
        """Largest L2 norm of the sum of so many updates with all noise, in grid steps."""
        return count * self.norm_bound + self.noise_bound * math.sqrt(self.vector_length)

    def _clip_factor(self, values: NDArray[np.float32]) -> float:
        """By what a vector is multiplied to be no longer than the clip."""
        norm = math.sqrt(squared_norm(values.astype(np.float64)))
        return 1.0 if norm <= self.l2_norm_clip else self.l2_norm_clip / norm

    def _rounded(self, values: NDArray[np.float32], factor: float, entropy: Entropy) -> NDArray[np.int64]:
        """Each number times a factor, rounded up or down at random, until all together are short enough."""
        # float64 adds up squares to within far less than this.
        limit = self.update_norm_bound**2 * (1 - _SLACK)
        for _ in range(_MOST_TRIES):
            rounded, squared, largest = _rounded_at_random(values, factor, entropy)
            # The clip's own rounding error could take a coordinate beyond its bound.
            if squared <= limit and largest <= self._update_coordinate_bound:
                return rounded
        raise LocalMisuseError(f"no rounding of {_MOST_TRIES} was short enough: the source of randomness is broken")


def _rounded_at_random(
    values: NDArray[np.float32], factor: float, entropy: Entropy
) -> tuple[NDArray[np.int64], float, float]:
    """Integers, int64 [d], their sum of squares and the largest magnitude.

    Each is the floor of a number times the factor, plus a uniform one of 16 bits; a bias of at most 2^-17 is left.
    """
    draws = np.frombuffer(entropy(2 * len(values)), "<u2")
    rounded, squared, largest = np.empty(len(values), np.int64), 0.0, 0.0
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].astype(np.float64)
        block *= factor
        block += draws[start : start + _BLOCK] * 2.0**-16
        np.floor(block, out=block)
        squared += float(np.dot(block, block))
        largest = max(largest, float(block.max()), -float(block.min()))
        rounded[start : start + _BLOCK] = block
    return rounded, squared, largest
