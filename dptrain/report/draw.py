"""Charts as figures for print: PNG and PDF, by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from dptrain.report.intervals import Interval
from dptrain.report.palette import COLOURS
from dptrain.report.shown import Chart, Look, Shown
from dptrain.report.words import short

PANEL_INCHES = (4.3, 3.1)
BAR_INCHES = 0.27
LEGEND_INCHES = 2.0
DOTS_PER_INCH = 200
FONTS = ("Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")
INK, MUTED, GRID = "#1d2129", "#5f6672", "#e3e6ea"
FAINT = 0.45
#: of an axis from zero, over the highest point
HEADROOM = 1.1

_LINES = {
    "solid": "-",
    "dash": (0, (5, 2)),
    "dot": (0, (1.2, 1.8)),
    "dashdot": (0, (6, 2, 1.5, 2)),
    "none": "",
}
_MARKERS = {
    "circle": "o",
    "square": "s",
    "triangle": "^",
    "diamond": "D",
    "pentagon": "p",
    "cross": "X",
    "none": "",
}


def draw(shown: Shown, paths: Sequence[Path]) -> None:
    """Draw the panels of a study side by side into files of the suffixes' formats.

    Raises ValueError where there is no panel.
    """
    if not shown.panels:
        raise ValueError(f"{shown.name} has no chart to draw.")
    with matplotlib.rc_context(_style()):
        figure = _figure(shown.panels)
        for path in paths:
            nothing_personal: dict[str, Any] = {"CreationDate": None} if path.suffix == ".pdf" else {}
            figure.savefig(path, dpi=DOTS_PER_INCH, metadata=nothing_personal)


def _style() -> dict[str, Any]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return {
        "font.family": [next(name for name in FONTS if name in installed)],
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 9,
        "axes.labelsize": 9,
        "axes.labelcolor": INK,
        "axes.edgecolor": MUTED,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 2.6,
        "pdf.fonttype": 42,
    }


def _figure(panels: Sequence[Chart]) -> Figure:
    bars = max((len(s.x) for c in panels if c.kind == "ranking" for s in c.series), default=0)
    height = max(
        PANEL_INCHES[1] if any(c.kind != "ranking" for c in panels) else 1.0, 0.8 + BAR_INCHES * bars
    )
    legend = any(len(c.series) > 1 for c in panels)
    widths = [PANEL_INCHES[0] + (1.2 if c.kind == "ranking" else _extra(c)) for c in panels]
    size = (sum(widths) + LEGEND_INCHES * legend, height)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.06))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for ax, chart in zip(axes, panels):
        {"line": _lines, "bar": _bars, "ranking": _ranking}[chart.kind](ax, chart)
        ax.set_title(chart.title)
    if legend:
        handles: dict[str, Any] = {}
        for ax in axes:
            for handle, label in zip(*ax.get_legend_handles_labels()):
                # Of points with error bars, the line and the marker are enough of a key.
                handles.setdefault(label, handle[0] if isinstance(handle, ErrorbarContainer) else handle)
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", borderaxespad=0.3)
    return figure


def _extra(chart: Chart) -> float:
    """Inches that many categories need."""
    return max(0.0, 0.5 * (len(chart.x.categories) - 5))


def _colour(look: Look) -> str:
    return COLOURS[look.colour][0]


def _filled(look: Look) -> tuple[float, float, float]:
    """Of an area: paler where it is faint, and never transparent, for the grid would show."""
    red, green, blue = to_rgb(_colour(look))
    strength = FAINT if look.faint else 1.0
    return (1 - strength * (1 - red), 1 - strength * (1 - green), 1 - strength * (1 - blue))


def _lines(ax: Axes, chart: Chart) -> None:
    place = {name: i for i, name in enumerate(chart.x.categories)}
    for series in chart.series:
        x = [place.get(str(v), v) if place else v for v in series.x]
        look, colour = series.look, _colour(series.look)
        ax.errorbar(
            x,
            series.y,
            yerr=_errors(series.y, series.intervals),
            label=series.name,
            color=colour,
            alpha=FAINT if look.faint else 1.0,
            linestyle=_LINES[look.line],
            linewidth=1.0 if look.marker == "none" and look.faint else 1.5,
            marker=_MARKERS[look.marker],
            markersize=5,
            markerfacecolor=colour,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.0,
            capsize=2,
        )
    _scale(ax, chart, horizontal=False)
    if place:
        ax.set_xticks(range(len(place)), [textwrap.fill(c, 12) for c in place])
        ax.set_xlim(-0.35, len(place) - 0.65)
    elif chart.x.log:
        _log_ticks(ax, [float(v) for s in chart.series for v in s.x])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 10]))


def _log_ticks(ax: Axes, values: list[float]) -> None:
    """Ticks where points are; in between where these would be too many."""
    ax.set_xscale("log", base=2)
    known = sorted(set(values))
    few = [v for i, v in enumerate(known) if v == int(v) and (i == 0 or v / known[i - 1] >= 1.35)]
    if len(known) <= 12 and few:
        ax.xaxis.set_major_locator(FixedLocator(few))
    else:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))


def _bars(ax: Axes, chart: Chart) -> None:
    place = {name: i for i, name in enumerate(chart.x.categories)}
    width = 0.8 / max(2, len(chart.series))
    for i, series in enumerate(chart.series):
        shift = (i - (len(chart.series) - 1) / 2) * width
        ax.bar(
            [place[str(v)] + shift for v in series.x],
            series.y,
            width * 0.92,
            label=series.name,
            color=_filled(series.look),
            yerr=_errors(series.y, series.intervals),
            error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": INK},
        )
    ax.set_xticks(range(len(place)), [textwrap.fill(c, 12) for c in place])
    ax.tick_params(axis="x", length=0)
    ax.grid(visible=False, axis="x")
    _scale(ax, chart, horizontal=False)


def _ranking(ax: Axes, chart: Chart) -> None:
    (series,) = chart.series
    rows = range(len(series.x))
    looks = series.looks or (series.look,) * len(series.x)
    ax.barh(
        rows,
        series.y,
        0.68,
        color=[_filled(look) for look in looks],
        xerr=_errors(series.y, series.intervals),
        error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": INK},
    )
    for row, value in zip(rows, series.y):
        bounds = series.intervals[row] if series.intervals else None
        ax.annotate(
            short(value),
            (max(value, bounds[1]) if bounds else value, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    ax.set_yticks(list(rows), [str(name) for name in series.x])
    ax.set_ylim(len(series.x) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")
    _scale(ax, chart, horizontal=True)
    ax.margins(x=0.12)


def _scale(ax: Axes, chart: Chart, horizontal: bool) -> None:
    """Labels, the numbers' axis from zero or logarithmic, and the reference."""
    if horizontal:
        ax.set_xlabel(chart.y.label)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    else:
        ax.set_xlabel(chart.x.label)
        ax.set_ylabel(chart.y.label)
        if chart.y.log:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(0, HEADROOM * _highest(chart))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: short(v)))
    if chart.reference is None:
        return
    value, name = chart.reference
    style: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": _LINES["dash"], "zorder": 1.5}
    if horizontal:
        ax.axvline(value, **style)
    else:
        ax.axhline(value, **style)
        ax.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=MUTED,
        )


def _highest(chart: Chart) -> float:
    """The top of all points, intervals and of the reference; 1 where there is nothing above zero."""
    tops = [v for s in chart.series for v in s.y]
    tops += [interval[1] for s in chart.series for interval in s.intervals if interval]
    tops += [chart.reference[0]] if chart.reference else []
    return max([*tops, 0.0]) or 1.0


def _errors(y: Sequence[float], intervals: Sequence[Interval | None]) -> list[list[float]] | None:
    """What matplotlib takes: distances below and above. None where no point has an interval."""
    if not any(intervals):
        return None
    pairs = [found or (value, value) for value, found in zip(y, intervals)]
    below = [max(0.0, value - low) for value, (low, _) in zip(y, pairs)]
    above = [max(0.0, high - value) for value, (_, high) in zip(y, pairs)]
    return [below, above]
