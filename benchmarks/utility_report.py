"""From trainings to the report, its table in Markdown and its picture. Pure but for the picture's file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.utility_mechanisms import Arm, Central, Secure, noise_over
from benchmarks.utility_training import DELTA, THOUSAND, Job, LevelName, Outcome, mechanism_of
from benchmarks.utility_tuning import FOLDS, Fold
from firmware_sim.watch_data import LABELS

ARMS: tuple[Arm, ...] = ("local", "secure", "central")
ASKED_POINTS = 2.0
WRISTS_THAT_TRAIN = 16
DESCRIBED: dict[LevelName, str] = {
    "record": "record level, 16 wrists of 8 people",
    "device_ten": "device level, 16 wrists of 8 people: too few to hide one among them",
    "device_thousand": "device level, 1,000 synthetic persons",
}
Key = tuple[LevelName, float, Arm, Fold, int]


@dataclass(frozen=True)
class Found:
    """What was trained.

    Args:
        private: by level, epsilon, arm, fold and repetition.
        noiseless: by level and fold.
    """

    private: dict[Key, tuple[Job, Outcome]]
    noiseless: dict[tuple[LevelName, Fold], Outcome]

    def points(self, level: LevelName, epsilon: float, arm: Arm, fold: Fold) -> list[float]:
        """Accuracy in per cent on the people of a fold, by repetition."""
        return [
            100 * outcome.accuracy(fold)
            for (*row, _), (_, outcome) in self.private.items()
            if row == [level, epsilon, arm, fold]
        ]


def reported(found: Found, *, levels: Sequence[LevelName], epsilons: Sequence[float]) -> dict[str, Any]:
    """All figures."""
    rows = {level: {f"{epsilon:g}": _row(found, level, epsilon) for epsilon in epsilons} for level in levels}
    differences = {
        level: {epsilon: row["central_minus_secure"] for epsilon, row in by_epsilon.items()}
        for level, by_epsilon in rows.items()
    }
    largest = max(one["points"] for by_epsilon in differences.values() for one in by_epsilon.values())
    return {
        "central_minus_secure_points": largest,
        "asked_points": ASKED_POINTS,
        "central_minus_secure_points_by_row": differences,
        "accuracy_percent": rows,
        "without_noise_percent": {
            level: round(statistics.mean(100 * found.noiseless[level, fold].accuracy(fold) for fold in FOLDS), 2)
            for level in levels
        },
        "chance_percent": round(100 / len(LABELS), 2),
        "delta": {level: DELTA[level] for level in levels},
        "folds": [list(fold) for fold in FOLDS],
    }


def paired_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Mean of first minus second over folds and repetitions, and its standard error from the repetitions.

    Args:
        first: accuracies of each fold, by repetition. The folds are fixed: what differs between the people of one and
            another is no error of the difference on these people.
        second: the same of the other arm.
    """
    by_fold = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(first, second, strict=True)]
    points = round(statistics.mean(statistics.mean(fold) for fold in by_fold), 2)
    if len(by_fold[0]) == 1:
        return {"points": points, "standard_error": None}
    squared_error = sum(statistics.variance(fold) / len(fold) for fold in by_fold)
    return {"points": points, "standard_error": round(math.sqrt(squared_error) / len(by_fold), 2)}


def _row(found: Found, level: LevelName, epsilon: float) -> dict[str, Any]:
    """The three arms at one level and epsilon."""
    points = {arm: [found.points(level, epsilon, arm, fold) for fold in FOLDS] for arm in ARMS}
    return {
        **{arm: _arm(found, level, epsilon, arm, points[arm]) for arm in ARMS},
        "noise_of_secure_over_central": round(max(_noise_over(found, level, epsilon, fold) for fold in FOLDS), 3),
        "central_minus_secure": paired_difference(points["central"], points["secure"]),
    }


def _noise_over(found: Found, level: LevelName, epsilon: float, fold: Fold) -> float:
    """How much more noise the settings of a fold take when devices share it out."""
    devices = THOUSAND if level == "device_thousand" else WRISTS_THAT_TRAIN
    secure, central = (
        mechanism_of(found.private[level, epsilon, arm, fold, 0][0], devices=devices) for arm in ("secure", "central")
    )
    if not (isinstance(secure, Secure) and isinstance(central, Central)):
        raise TypeError(f"expected the two mechanisms, got {secure} and {central}")
    return noise_over(secure, central, devices=devices)


