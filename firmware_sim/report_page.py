"""What the reports of runs share: their page, tables and plots (matplotlib), all in one self-contained file.

The same numbers give the same text, letters stay letters, and nothing that is shown becomes markup.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, GREEN, RULE = "#2563a8", "#c2560c", "#6b7280", "#3f8f5b", "#e5e7eb"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem }
.lead { color: #4b5563; margin-top: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.5rem }
figure { margin: 0 } figure.wide { grid-column: 1 / -1 } .none { color: #4b5563; margin: 0 }
.aligned td.n, .aligned th.n { width: 13% } .plots + table { margin-top: 1rem } pre, code { font-size: .85rem;
overflow-x: auto } details { margin-top: .4rem } figcaption { color: #4b5563; font-size: .9rem } svg { width: 100%;
height: auto } table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #e5e7eb; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
"""


def page_html(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: as the browser shows it; plain text.
        body: markup.
    """
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def table_html(rows: Iterable[Sequence[str]], *, header: Sequence[str] = (), numbers: Iterable[int] = ()) -> str:
    """A table.

    Args:
        rows: cells as plain text.
        header: names of the columns; none for a table without.
        numbers: columns, counted from 0, that stand to the right.
    """
    kinds = dict.fromkeys(numbers, ' class="n"')

    def line(cells: Sequence[str], tag: str) -> str:
        filled = (f"<{tag}{kinds.get(i, '')}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(filled)}</tr>"

    top = line(header, "th") if header else ""
    return f"<table>{top}{''.join(line(row, 'td') for row in rows)}</table>"


def figure_html(plot: str, caption: str) -> str:
    """A plot and what it shows; the caption is plain text."""
    return f"<figure>{plot}<figcaption>{html.escape(caption)}</figcaption></figure>"


def drawing() -> AbstractContextManager[None]:
    """Where all plots of a page are made: the same numbers give the same text, and a $ starts no formula."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that only a report needs

    return mpl.rc_context(
        {"svg.hashsalt": "covey", "svg.fonttype": "none", "font.family": "sans-serif", "text.parse_math": False}
    )


def empty_axes(ylabel: str, xlabel: str = "round") -> tuple[Figure, Axes]:
    """An empty plot in the report's style."""
    figure, (axes,) = stacked_axes([ylabel], xlabel)
    return figure, axes


def stacked_axes(
    ylabels: Sequence[str], xlabel: str, *, heights: Sequence[float] = (), wide: bool = False
) -> tuple[Figure, list[Axes]]:
    """Empty plots, one above the other, over the same x.

    Args:
        ylabels: of the plots, from the top.
        xlabel: below the last.
        heights: how they share the height; equally unless given.
        wide: as wide as the page.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - as above

    inches = 3.4 if len(ylabels) == 1 else 4.4
    figure = Figure(figsize=(11.0 if wide else 6.2, inches), layout="constrained")
    shares = list(heights) or [1.0] * len(ylabels)
    column = figure.subplots(len(ylabels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": shares})[:, 0]
    for axes, ylabel in zip(column, ylabels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=RULE)
        axes.set_axisbelow(True)
        axes.set_ylabel(ylabel)
    column[-1].set_xlabel(xlabel)
    return figure, list(column)


def note(axes: Axes, text: str) -> None:
    """Say in the middle of an empty plot why it is empty."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY)


def svg(figure: Figure) -> str:
    """The drawing as inline SVG, without the XML prologue; the same metrics give the same text."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
