"""Charts for the page: what plotly.js takes, as plain data.

Colours are names of the page's CSS variables, which its script resolves: light and dark need one figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dptrain.report.intervals import Interval
from dptrain.report.shown import Chart, Look, Series
from dptrain.report.words import short

_DASHES = {"solid": "solid", "dash": "dash", "dot": "dot", "dashdot": "dashdot", "none": "solid"}
_SYMBOLS = {
    "circle": "circle",
    "square": "square",
    "triangle": "triangle-up",
    "diamond": "diamond",
    "pentagon": "pentagon",
    "cross": "x",
    "none": "circle",
}
BAR_PX, PANEL_PX, ENTRY_PX = 30, 320, 22


def figure(chart: Chart) -> dict[str, Any]:
    """``{"data": [...], "layout": {...}}`` of one panel."""
    data = [trace for series in chart.series if series.x for trace in _traces(chart, series)]
    return {"data": data, "layout": _layout(chart)}


def _traces(chart: Chart, series: Series) -> list[dict[str, Any]]:
    errors = _errors(series.y, series.intervals)
    look = series.look
    if chart.kind == "line":
        mode = "+".join(
            part
            for part, there in (("lines", look.line != "none"), ("markers", look.marker != "none"))
            if there
        )
        return [
            {
                "type": "scatter",
                "mode": mode or "lines",
                "name": series.name,
                "x": list(series.x),
                "y": list(series.y),
                "opacity": _opacity(look),
                "line": {"color": _colour(look), "dash": _DASHES[look.line], "width": 2},
                "marker": {"color": _colour(look), "symbol": _SYMBOLS[look.marker], "size": 8},
                "error_y": errors | {"color": _colour(look)},
                "hovertemplate": "%{x}: %{y:.4~g}<extra>%{fullData.name}</extra>",
            }
        ]
    if chart.kind == "bar":
        return [
            {
                "type": "bar",
                "name": series.name,
                "x": list(series.x),
                "y": list(series.y),
                "opacity": _opacity(look),
                "marker": {"color": _colour(look)},
                "error_y": errors | {"color": "var(--ink)"},
                "hovertemplate": "%{x}: %{y:.4~g}<extra>%{fullData.name}</extra>",
            }
        ]
    looks = series.looks or (look,) * len(series.x)
    return [
        {
            "type": "bar",
            "orientation": "h",
            "name": series.name,
            # Bars of one name (a method with two settings, say) would be drawn on top of each other.
            "y": list(range(len(series.x))),
            "x": list(series.y),
            "customdata": list(series.x),
            "text": [short(value) for value in series.y],
            "textposition": "outside",
            "cliponaxis": False,
            "marker": {"color": [_colour(one) for one in looks], "opacity": [_opacity(one) for one in looks]},
            "error_x": errors | {"color": "var(--ink)"},
            "hovertemplate": "%{customdata}: %{x:.4~g}<extra></extra>",
        }
    ]


def _colour(look: Look) -> str:
    return f"var(--{look.colour})"


def _opacity(look: Look) -> float:
    return 0.45 if look.faint else 1.0


def _errors(y: Sequence[float], intervals: Sequence[Interval | None]) -> dict[str, Any]:
    if not any(intervals):
        return {"visible": False}
    pairs = [found or (value, value) for value, found in zip(y, intervals)]
    return {
        "visible": True,
        "symmetric": False,
        "thickness": 1.2,
        "width": 3,
        "array": [max(0.0, high - value) for value, (_, high) in zip(y, pairs)],
        "arrayminus": [max(0.0, value - low) for value, (low, _) in zip(y, pairs)],
    }


def _layout(chart: Chart) -> dict[str, Any]:
    axis = {
        "gridcolor": "var(--line)",
        "linecolor": "var(--muted)",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"color": "var(--ink)"},
    }
    x: dict[str, Any] = axis | _title(chart.x.label)
    y: dict[str, Any] = axis | _title(chart.y.label)
    several = len(chart.series) > 1
    height = PANEL_PX + (ENTRY_PX * len(chart.series) if several else 0)
    shapes = []
    if chart.kind == "ranking":
        bars = len(chart.series[0].x)
        x = axis | _title(chart.y.label) | {"rangemode": "tozero"}
        labels = {"tickvals": list(range(bars)), "ticktext": list(chart.series[0].x), "autorange": "reversed"}
        y = axis | labels | {"showgrid": False}
        height = 90 + BAR_PX * bars
    else:
        y |= _log_numbers(chart) if chart.y.log else {"rangemode": "tozero"}
        if chart.x.categories:
            x |= {
                "type": "category",
                "categoryorder": "array",
                "categoryarray": list(chart.x.categories),
                "showgrid": False,
            }
        elif chart.x.log:
            x |= _log_axis(chart)
    if chart.reference:
        value = chart.reference[0]
        ends = {"x0": value, "x1": value, "yref": "paper", "y0": 0, "y1": 1}
        if chart.kind != "ranking":
            at = math.log10(value) if chart.y.log and value > 0 else value
            ends = {"y0": at, "y1": at, "xref": "paper", "x0": 0, "x1": 1}
        line = {"color": "var(--muted)", "dash": "dash", "width": 1}
        shapes = [{"type": "line", "line": line, **ends}]
    return {
        "xaxis": x,
        "yaxis": y,
        "shapes": shapes,
        "height": height,
        "showlegend": several,
        # Below the panel: beside it, there is no room on a phone.
        "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        "margin": {"l": 8, "r": 44 if chart.kind == "ranking" else 12, "t": 8, "b": 8},
        "barmode": "group",
        "bargap": 0.3,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "family": "inherit", "size": 13},
        "hoverlabel": {"bgcolor": "var(--card)", "font": {"color": "var(--ink)"}},
    }


def _title(label: str) -> dict[str, Any]:
    return {"title": {"text": label, "font": {"size": 13}}}


def _log_numbers(chart: Chart) -> dict[str, Any]:
    """Ticks at 1, 2 and 5 times powers of ten, written in full."""
    values = [v for series in chart.series for v in series.y if v > 0] or [1.0]
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [short(v) for v in ticks]}


def _log_axis(chart: Chart) -> dict[str, Any]:
    """Ticks where points are, as long as they are few."""
    values = sorted({float(v) for series in chart.series for v in series.x})
    if len(values) > 12:
        return {"type": "log", "dtick": "D1"}
    return {"type": "log", "tickvals": values, "ticktext": [short(v) for v in values]}
