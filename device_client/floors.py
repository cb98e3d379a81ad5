"""The least privacy the wearer accepts, whatever a signed manifest says. Pure; runs on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fl_protocol.errors import ProtocolError
from fl_protocol.messages import RoundManifestMsg, TrainingPlanMsg
from fl_protocol.secagg.messages import SecureTermsMsg
from fl_protocol.secagg.terms import fixed_point_of, helper_keys


class FloorsError(ProtocolError):
    """A manifest asks for less privacy than the wearer accepts."""


@dataclass(frozen=True)
class Floors:
    """See the module docstring.

    Args:
        minimum_noise_multiplier: least noise per step.
        minimum_cohort: fewest devices an update may be combined with.
        maximum_l2_norm_clip: largest bound on one record's gradient. Evaluation and statistics have no gradients, and
            their bound follows from what is asked; what protects there is the noise relative to it.
        maximum_local_steps: most noisy gradient steps of one round.
        minimum_helpers: helpers that have to work together, with the aggregator, to see a single update. Above 0
            updates are sent masked or not at all.
        minimum_operators: different operators among them.
        minimum_sum_noise_multiplier: least noise in the sum of the smallest cohort, as standard deviation over what one
            whole update can change: the shares of the others in it, or one helper's noise, since one is assumed to be
            honest.
    """

    minimum_noise_multiplier: float = 0.0
    minimum_cohort: int = 1
    maximum_l2_norm_clip: float = math.inf
    maximum_local_steps: float = math.inf
    minimum_helpers: int = 0
    minimum_operators: int = 0
    minimum_sum_noise_multiplier: float = 0.0

    def check(self, manifest: RoundManifestMsg) -> None:
        """Accept an open round's manifest.

        Raises:
            FloorsError: it asks for weaker noise, a smaller cohort, a larger clip, more steps, or fewer helpers.
        """
        self._check_engine(manifest)
        plan = manifest.plan
        if plan.noise_multiplier < self.minimum_noise_multiplier:
            raise FloorsError(
                f"noise_multiplier {plan.noise_multiplier:g} is below the wearer's floor "
                f"{self.minimum_noise_multiplier:g}"
            )
        if manifest.minimum_cohort < self.minimum_cohort:
            raise FloorsError(
                f"minimum_cohort {manifest.minimum_cohort} is below the wearer's floor {self.minimum_cohort}"
            )
        if not isinstance(plan, TrainingPlanMsg):
            return
        if plan.l2_norm_clip > self.maximum_l2_norm_clip:
            raise FloorsError(
                f"l2_norm_clip {plan.l2_norm_clip:g} is above the wearer's limit {self.maximum_l2_norm_clip:g}"
            )
        if plan.local_steps > self.maximum_local_steps:
            raise FloorsError(
                f"local_steps {plan.local_steps} is above the wearer's limit {self.maximum_local_steps:g}"
            )

    def _check_engine(self, manifest: RoundManifestMsg) -> None:
        """What protects a single update from the aggregator. Raises FloorsError."""
        keys = helper_keys(manifest.secure).values() if manifest.secure is not None else []
        if len(keys) < self.minimum_helpers:
            raise FloorsError(f"{len(keys)} helpers are below the wearer's floor {self.minimum_helpers}")
        operators = len({key.operator for key in keys})
        if operators < self.minimum_operators:
            raise FloorsError(f"{operators} operators of helpers are below the wearer's floor {self.minimum_operators}")
        noise = 0.0 if manifest.secure is None else _sum_noise_multiplier(manifest, manifest.secure)
        if noise < self.minimum_sum_noise_multiplier:
            raise FloorsError(
                f"the sum's noise multiplier {noise:.4g} is below the wearer's floor "
                f"{self.minimum_sum_noise_multiplier:g}"
            )


def _sum_noise_multiplier(manifest: RoundManifestMsg, terms: SecureTermsMsg) -> float:
    """Noise in the sum of the smallest cohort over what one update can change in it.

    As the accounts count it: others' shares, or one helper's noise, whichever is more.
    """
    shares = (manifest.minimum_cohort - 1) * terms.device_noise_variance
    variance = max(shares, terms.helper_noise_sigma**2)
    return math.sqrt(variance) / fixed_point_of(terms, manifest.update_length).norm_bound
