"""Whether noise that devices share out among them carries a claim for single records, and how much it is then. Pure.

It does where a device sends one clipped-gradient sum a round and nothing else: adding or removing a record then moves
the sum by one clipped gradient (distributed DP-SGD: P. Kairouz, Z. Liu, T. Steinke, arXiv 2102.06387, section 5). With
several local steps a record moves every later step as well, through the parameters, and what one device sends is
bounded only as a whole: then each device's own noise has to carry the claim, step by step, as `device_client` does.
"""

from __future__ import annotations

import math

import numpy as np

from aggregator.privacy.accounting import counted_mechanisms
from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.events import SecureSum
from aggregator.privacy.mechanisms import Mechanism
from fl_protocol.errors import LocalMisuseError
from fl_protocol.plans import TrainingPlanMsg
from fl_protocol.renyi import INTEGER_ORDERS
from fl_protocol.secagg.fixed_point import FixedPoint

_ALL_INTEGERS = range(2, INTEGER_ORDERS[-1] + 1)


def record_level_noise(
    plan: TrainingPlanMsg, event: SecureSum, *, fixed_point: FixedPoint, personal_parameters: int, adversary: Adversary
) -> float:
    """The noise multiplier that a record may be accounted with, as if the sum had Gaussian noise; 0 without any.

    A record moves the update by `record_sensitivity`; scaling it to the clip, which is a projection, does not move it
    further, nor does a rotation. Rounding goes to a neighbouring integer, so it moves each coordinate by less than 2.
    The result is what the noise that counts is worth at every integer order, so it may be sampled, too: by the
    device's own secret draw of records (`PoissonSampled` says why).

    Args:
        plan: what devices compute.
        event: the sum that was released.
        fixed_point: how updates became integers.
        personal_parameters: of the model, that devices keep to themselves.
        adversary: who looks; not `amplified`, which is about devices.

    Raises:
        LocalMisuseError: shared noise carries no claim for records under this plan.
    """
    _require_one_sum(plan, personal_parameters)
    if adversary.amplified:
        raise LocalMisuseError(
            "adversary: expected one that is not amplified, since that is about devices, not records"
        )
    l2 = min(record_sensitivity(plan) / fixed_point.step + 2 * math.sqrt(event.dimension), 2 * event.l2_sensitivity)
    l1 = min(math.sqrt(event.dimension) * l2, l2 * l2)
    return max((_worth(kind) for kind in counted_mechanisms(adversary.counted(event), l2, l1)), default=0.0)


def record_sensitivity(plan: TrainingPlanMsg) -> float:
    """How far one record moves an update of one step, L2: learning rate times clip over the public divisor."""
    return plan.learning_rate * plan.l2_norm_clip / plan.expected_batch_size


def _require_one_sum(plan: TrainingPlanMsg, personal_parameters: int) -> None:
    """Raise unless an update is one clipped-gradient sum, times a constant."""
    if plan.local_steps != 1:
        raise LocalMisuseError(
            f"local_steps: expected 1 for a record-level claim from shared noise, got {plan.local_steps}: with several "
            "steps a record moves every later one, so each device's own noise has to carry the claim; set "
            "noise_multiplier for each device alone, or local_steps = 1"
        )
    if plan.control_variates or personal_parameters:
        raise LocalMisuseError(
            "expected neither control variates nor personal layers for a record-level claim from shared noise, got "
            f"control_variates = {plan.control_variates} and {personal_parameters} personal parameters: what a device "
            "keeps brings earlier rounds' records into its update; set noise_multiplier for each device alone"
        )


def _worth(kind: Mechanism) -> float:
    """The largest z with α / 2z² no less than a cost at every integer order."""
    rdp = kind.rdp(_ALL_INTEGERS)
    return float(np.sqrt((np.arange(2, INTEGER_ORDERS[-1] + 1) / (2 * rdp)).min()))
