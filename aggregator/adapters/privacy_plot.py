"""A noise plan as a picture (matplotlib, which is imported only here and only to draw)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from aggregator.errors import AggregatorError
from aggregator.privacy.planning import NoisePlan, PlanRequest, cohorts_around, errors_by_cohort, planned_epsilons
from fl_protocol.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#2563a8", "#c2560c", "#6b7280"


def draw_plan(request: PlanRequest, plan: NoisePlan, path: Path) -> None:
    """Draw epsilon over the rounds with the plan's noise, and the mean update's error over cohorts with their own.

    Args:
        request: what was wanted.
        plan: what fits it.
        path: of the picture; its ending says which kind.

    Raises:
        AggregatorError: matplotlib is not installed.
        ConfigError: the picture cannot be written.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - only for those who draw
        from matplotlib.figure import Figure  # noqa: PLC0415
        from matplotlib.ticker import LogLocator, NullLocator  # noqa: PLC0415
    except ImportError as error:
        raise AggregatorError(
            "--plot is drawn by matplotlib, which is not installed; try pip install 'covey[fleet]'"
        ) from error
    # The same plan gives the same text; letters stay letters.
    with mpl.rc_context({"svg.hashsalt": "covey", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _epsilon_over_rounds(left, request, plan)
        _error_over_cohorts(right, request, plan)
        for axis, marked in ((right.xaxis, (1.0, 2.0, 5.0)), (right.yaxis, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))):
            axis.set_major_locator(LogLocator(subs=marked))
            axis.set_major_formatter(lambda value, _place: f"{value:g}")
            axis.set_minor_locator(NullLocator())
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(visible=True, color="#e5e7eb", linewidth=0.6)
            axes.set_axisbelow(True)
        try:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"--plot {path}: the picture cannot be written ({error.strerror})") from error


def _epsilon_over_rounds(axes: Axes, request: PlanRequest, plan: NoisePlan) -> None:
    """What has been spent after each round, by the device that spent most."""
    epsilons = planned_epsilons(request, plan)
    axes.step(range(1, len(epsilons) + 1), epsilons, where="post", color=_BLUE, linewidth=1.8)
    axes.axhline(request.epsilon, color=_ORANGE, linewidth=1.0, linestyle="--")
    axes.annotate(
        f"budget {request.epsilon:g}",
        (1, request.epsilon),
        xytext=(2, 3),
        textcoords="offset points",
        color=_ORANGE,
    )
    axes.set_ylim(0, 1.15 * request.epsilon)
    axes.set_xlim(left=0)
    axes.set_xlabel("rounds")
    axes.set_ylabel(f"ε of one device at δ = {request.delta:g}")
    axes.set_title(f"Spent with noise multiplier {plan.noise_multiplier:.3g}", fontsize=10)


def _error_over_cohorts(axes: Axes, request: PlanRequest, plan: NoisePlan) -> None:
    """What a larger or a smaller cohort makes of the mean update, each with the noise that it needs."""
    cohorts = cohorts_around(request)
    axes.loglog(cohorts, errors_by_cohort(request, cohorts), color=_BLUE, linewidth=1.8)
    axes.plot([request.cohort], [plan.relative_error], "o", color=_BLUE)
    axes.annotate(
        f"{request.cohort} updates: {plan.relative_error:.2g}",
        (request.cohort, plan.relative_error),
        xytext=(-7, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=_BLUE,
    )
    axes.axhline(1.0, color=_GREY, linewidth=1.0, linestyle=":")
    axes.annotate(
        "noise as long as the clip",
        (1.0, 1.0),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        color=_GREY,
        fontsize=8,
    )
    axes.set_xlabel("updates a round")
    axes.set_ylabel("noise of the mean update over the clip (L2)")
    axes.set_title("Error against cohort, same budget", fontsize=10)
