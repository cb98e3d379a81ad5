"""``[[attacker]]`` tables as structs, as strictly as ``[[fault]]`` tables. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from firmware_sim.attackers.kinds import KINDS, Attacker, LabelFlip, ScalingBackdoor
from firmware_sim.errors import SettingsError
from firmware_sim.faults.parsing import parse_table
from fl_protocol.model_manifest import BundleManifest


def parse_attackers(tables: Sequence[Mapping[str, Any]]) -> tuple[Attacker, ...]:
    """All attackers of a scenario.

    Args:
        tables: its ``[[attacker]]`` tables, as TOML gives them.

    Raises:
        SettingsError: a table is not an attacker; it says which one, the key, the value, and what is allowed.
    """
    return tuple(
        parse_table(table, KINDS, where=f"[[attacker]] number {number}") for number, table in enumerate(tables, 1)
    )


def require_possible(attackers: Sequence[Attacker], manifest: BundleManifest) -> None:
    """Refuse attackers that name labels or samples which a model has not.

    Raises:
        SettingsError: the text names the key, the value and what is allowed.
    """
    labels, shape = len(manifest.label.names), manifest.input.shape
    for one in attackers:
        if isinstance(one, LabelFlip) and one.permutation is not None and len(one.permutation) != labels:
            raise SettingsError(
                f"[[attacker]] (label_flip): permutation: expected the {labels} labels of the model, "
                f"got {list(one.permutation)}"
            )
        if isinstance(one, ScalingBackdoor):
            if len(shape) != 2:
                raise SettingsError(
                    f"[[attacker]] (scaling_backdoor): expected a model for windows [samples, "
                    f"channels], this one takes {shape}"
                )
            for key, below in (("target", labels), ("channel", shape[1]), ("samples", shape[0] + 1)):
                if getattr(one, key) >= below:
                    raise SettingsError(
                        f"[[attacker]] (scaling_backdoor): {key}: expected at most {below - 1} with this model, "
                        f"got {getattr(one, key)}"
                    )
