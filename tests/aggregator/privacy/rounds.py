"""Rounds for tests of accounting: as they may have happened, with what was said left as it is by default."""

from __future__ import annotations

from typing import Any

from aggregator.privacy.adversaries import Adversary
from aggregator.privacy.events import HelperNoise, OpenSum, Participation, SecureSum, SkellamShares

AGGREGATOR = Adversary(name="aggregator")
MODEL_RELEASE = Adversary(name="model_release")
SAMPLED = Adversary(name="model_release", amplified=True)
HOUR_S = 3600.0


def secure(number: int = 1, **changes: Any) -> SecureSum:
    """A round of an hour, one after the other, with 101 devices whose shares have a variance of 100."""
    about: dict[str, Any] = {
        "round": number,
        "opened_s": number * HOUR_S,
        "closed_s": (number + 1) * HOUR_S,
        "l2_sensitivity": 10.0,
        "dimension": 50,
        "shares": SkellamShares(100.0, 101),
    }
    return SecureSum(**{**about, **changes})


def central(number: int = 1, sigma: float = 80.0, **changes: Any) -> SecureSum:
    """A round whose only noise is the aggregator's."""
    return secure(number, shares=None, central_sigma=sigma, **changes)


def helped(number: int = 1, *sigmas: float, **changes: Any) -> SecureSum:
    """A round in which helpers add noise, and nobody else."""
    helpers = tuple(HelperNoise(f"helper-{index}", sigma) for index, sigma in enumerate(sigmas))
    return secure(number, **{"shares": None, "helpers": helpers, **changes})


def tossed(event: SecureSum | OpenSum, p: float) -> Any:
    """The round with secret coins."""
    return type(event)(**{**vars(event), "participation": Participation(p, secret_coin=True)})
