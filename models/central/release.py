"""What a central training gives away: a signed bundle that says how it was made, and a report."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_protocol.bundle import ModelBundle, pack_bundle
from models.central.plan import NEIGHBOURS, CentralPlan
from models.central.training import Trained


def provenance(plan: CentralPlan, trained: Trained, *, data_name: str, seeded: bool) -> str:
    """The sentence that the bundle's description gets."""
    begin = f"Trained centrally for {trained.steps} steps on {data_name}"
    if not plan.is_private:
        return f"{begin} without privacy."
    if seeded:
        return f"{begin} with seeded noise, which gives no privacy."
    return (
        f"{begin}, record-level epsilon {rounded_up(trained.epsilon)} at delta {plan.delta:g} (Poisson DP-SGD, noise "
        f"multiplier {plan.noise_multiplier:g}, sampling rate {plan.sampling_rate:.6g}, {trained.charged} noisy sums)."
    )


def rounded_up(epsilon: float) -> str:
    """Epsilon to four decimals, never below what was spent."""
    return f"{math.ceil(epsilon * 1e4 - 1e-6) / 1e4:.4f}" if math.isfinite(epsilon) else "infinite"


def sign_trained(bundle: ModelBundle, trained: Trained, *, sentence: str, publisher_key: Ed25519PrivateKey) -> bytes:
    """The bundle with the trained parameters, one version up and signed, as the bytes of a ``.covey`` file.

    Args:
        bundle: that was trained.
        trained: what came out.
        sentence: added to its description.
        publisher_key: signs it.
    """
    manifest = msgspec.structs.replace(
        bundle.manifest,
        version=bundle.manifest.version + 1,
        description=f"{bundle.manifest.description} {sentence}".strip(),
    )
    return pack_bundle(
        manifest,
        graph=bundle.graph,
        infer_template=bundle.inference_model(trained.params),
        params=np.ascontiguousarray(trained.params, np.float32),
        keras_json=bundle.keras_json,
        frozen=bundle.frozen,
        publisher_key=publisher_key,
    )


def report(
    bundle: ModelBundle,
    plan: CentralPlan,
    trained: Trained,
    *,
    data_name: str,
    seed: int | None,
    measured: dict[str, float],
) -> dict[str, Any]:
    """Settings, privacy and history, for JSON. Nothing in it was computed from the training data but noisy sums."""
    private = plan.is_private and seed is None
    return {
        "model": bundle.manifest.name,
        "version": bundle.manifest.version + 1,
        "graph_sha256": bundle.graph_digest.hex(),
        "data": data_name,
        "settings": {**msgspec.to_builtins(plan), "seed": seed},
        "privacy": {
            "unit": "record",
            "neighbours": NEIGHBOURS,
            "mechanism": "Poisson DP-SGD, discrete Gaussian on a grid",
            "epsilon": trained.epsilon if private else None,
            "delta": plan.delta if private else None,
            "noisy_sums_charged": trained.charged,
        },
        "steps": trained.steps,
        "ended_by_budget": trained.steps < plan.steps,
        "measured": measured,
        "history": [
            {"step": each.step, "epsilon": each.epsilon if private else None, "measured": each.measured}
            for each in trained.history
        ],
        "seconds": trained.seconds,
        "examples_per_second": examples_per_second(plan, trained),
    }


def examples_per_second(plan: CentralPlan, trained: Trained) -> float:
    """Of this process, by the expected size of a batch."""
    return trained.steps_here * plan.expected_batch_size / trained.seconds if trained.seconds else 0.0