def _arm(found: Found, level: LevelName, epsilon: float, arm: Arm, points: list[list[float]]) -> dict[str, Any]:
    """One arm: mean, how much one run's mean over the folds differs from another's, folds, settings, epsilon."""
    of_runs = [statistics.mean(run) for run in zip(*points, strict=True)]
    jobs = {key[3]: entry for key, entry in found.private.items() if key[:3] == (level, epsilon, arm)}
    return {
        "mean": round(statistics.mean(of_runs), 2),
        "standard_deviation_of_runs": round(statistics.stdev(of_runs), 2) if len(of_runs) > 1 else None,
        "repetitions": len(of_runs),
        "folds": {_named(fold): round(statistics.mean(one), 1) for fold, one in zip(FOLDS, points, strict=True)},
        "epsilon": max(outcome.epsilon or math.inf for _, outcome in jobs.values()),
        "settings": {_named(fold): vars(job.settings) for fold, (job, _) in jobs.items()},
    }


def _named(fold: Fold) -> str:
    return ",".join(map(str, fold))


def as_text(report: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "| | ε | local | secure | central | central − secure | noise of secure over central's |",
        "|---|---|---|---|---|---|---|",
    ]
    for level, by_epsilon in report["accuracy_percent"].items():
        for epsilon, row in by_epsilon.items():
            cells = [f"{row[arm]['mean']:.1f} ± {row[arm]['standard_deviation_of_runs'] or 0:.1f}" for arm in ARMS]
            gap = row["central_minus_secure"]
            cells.append(f"{gap['points']:+.2f} ± {gap['standard_error'] or 0:.2f}")
            cells.append(f"{row['noise_of_secure_over_central']:.3f}")
            what = f"{DESCRIBED[level]}, δ = {_power(report['delta'][level])}"
            lines.append(f"| {what} | {epsilon} | {' | '.join(cells)} |")
        lines.append(f"| the same without noise | | | | {report['without_noise_percent'][level]:.1f} | | |")
    return "\n".join(
        [*lines, "", f"largest: {report['central_minus_secure_points']:.2f} points, asked {report['asked_points']:g}"]
    )


def _power(delta: float) -> str:
    """1e-5, not 1e-05."""
    return f"{delta:g}".replace("e-0", "e-")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw accuracy against epsilon, a panel for each level, into an image file."""
    import matplotlib as mpl  # noqa: PLC0415 - only for those who draw

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    levels = report["accuracy_percent"]
    figure, panels = plt.subplots(
        1, len(levels), figsize=(1.2 + 3.2 * len(levels), 3.6), sharey=True, layout="constrained", squeeze=False
    )
    colours = {"local": "#d62728", "secure": "#1f77b4", "central": "#9fd49f"}
    for axes, (level, by_epsilon) in zip(panels[0], levels.items(), strict=True):
        # Central first and broad, so that secure shows on top of it.
        for shift, arm, width in ((1.03, "central", 4.0), (0.97, "secure", 1.4), (1.0, "local", 1.4)):
            at = [float(epsilon) * shift for epsilon in by_epsilon]
            means = [row[arm]["mean"] for row in by_epsilon.values()]
            spread = [row[arm]["standard_deviation_of_runs"] or 0 for row in by_epsilon.values()]
            axes.errorbar(at, means, spread, color=colours[arm], lw=width, elinewidth=1.4, marker="o", ms=4, capsize=3)
        axes.axhline(report["without_noise_percent"][level], color="black", linewidth=0.8, linestyle="--")
        axes.axhline(report["chance_percent"], color="black", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks([float(epsilon) for epsilon in by_epsilon], list(by_epsilon))
        axes.minorticks_off()
        axes.set_title(DESCRIBED[level].split(":")[0].replace(", ", "\n"), fontsize=10)
        axes.set_xlabel(f"ε at δ = {_power(report['delta'][level])}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylim(0, 100)
    panels[0][0].set_ylabel("accuracy on unseen people, per cent")
    lines = [plt.Line2D([], [], color=colours[arm], marker="o", ms=4, label=arm) for arm in ARMS]
    panels[0][-1].legend(handles=lines, frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.35))
    figure.supxlabel("Dashed: without noise; dotted: chance; bars: standard deviation from run to run", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
