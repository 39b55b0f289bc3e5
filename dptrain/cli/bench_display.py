"""Progress and tables of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dptrain.bench import Case, Record
from dptrain.bench.run import run

COLOURS = {"ok": "green", "unsupported": "yellow", "out-of-memory": "yellow", "error": "bold red"}


def watched(console: Console, cases: Sequence[Case], folder: Path) -> list[Record]:
    """Measure under a progress bar; Ctrl-C ends it, and what is finished stays.

    Raises:
        ValueError: a case that no engine could make sense of.
        KeyboardInterrupt: after saying what there is.
    """
    finished: list[Record] = []
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=False),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(dict.fromkeys(cases)))

        measured: set[Case] = set()

        def begins(case: Case) -> None:
            measured.add(case)
            progress.update(task, description=escape(case.id[:-9]))

        def ended(record: Record) -> None:
            finished.append(record)
            progress.advance(task)
            read = "" if record.case in measured else "[dim]from its record:[/] "
            progress.console.print(read + line(record), highlight=False)

        try:
            return run(cases, folder, begins, ended)
        except KeyboardInterrupt:
            progress.stop()
            console.print(
                escape(
                    f"Interrupted; {len(finished)} records are in {folder / 'records'}. The next run goes on."
                )
            )
            raise


def line(record: Record) -> str:
    """One record in one line."""
    name, colour = record.case.id[:-9], COLOURS[record.status]
    told = record.sentence or ""
    if record.status == "ok":
        told = ", ".join(f"{name} {value}" for name, value in _columns(record).items())
    else:
        told = escape(told)
    return f"[{colour}]{record.status}[/]  {escape(name)}: {told}"


def show_records(console: Console, records: Sequence[Record]) -> None:
    """A table of all records, in the units of their measure; what all have in common is its title."""
    found = {record.case: _columns(record) for record in records if record.status == "ok"}
    told = {record.case: _described(record.case) for record in records}
    same = {name for name in next(iter(told.values()), {}) if len({d[name] for d in told.values()}) == 1}
    common = [f"{name} {value}" for name, value in next(iter(told.values()), {}).items() if name in same]
    names = [name for name in next(iter(told.values()), {}) if name not in same]
    results = list(dict.fromkeys(name for columns in found.values() for name in columns))
    table = Table(title=escape(", ".join(common)), title_justify="left")
    for name in [*names, *results]:
        table.add_column(name, justify="right" if name in results else "left")
    for record in records:
        cells = [found.get(record.case, {}).get(name, "") for name in results]
        if record.status != "ok":
            status = f"[{COLOURS[record.status]}]{record.status}[/]"
            cells = [status, *cells[1:]]
        table.add_row(*(escape(told[record.case][name]) for name in names), *cells)
    console.print(table)


def _described(case: Case) -> dict[str, str]:
    """A case by what people vary."""
    return {
        "engine": case.engine,
        "method": case.method,
        "model": f"{case.model} at {case.image_size}",
        "batch": "" if case.measure == "batch-size" else str(case.batch_size),
        "precision": case.precision + (" compiled" if case.compile else ""),
        "device": case.device if case.devices == 1 else f"{case.devices} x {case.device}",
    }


def _columns(record: Record) -> dict[str, str]:
    """What a record says, by column, safe to print."""
    try:
        return {escape(name): escape(str(value)) for name, value in _told(record).items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return {"results": "damaged: remove the record to measure again"}


def _told(record: Record) -> dict[str, str]:
    r = record.results
    match record.case.measure:
        case "throughput" | "scaling":
            low, high = r["interval95_of_ratio"]
            return {
                "examples/s": f"{r['examples_per_s']:.1f}",
                "of non-private": f"{r['ratio_to_non_private']:.3f}",
                "95 %": f"{low:.3f} to {high:.3f}",
                "exactness": r["exactness"]["verdict"],
            }
        case "batch-size":
            return {"largest batch": str(r["largest"]), "tries": str(len(r["tries"]))}
        case "memory":
            parts = {"peak": r["peak_bytes"], **r.get("anatomy_bytes", {}), **r.get("snapshots_bytes", {})}
            told = {f"{name} MiB": f"{size / 2**20:.0f}" for name, size in parts.items()}
            return {"of non-private": f"{r['ratio_to_non_private']:.2f}", **told}
        case "profile":
            return {f"{name} ms": f"{1e3 * s:.1f}" for name, s in r["sections_s"].items()}
        case "compile":
            return {"first step s": f"{r['first_step_s']:.1f}", "later s": f"{r['later_step_s']:.3f}"}
        case "accuracy":
            interval = "{:.4f} to {:.4f}".format(*r["interval95"]) if r["interval95"] else "–"
            return {"accuracy": f"{r['mean']:.4f}", "95 %": interval, "runs": str(len(r["accuracies"]))}
