"""Whether this device could carry out a round at all: asked before its coin, so that nothing is charged for nothing.

Pure. A plan may be well-formed and within the wearer's floors, and yet its noise has no place on the grid, or its
recipient key cannot be sealed to; found only after the charge, such a plan would spend the budget and release nothing.
Whether training diverges is not asked: that is known only by training.
"""

from __future__ import annotations

from device_client.noise import NoisyGrid
from device_client.record_sums import channels_problem
from fl_protocol.errors import LocalMisuseError, ProtocolError
from fl_protocol.limits import MAX_PARAMETERS
from fl_protocol.messages import RoundManifestMsg, TrainingPlanMsg
from fl_protocol.sealing import check_recipient
from fl_protocol.secagg.terms import helper_keys, secure_round
from fl_protocol.update_encoding import usable_encoding

_WIDEST_SIGMA = 2.0**40
"""In grid steps: as far as the noise is sampled (see `noise.discrete_gaussian`)."""


class InfeasibleError(ProtocolError):
    """No device could carry out what a signed manifest asks for."""


def check_feasible(manifest: RoundManifestMsg, *, input_shape: tuple[int, ...] | None = None) -> None:
    """Accept an open round's manifest whose noise can be sampled and whose recipient can be sealed to.

    Args:
        manifest: verified.
        input_shape: of one recorded window, channels last; None if that is not known.

    Raises:
        InfeasibleError: the clip or the noise is outside what can be computed, a key is unusable or a sum could
            overflow, a feature is of a channel that the recordings do not have, or no encoding is named that the plan
            allows.
    """
    plan = manifest.plan
    if input_shape is not None and (problem := channels_problem(plan, input_shape)):
        raise InfeasibleError(f"the plan cannot be carried out: {problem}")
    if usable_encoding(manifest) is None:
        raise InfeasibleError(
            f"the plan cannot be carried out: its updates cannot be sent as {' or '.join(manifest.encodings)}, and the "
            "round names no other encoding"
        )
    # Personal layers share the grid and make it finer: the widest noise is that of the largest model there may be.
    lengths = (manifest.update_length, MAX_PARAMETERS if isinstance(plan, TrainingPlanMsg) else manifest.update_length)
    try:
        least, most = (NoisyGrid(plan.l2_norm_clip, plan.noise_multiplier, length).sigma for length in lengths)
    except LocalMisuseError as error:
        raise InfeasibleError(f"the plan cannot be carried out: {error}") from error
    if plan.noise_multiplier and not (least >= 1 and most <= _WIDEST_SIGMA):
        raise InfeasibleError(
            f"the plan cannot be carried out: noise_multiplier {plan.noise_multiplier:g} asks for noise of "
            f"{least:.3g} to {most:.3g} grid steps, and 1 to 2^40 can be sampled"
        )
    try:
        if manifest.recipient is not None:  # an open round's manifest always names one
            check_recipient(manifest.recipient)
        if manifest.secure is not None:
            for key in helper_keys(manifest.secure).values():
                check_recipient(key.recipient)
            secure_round(manifest)
    except ProtocolError as error:
        raise InfeasibleError(f"no update could be sealed: {error}") from error
