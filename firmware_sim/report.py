"""``report.html``: a run in plots (matplotlib) and a few sentences, one self-contained file drawn from its metrics."""

from __future__ import annotations

import html
import statistics

from firmware_sim.metrics import RoundMetrics, RunMetrics
from firmware_sim.report_page import BLUE, ORANGE, drawing, empty_axes, figure_html, note, page_html, svg, table_html
from firmware_sim.settings import named_helpers


def report_html(metrics: RunMetrics) -> str:
    """The whole page.

    Args:
        metrics: what the run measured; nothing on the page comes from anywhere else.
    """
    with drawing():
        plots = _plots(metrics)
    return page_html(
        "Covey run",
        f"<h1>Covey run: {html.escape(metrics.settings.model)}</h1>{_lead(metrics)}"
        f'<div class="plots">{"".join(plots)}</div>'
        f"<h2>Settings</h2>{table_html(_settings_rows(metrics))}"
        f"<h2>What went wrong</h2>{table_html(_trouble_rows(metrics))}",
    )


def _plots(metrics: RunMetrics) -> list[str]:
    """All plots of the page."""
    committed = [record for record in metrics.rounds if record.outcome == "committed"]
    plots = [
        figure_html(_accuracy_svg(metrics, committed), "Accuracy on people whose wrists never trained, by round."),
        figure_html(
            _epsilon_svg(metrics, committed), "Privacy spent by the wrist that spent most, against its budget."
        ),
        figure_html(_loss_svg(committed), "Mean loss on the same people, by round."),
        figure_html(_bytes_svg(committed), "Bytes over the broker: sealed updates up, models down."),
        figure_html(_seconds_svg(committed), "How long rounds took, and how much of it was unmasking, by round."),
    ]
    if metrics.final is not None:
        plots.append(figure_html(_person_svg(metrics), "The finished model, by person (both wrists)."))
    plots.append(figure_html(_memory_svg(metrics), "Peak resident memory of each process."))
    return plots


def _lead(metrics: RunMetrics) -> str:
    """The result in a sentence or two."""
    people = ", ".join(str(person) for person in metrics.settings.held_out)
    if metrics.final is None:
        result = "The run ended before its last round; while its wrists have budget left it can be resumed."
    else:
        result = (
            f"The finished model classifies {100 * metrics.final.accuracy:.1f} % of {metrics.final.windows} windows of "
            f"people {people} correctly; none of their windows was trained on."
        )
    spent = max(metrics.epsilon_spent.values(), default=0.0)
    if metrics.settings.epsilon is None:
        privacy = "It was trained without noise: no privacy is claimed for the wearers who trained it."
    else:
        privacy = (
            f"Each training wrist spent at most ε = {spent:.3f} of {metrics.settings.epsilon:g} at δ = "
            f"{metrics.settings.delta:g}, at record level (one window), against everyone including the aggregator. "
            "The choice of hyper-parameters is not covered by ε."
        )
    return f'<p class="lead">{html.escape(result)} {html.escape(privacy)} {html.escape(_engine_text(metrics))}</p>'


def _engine_text(metrics: RunMetrics) -> str:
    """Who saw what of the updates, in a sentence or two."""
    if metrics.settings.engine == "open":
        return "The engine was open: the aggregator saw each update."
    return (
        "The engine was secure: updates were masked, and the aggregator saw sums of at least "
        f"{metrics.settings.minimum_cohort} of them, unmasked by {named_helpers(metrics.helpers)}. That holds as long "
        "as one helper is honest; here all ran on one machine. No device-level privacy is claimed."
    )


def _settings_rows(metrics: RunMetrics) -> list[tuple[str, str]]:
    """What the run was."""
    settings = metrics.settings
    return [
        ("software", f"covey {metrics.covey}"),
        ("broker", metrics.broker),
        ("engine", settings.engine),
        *_secure_rows(metrics),
        ("training wrists", str(len(settings.training_wrists))),
        ("rounds", str(settings.rounds)),
        ("clip, noise multiplier", f"{settings.l2_norm_clip:g}, {metrics.noise_multiplier:g}"),
        ("learning rate, public divisor", f"{settings.learning_rate:g}, {settings.expected_batch_size:g}"),
        ("server momentum, versions averaged", f"{settings.server_momentum:g}, {settings.server().average_last}"),
        ("seconds", f"{metrics.seconds:g}"),
    ]


