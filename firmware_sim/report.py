"""``report.html``: a run in plots (matplotlib) and a few sentences, one self-contained file drawn from its metrics."""

from __future__ import annotations

import html
import io
import statistics
from typing import TYPE_CHECKING

from firmware_sim.metrics import RoundMetrics, RunMetrics
from firmware_sim.settings import named_helpers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#2563a8", "#c2560c", "#6b7280"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
.lead { color: #4b5563; margin-top: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem }
figure { margin: 0 } figcaption { color: #4b5563; font-size: .9rem } svg { width: 100%; height: auto }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e5e7eb; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
"""


def report_html(metrics: RunMetrics) -> str:
    """The whole page.

    Args:
        metrics: what the run measured; nothing on the page comes from anywhere else.
    """
    import matplotlib as mpl  # noqa: PLC0415 - half a second that only a report needs

    # The same metrics give the same text; letters stay letters, and a $ in a name starts no formula.
    with mpl.rc_context(
        {"svg.hashsalt": "covey", "svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False}
    ):
        plots = _plots(metrics)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Covey run</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>Covey run: {html.escape(metrics.settings.model)}</h1>{_lead(metrics)}"
        f'<div class="plots">{"".join(plots)}</div>'
        f"<h2>Settings</h2>{_table(_settings_rows(metrics))}"
        f"<h2>What went wrong</h2>{_table(_trouble_rows(metrics))}"
        "</body></html>"
    )


def _plots(metrics: RunMetrics) -> list[str]:
    """All plots of the page."""
    committed = [record for record in metrics.rounds if record.outcome == "committed"]
    plots = [
        _figure(_accuracy_svg(metrics, committed), "Accuracy on people whose wrists never trained, by round."),
        _figure(_epsilon_svg(metrics, committed), "Privacy spent by the wrist that spent most, against its budget."),
        _figure(_loss_svg(committed), "Mean loss on the same people, by round."),
        _figure(_bytes_svg(committed), "Bytes over the broker: sealed updates up, models down."),
        _figure(_seconds_svg(committed), "How long rounds took, and how much of it was unmasking, by round."),
    ]
    if metrics.final is not None:
        plots.append(_figure(_person_svg(metrics), "The finished model, by person (both wrists)."))
    plots.append(_figure(_memory_svg(metrics), "Peak resident memory of each process."))
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


def _table(rows: list[tuple[str, str]]) -> str:
    """Two columns."""
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _figure(svg: str, caption: str) -> str:
    """A plot and what it shows."""
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _axes(ylabel: str, xlabel: str = "round") -> tuple[Figure, Axes]:
    """An empty plot in the report's style."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The drawing as inline SVG, without the XML prologue; the same metrics give the same text."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _accuracy_svg(metrics: RunMetrics, rounds: list[RoundMetrics]) -> str:
    """Accuracy by round, with the finished model marked."""
    figure, axes = _axes("accuracy, %")
    points = [(record.round, 100 * record.accuracy) for record in rounds if record.accuracy is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], color=_BLUE, label="after each round")
    if metrics.final is not None:
        accuracy = 100 * metrics.final.accuracy
        label = f"finished model: {accuracy:.1f} %"
        axes.axhline(accuracy, color=_ORANGE, linestyle="--", linewidth=1, label=label)
    axes.set_ylim(0, 100)
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def _epsilon_svg(metrics: RunMetrics, rounds: list[RoundMetrics]) -> str:
    """Largest epsilon by round, with the budget."""
    figure, axes = _axes(f"ε at δ = {metrics.settings.delta:g}")
    if metrics.settings.epsilon is None:
        axes.text(0.5, 0.5, "no noise, so no ε", transform=axes.transAxes, ha="center", color=_GREY)
        return _svg(figure)
    axes.plot([r.round for r in rounds], [r.epsilon_max or 0.0 for r in rounds], color=_BLUE, label="largest spent")
    axes.axhline(metrics.settings.epsilon, color=_ORANGE, linestyle="--", linewidth=1, label="budget")
    axes.set_ylim(0, metrics.settings.epsilon * 1.1)
    axes.legend(frameon=False, loc="lower right")
    return _svg(figure)


def _loss_svg(rounds: list[RoundMetrics]) -> str:
    """Loss by round."""
    figure, axes = _axes("mean cross-entropy")
    points = [(record.round, record.loss) for record in rounds if record.loss is not None]
    axes.plot([x for x, _ in points], [y for _, y in points], color=_BLUE)
    axes.set_ylim(bottom=0)
    return _svg(figure)


def _bytes_svg(rounds: list[RoundMetrics]) -> str:
    """Bytes by round, both ways."""
    figure, axes = _axes("kB in a round, all devices")
    numbers = [record.round for record in rounds]
    axes.step(numbers, [r.bytes_up / 1000 for r in rounds], where="mid", color=_BLUE, label="up")
    axes.step(numbers, [r.bytes_down / 1000 for r in rounds], where="mid", color=_ORANGE, label="down")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def _seconds_svg(rounds: list[RoundMetrics]) -> str:
    """Seconds by round, and of them the unmasking."""
    figure, axes = _axes("seconds")
    axes.plot([r.round for r in rounds], [r.seconds for r in rounds], color=_BLUE, label="round")
    unmasking = [(r.round, r.unmasking_s) for r in rounds if r.unmasking_s is not None]
    if unmasking:
        axes.plot([x for x, _ in unmasking], [y for _, y in unmasking], color=_ORANGE, label="unmasking")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure)


def _person_svg(metrics: RunMetrics) -> str:
    """Accuracy of the finished model by person."""
    figure, axes = _axes("accuracy, %", "person")
    by_person = metrics.final.by_person if metrics.final is not None else {}
    bars = axes.bar(list(by_person), [100 * value for value in by_person.values()], color=_BLUE, width=0.5)
    axes.bar_label(bars, fmt="%.1f")
    axes.set_ylim(0, 105)
    return _svg(figure)


def _memory_svg(metrics: RunMetrics) -> str:
    """Peak memory by process."""
    figure, axes = _axes("MB", "")
    names = list(metrics.peak_rss_mb)
    axes.bar(names, list(metrics.peak_rss_mb.values()), color=_BLUE, width=0.7)
    axes.tick_params(axis="x", labelrotation=90, labelsize=7)
    return _svg(figure)
