"""A task's curves: how good the model is, what it has cost in privacy against its budget, and what was sent."""

from __future__ import annotations

import math
from typing import Any

from fastapi.concurrency import run_in_threadpool
from nicegui import background_tasks, ui

from aggregator.api.answers import Spent
from aggregator.dashboard.frame import Visit, empty
from aggregator.dashboard.history import History, HistoryBook, Points, stage_of
from aggregator.dashboard.live_state import LiveState
from aggregator.dashboard.tags import box, text
from aggregator.errors import AggregatorError
from aggregator.overview import Overview, TaskOverview

_QUIET = "#7b8794"
_COLOURS = ("#2b7fc4", "#c77700", "#8a63c9")
Curves = dict[str, Points]


async def curves_page(visit: Visit, book: HistoryBook, task: str) -> None:
    """Make the page, and keep it up from round to round."""
    found = _task(visit.parts.live.now.overview, task)
    if found is None:
        empty("No such task", f"There is no task {task}.")
        return
    if not found.round:
        empty("No round yet", "Curves begin with the first round that is closed.")
        return
    history = await run_in_threadpool(book.of, found)
    charts = _Charts(history, joules=visit.parts.joules_per_update)
    stage = [stage_of(found)]

    def show(state: LiveState) -> None:
        now = _task(state.overview, task)
        if now is not None and stage_of(now) != stage[0]:
            stage[0] = stage_of(now)
            background_tasks.create(renew(now))

    async def renew(now: TaskOverview) -> None:
        try:
            charts.show(await run_in_threadpool(book.of, now))
        except AggregatorError:
            stage[0] = ()  # again at the next reading; the banner says why

    visit.shows(show)


def _task(found: Overview | None, name: str) -> TaskOverview | None:
    return next((one for one in found.tasks if one.name == name), None) if found is not None else None


class _Charts:
    """The charts of a page.

    Args:
        history: to begin with.
        joules: what an update costs a device, if the operator has said so.
    """

    def __init__(self, history: History, *, joules: float | None) -> None:
        self._joules = joules
        self._charts: dict[str, tuple[ui.echart, Any]] = {}
        with box("section", "cv-charts"):
            for title, words, options in self._all(history):
                with box("figure", "cv-panel cv-figure"):
                    text("h2", title)
                    caption = text("figcaption", words, "cv-quiet")
                    chart = ui.echart(options).classes("cv-chart")
                    chart.props["aria-label"], chart.props["role"] = f"{title}: {words}", "img"
                    self._charts[title] = (chart, caption)

    def show(self, history: History) -> None:
        """Show a history."""
        for title, words, options in self._all(history):
            chart, caption = self._charts[title]
            chart.options.clear()
            chart.options.update(options)
            chart.update()
            caption.set_text(words)

    def _all(self, history: History) -> list[tuple[str, str, dict[str, Any]]]:
        """Title, words and options of each chart."""
        spent = history.spent
        epsilon = {"a record, at most": history.record_epsilon, "a device": history.device_epsilon}
        charts = [
            (
                "Accuracy",
                _last(history.accuracy, "{:.1%} on the validation set"),
                _lines({"accuracy": history.accuracy}, top=1.0),
            ),
            ("Loss", _last(history.loss, "{:.3f} on the validation set"), _lines({"loss": history.loss})),
            ("Privacy spent (ε)", _privacy(spent), _lines(epsilon, budget=None if spent is None else spent.budget)),
            (
                "Sent up a round",
                _last(_scaled(history.bytes_up, 1e-6), "{:.3g} MB in the last round"),
                _lines({"MB": _scaled(history.bytes_up, 1e-6)}),
            ),
        ]
        if self._joules is not None:
            energy = _scaled(history.updates, self._joules)
            words = f"An estimate: updates that counted, times {self._joules:g} J as configured. Nothing is measured."
            charts.append(("Energy of devices a round, estimated", words, _lines({"J, estimated": energy})))
        return charts


def _last(points: Points, words: str) -> str:
    """The newest value in words."""
    return words.format(points[-1][1]) if points else "None so far: the task has no validation set, or no closed round."


def _privacy(spent: Spent | None) -> str:
    """What was spent, and of what."""
    if spent is None:
        return ""
    words = [spent.record_words[:1].upper() + spent.record_words[1:]]
    if spent.budget is not None:
        against = "the aggregator" if spent.budget_against == "aggregator" else "those who see released models"
        words.append(
            f"The task's budget for a device is {spent.budget:g} at delta {spent.device_delta:g}, against {against}"
        )
    return ". ".join(words) + "."


def _scaled(points: Points, factor: float) -> Points:
    return [(number, value * factor) for number, value in points]


def _lines(curves: Curves, *, top: float | None = None, budget: float | None = None) -> dict[str, Any]:
    """Options of a chart over rounds, whose colours show on light and on dark."""
    there = {name: points for name, points in curves.items() if points}
    series: list[dict[str, Any]] = [
        {"type": "line", "name": name, "data": points, "showSymbol": len(points) == 1, "sampling": "lttb"}
        for name, points in there.items()
    ]
    if budget is not None and series:
        line = {"yAxis": budget, "name": "budget"}
        label = {"formatter": f"budget {budget:g}", "position": "insideEndTop", "color": _COLOURS[1]}
        style = {"color": _COLOURS[1], "type": "dashed", "width": 2}
        series[-1]["markLine"] = {"symbol": "none", "silent": True, "data": [line], "label": label, "lineStyle": style}
    axis = {
        "axisLabel": {"color": _QUIET},
        "nameTextStyle": {"color": _QUIET},
        "splitLine": {"lineStyle": {"color": "#7b879433"}},
    }
    largest = max((value for points in there.values() for _, value in points), default=1.0)
    return {
        "animation": False,
        "color": list(_COLOURS),
        "grid": {"left": 8, "right": 16, "top": 36 if len(there) > 1 else 16, "bottom": 28, "containLabel": True},
        "legend": {"show": len(there) > 1, "top": 0, "textStyle": {"color": _QUIET}},
        # Security: as text, not as HTML.
        "tooltip": {"trigger": "axis", "renderMode": "richText", "confine": True},
        "xAxis": {
            **axis,
            "type": "value",
            "name": "round",
            "nameLocation": "middle",
            "nameGap": 24,
            "min": "dataMin",
            "max": "dataMax",
            "minInterval": 1,
        },
        "yAxis": {
            **axis,
            "type": "value",
            "max": top if budget is None else math.ceil(1.05 * max(largest, budget)),
            "scale": top is None and not budget,
        },
        "series": series,
    }
