"""What a study comes to, as data: a table, charts and findings. Drawing them is another matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["confirmed", "refuted", "not measured"]
Kind = Literal["line", "bar", "ranking"]
Line = Literal["solid", "dash", "dot", "dashdot", "none"]
Marker = Literal["circle", "square", "triangle", "diamond", "pentagon", "cross", "none"]


@dataclass(frozen=True)
class Look:
    """How a series looks, in every figure alike.

    Attributes:
        colour: a key of `dptrain.report.palette.COLOURS`, most often a method's name.
        line, marker: tell libraries apart.
        faint: lighter, for what is compared with and for what is not a result.
    """

    colour: str
    line: Line = "solid"
    marker: Marker = "circle"
    faint: bool = False


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        x: numbers, or names of categories.
        y: numbers.
        intervals: of each point ``(low, high)`` of its 95 % interval, or None.
        looks: of a ranking, one for each bar.
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    look: Look
    intervals: tuple[tuple[float, float] | None, ...] = ()
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class Axis:
    """Its label, with the unit; logarithmic or not; and the order of its categories, where it has them."""

    label: str
    log: bool = False
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """One panel of a figure.

    Attributes:
        kind: lines with markers; vertical bars, grouped if there are several series; or ``ranking``,
            horizontal bars with a name and a number each.
        reference: a horizontal line (vertical in a ranking) at this value, with its name.
    """

    kind: Kind
    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    reference: tuple[float, str] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(series.x for series in self.series)


@dataclass(frozen=True)
class Finding:
    """A claim of the paper and what was seen of it.

    Attributes:
        claim: one sentence.
        evidence: one sentence with our numbers, or why there are none.
    """

    claim: str
    verdict: Verdict
    evidence: str


@dataclass(frozen=True)
class Shown:
    """A study, ready to be written and drawn.

    Attributes:
        name: of files.
        table: a DataFrame with column names for people.
        charts: panels of one figure, side by side; empty ones are left out.
        notes: sentences below the figure and the table.
    """

    name: str
    title: str
    shows: str
    table: pd.DataFrame
    charts: tuple[Chart, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def panels(self) -> tuple[Chart, ...]:
        """The charts that have something to show."""
        return tuple(chart for chart in self.charts if not chart.is_empty)
