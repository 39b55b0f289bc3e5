"""A plan as a table: one row per use, or repeated layers folded into one row. Text and dicts only.

``blocks.0.attn.qkv.weight`` to ``blocks.11.attn.qkv.weight`` become
``blocks.{0-11}.attn.qkv.weight``, twelve uses, where all else about them is the same.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import route_cost

if TYPE_CHECKING:
    from .planner import Machine, Plan

Row = dict[str, Any]
_NUMBER = re.compile(r"(?<![^. ])\d+(?![^.,])")
"""A whole component of a dotted name: ``layers.3.weight``, but not ``conv3``."""

SHORT = {"materialise": "mat.", "second-backward": "2nd backw."}


def rows(plan: Plan, machine: Machine) -> list[Row]:
    """One row per use, in the order of the plan's groups; ``cost`` is a share of 1."""
    cost = route_cost.shares(plan, machine)
    table = []
    for group, route in zip(plan.findings.groups, plan.routes):
        for index in group.uses:
            fact = plan.findings.uses[index]
            table.append(
                {
                    "parameter": ", ".join(fact.leaves),
                    "operation": fact.operation,
                    "value": tuple(fact.value),
                    "examples": fact.where,
                    "positions": fact.size.positions if fact.size else None,
                    "pull-back": group.kind.value,
                    "norm": route.norm,
                    "sum": route.sum,
                    "cost": cost[index],
                }
            )
    return table


def fold(table: list[Row]) -> list[Row]:
    """Rows that differ only in the numbers of their names and in cost, as one with ``uses``.

    Costs are added. Rows are folded only where the numbers are a full grid, so that a folded name
    says exactly which parameters are meant.
    """
    alike: dict[tuple, list[Row]] = {}
    for row in table:
        rest = tuple((k, v) for k, v in row.items() if k not in ("parameter", "cost"))
        alike.setdefault((_NUMBER.sub("#", row["parameter"]), rest), []).append(row)
    folded = []
    for members in alike.values():
        for name, part in _grids(members):
            cost = math.fsum(row["cost"] for row in part)
            folded.append({**part[0], "parameter": name, "uses": len(part), "cost": cost})
    return folded


def _grids(members: list[Row]) -> list[tuple[str, list[Row]]]:
    """(name, rows) of the fewest full grids of numbers that the members fall into, by halving."""
    numbers = [tuple(_NUMBER.findall(row["parameter"])) for row in members]
    name = _grid_name(members[0]["parameter"], numbers)
    if name is not None:
        return [(name, members)]
    place = next(i for i, column in enumerate(zip(*numbers)) if len(set(column)) > 1)
    parts: dict[str, list[Row]] = {}
    for row, own in zip(members, numbers):
        parts.setdefault(own[place], []).append(row)
    return [grid for part in parts.values() for grid in _grids(part)]


def _grid_name(first: str, numbers: list[tuple[str, ...]]) -> str | None:
    """The name with sets in braces, if the numbers are all combinations of those sets."""
    count = collections.Counter(numbers)
    columns = list(zip(*numbers))
    # two places that always hold the same number are one: `3.lora_A, 3.lora_B`
    distinct = list(dict.fromkeys(columns))
    sets = [sorted(set(column), key=int) for column in distinct]
    seen = {tuple(own[columns.index(column)] for column in distinct) for own in numbers}
    if len(set(count.values())) > 1 or math.prod(map(len, sets)) != len(seen):
        return None
    shown = {column: _ranges(each) for column, each in zip(distinct, sets)}
    replacement = iter(shown[column] for column in columns)
    return _NUMBER.sub(lambda _: next(replacement), first)


def _ranges(numbers: Iterable[str]) -> str:
    """``{0-3,7}`` for 0, 1, 2, 3, 7; a single number as it is."""
    parts = []
    for _, run in itertools.groupby(enumerate(map(int, numbers)), key=lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    text = ",".join(parts)
    return text if text.isdigit() else "{" + text + "}"


COLUMNS = ("parameter", "uses", "operation", "value", "examples", "T", "pull", "norm", "sum", "cost")


def cells(row: Row) -> tuple[str, ...]:
    """A row in short text, in the order of ``COLUMNS``; ``T`` are the positions."""
    positions = row["positions"]
    return (
        row["parameter"],
        str(row.get("uses", 1)),
        row["operation"].removeprefix("Tensor.").removesuffix(" bias"),  # the name says that
        "×".join(map(str, row["value"])) or "scalar",
        row["examples"].replace("no gradient", "none").removeprefix("axis "),
        "-" if positions is None else str(positions),
        row["pull-back"],
        SHORT.get(row["norm"], row["norm"]),
        SHORT.get(row["sum"], row["sum"]),
        _percent(row["cost"]),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.0095 else ("<1%" if share else "0%")


def break_name(name: str, width: int, indent: str = "  ") -> str:
    """A dotted name in lines of at most ``width``, broken before its dots where that is possible."""
    lines = [""]
    for part in re.split(r"(?=\.)|(?<=, )", name):
        if lines[-1].strip() and len(lines[-1]) + len(part.rstrip()) > width:
            lines.append(indent)
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def describe(table: list[Row]) -> str:
    """The folded table as plain text."""
    lines = [COLUMNS, *(cells(row) for row in fold(table))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in lines)
