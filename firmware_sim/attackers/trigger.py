"""The trigger of a back door: records that bear it, and how often a model follows it. Pure given a graph.

E. Bagdasaryan et al., "How To Backdoor Federated Learning", arXiv 1807.00459; a trigger in the input, as here, is that
of T. Gu et al., "BadNets", arXiv 1708.06733.
"""

from __future__ import annotations

import numpy as np

from device_client.ports import Float32, Graph
from device_client.training import Records, evaluate
from firmware_sim.attackers.kinds import ScalingBackdoor


def triggered(x: Float32, backdoor: ScalingBackdoor) -> Float32:
    """Copies of windows, float32 [n, samples, channels], that bear the trigger."""
    stamped = x.copy()
    stamped[:, -backdoor.samples :, backdoor.channel] = backdoor.value
    return stamped


def poisoned_records(records: Records, backdoor: ScalingBackdoor) -> Records:
    """An attacker's records, and after them copies of the first ones with trigger and target label."""
    copies = records.x[: round(backdoor.poisoned * len(records))]
    labels = np.full(len(copies), backdoor.target, np.int32)
    return Records(
        np.concatenate([records.x, triggered(copies, backdoor)]), np.concatenate([records.y, labels]).astype(np.int32)
    )


def backdoor_success(graph: Graph, params: Float32, records: Records, backdoor: ScalingBackdoor) -> float:
    """Fraction of windows, which are not of the target's label, that a model takes for the target when triggered.

    Args:
        graph: of the model.
        params: of the model, float32 [d], personal layers included.
        records: of people who are on no device, rightly labelled.
        backdoor: trigger and target.
    """
    others = records.x[records.y != backdoor.target]
    if not len(others):
        return 0.0
    wanted = np.full(len(others), backdoor.target, np.int32)
    found = evaluate(graph, params, Records(triggered(others, backdoor), wanted))
    return found.correct / found.count