def _secure_rows(metrics: RunMetrics) -> list[tuple[str, str]]:
    """How the sums came about."""
    rows, times_s = [], metrics.unmasking_times_s
    if metrics.settings.engine == "secure":
        rows.append(("helpers", named_helpers(metrics.helpers)))
    if times_s:
        rows.append(("unmasking, median and longest", f"{statistics.median(times_s):.3f} s, {times_s[-1]:.3f} s"))
    if metrics.bytes_up_per_update is not None:
        what = "masked and sealed" if metrics.settings.engine == "secure" else "sealed"
        rows.append(("bytes up per update", f"{metrics.bytes_up_per_update:.0f}, {what}"))
    return rows


def _trouble_rows(metrics: RunMetrics) -> list[tuple[str, str]]:
    """Refusals, aborted rounds and complaints, or that there were none."""
    rows = [(f"updates refused: {reason}", str(count)) for reason, count in sorted(metrics.refusals.items())]
    rows += [
        (f"round {record.round} aborted", record.reason) for record in metrics.rounds if record.outcome == "aborted"
    ]
    rows += [("complaint", text) for text in metrics.complaints[:20]]
    return rows or [("nothing", "no update was refused, no round aborted, nobody complained")]


def _accuracy_svg(metrics: RunMetrics, rounds: list[RoundMetrics]) -> str:
    """Accuracy by round, with the finished model marked."""
    figure, axes = empty_axes("accuracy, %")
    points = [(record.round, 100 * record.accuracy) for record in rounds if record.accuracy is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], color=BLUE, label="after each round")
    if metrics.final is not None:
        accuracy = 100 * metrics.final.accuracy
        label = f"finished model: {accuracy:.1f} %"
        axes.axhline(accuracy, color=ORANGE, linestyle="--", linewidth=1, label=label)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="lower right")
    return svg(figure)


def _epsilon_svg(metrics: RunMetrics, rounds: list[RoundMetrics]) -> str:
    """Largest epsilon by round, with the budget."""
    figure, axes = empty_axes(f"ε at δ = {metrics.settings.delta:g}")
    if metrics.settings.epsilon is None:
        note(axes, "no noise, so no ε")
        return svg(figure)
    axes.plot([r.round for r in rounds], [r.epsilon_max or 0.0 for r in rounds], color=BLUE, label="largest spent")
    axes.axhline(metrics.settings.epsilon, color=ORANGE, linestyle="--", linewidth=1, label="budget")
    axes.set_ylim(0, metrics.settings.epsilon * 1.1)
    axes.legend(frameon=False, loc="lower right")
    return svg(figure)


def _loss_svg(rounds: list[RoundMetrics]) -> str:
    """Loss by round."""
    figure, axes = empty_axes("mean cross-entropy")
    points = [(record.round, record.loss) for record in rounds if record.loss is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], color=BLUE)
    axes.set_ylim(bottom=0)
    return svg(figure)


def _bytes_svg(rounds: list[RoundMetrics]) -> str:
    """Bytes by round, both ways."""
    figure, axes = empty_axes("kB in a round, all devices")
    numbers = [record.round for record in rounds]
    axes.step(numbers, [r.bytes_up / 1000 for r in rounds], where="mid", color=BLUE, label="up")
    axes.step(numbers, [r.bytes_down / 1000 for r in rounds], where="mid", color=ORANGE, label="down")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return svg(figure)


def _seconds_svg(rounds: list[RoundMetrics]) -> str:
    """Seconds by round, and of them the unmasking."""
    figure, axes = empty_axes("seconds")
    axes.plot([r.round for r in rounds], [r.seconds for r in rounds], color=BLUE, label="round")
    unmasking = [(r.round, r.unmasking_s) for r in rounds if r.unmasking_s is not None]
    if unmasking:
        axes.plot([x for x, _ in unmasking], [y for _, y in unmasking], color=ORANGE, label="unmasking")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return svg(figure)


def _person_svg(metrics: RunMetrics) -> str:
    """Accuracy of the finished model by person."""
    figure, axes = empty_axes("accuracy, %", "person")
    by_person = metrics.final.by_person if metrics.final is not None else {}
    bars = axes.bar(list(by_person), [100 * value for value in by_person.values()], color=BLUE, width=0.5)
    axes.bar_label(bars, fmt="%.1f")
    axes.set_ylim(0, 105)
    return svg(figure)


def _memory_svg(metrics: RunMetrics) -> str:
    """Peak memory by process."""
    figure, axes = empty_axes("MB", "")
    names = list(metrics.peak_rss_mb)
    axes.bar(names, list(metrics.peak_rss_mb.values()), color=BLUE, width=0.7)
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    return svg(figure)
