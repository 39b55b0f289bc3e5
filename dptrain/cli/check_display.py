"""A check on the terminal: readable at a hundred columns."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dptrain.torch import CheckReport
from dptrain.torch.check import Verdict
from dptrain.torch.plan_table import COLUMNS, break_name, cells

SHOWN_ERRORS = 3
RIGHT = ("uses", "T", "cost")
COLOURS = {Verdict.EXACT: "green", Verdict.REFUSED: "yellow", Verdict.WRONG: "red"}


def show(console: Console, description: str, notes: list[str], report: CheckReport, all_uses: bool) -> None:
    """Print the whole report, and the verdict last."""
    _show_header(console, description, notes, report)
    if report.plan:
        console.print(_plan(report, all_uses, console.width))
        console.print(
            "examples: on which axis.  T: positions.  mat.: materialise.  cost: predicted share of clipping.",
            style="dim",
            highlight=False,
        )
        console.print()
    facts = _table()
    for name, text in _facts(report):
        facts.add_row(name, text)
    console.print(facts)
    colour = COLOURS[report.verdict]
    console.print()
    sentence = f": {escape(report.reason)}" if report.reason else ""
    console.print(f"[bold {colour}]{report.verdict.value}[/]{sentence}", highlight=False)
    if report.advice:
        console.print(escape(report.advice), highlight=False)


def _show_header(console: Console, description: str, notes: list[str], report: CheckReport) -> None:
    table = _table()
    table.add_row("model", escape(description))
    for note in notes:
        table.add_row("", escape(note))
    table.add_row("parameters", f"{report.parameters:,}, of which {report.trainable:,} are trained")
    table.add_row(
        "batch", escape(", ".join(f"{n} {dtype} {list(shape)}" for n, shape, dtype in report.batch))
    )
    table.add_row("method", report.method)
    console.print(table)
    console.print()


def _plan(report: CheckReport, all_uses: bool, width: int) -> Table:
    rows = report.plan if all_uses else report.folded_plan
    lines = [cells(row) for row in rows]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    widths = [max(len(line[i]) for line in (COLUMNS, *lines)) for i in range(len(COLUMNS))]
    name_width = max(24, width - sum(widths[1:]) - len(COLUMNS))
    for column, own in zip(COLUMNS, (min(widths[0], name_width), *widths[1:])):
        table.add_column(column, justify="right" if column in RIGHT else "left", width=own, overflow="fold")
    for name, *rest in lines:
        table.add_row(escape(break_name(name, name_width)), *map(escape, rest))
    return table


def _facts(report: CheckReport) -> list[tuple[str, str]]:
    facts = []
    if report.uses:
        covered = len(report.uses) - len(report.unused)
        text = f"{covered} of {len(report.uses)} trained parameters have a gradient, {len(report.plan)} uses"
        if report.frozen:
            text += f"; {report.frozen} are frozen"
        facts.append(("coverage", text))
    if report.unused:
        facts.append(("without a use", escape(", ".join(report.unused))))
    facts.append(("mixing", _mixing(report)))
    if report.exactness is not None:
        facts += _exactness(report)
    if report.memory is not None:
        facts.append(("memory", _memory(report)))
    seconds = ", ".join(f"{part} {s:.1f} s" for part, s in report.seconds.items())
    return [*facts, ("time", seconds)]


def _mixing(report: CheckReport) -> str:
    if report.probed_size is None:
        return "not shown to be absent; see below"
    return (
        f"none among {report.probed_size} examples: half were back-propagated, the others replaced, "
        "also by loud and by nearly equal ones; no other example's loss or gradient moved"
    )


def _exactness(report: CheckReport) -> list[tuple[str, str]]:
    found = report.exactness
    assert found is not None
    against = "run one by one" if found.one_by_one else "of one run, as the model draws random numbers"
    lines = [
        (
            "exactness",
            f"float64, parameters moved slightly, {found.examples} examples {against}, clipped to "
            f"{found.clip_norm:.4g}",
        ),
        ("largest errors", f"norms {found.norm_error:.1e} (exact below {found.tolerance:.0e})"),
    ]
    lines += [("", f"{error:.1e}  {escape(name)}") for name, error in found.gradient_errors[:SHOWN_ERRORS]]
    if found.stilled:
        shown = ", ".join(found.stilled[:2]) + (", ..." if len(found.stilled) > 2 else "")
        count = len(found.stilled)
        lines.append(("", f"without the random draws of {count} modules such as dropout ({escape(shown)})"))
    return lines


def _memory(report: CheckReport) -> str:
    memory = report.memory
    assert memory is not None
    budget = _size(memory.budget_bytes)
    if not memory.largest:
        return f"not even one example fits into {budget}: it needs {_size(memory.peak_bytes(1))}"
    each = (memory.peak_bytes(2 * memory.largest) - memory.peak_bytes(memory.largest)) / memory.largest
    seen = " and ".join(str(size) for size, _ in memory.measured)
    return (
        f"largest physical batch {memory.largest:,} in {budget}, predicted from batches of {seen}: "
        f"{_size(memory.resident_bytes)} and {_size(each)} an example"
    )


def _size(count: float) -> str:
    power = min(3, max(0, math.floor(math.log10(max(1, count)) / 3)))
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB')[power]}"


def _table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table
