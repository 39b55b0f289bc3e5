"""`dptrain reproduce`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dptrain import report
from dptrain.bench import Records
from dptrain.cli.bench_display import watched
from dptrain.cli.errors import BAD_INPUT_ERRORS
from dptrain.cli.terminal import Terminal
from dptrain.recipes.seeds import seed_methods
from dptrain.recipes.studies import STUDIES, study
from dptrain.recipes.study import Scale, Study, estimate_s, manifest
from dptrain.report import tables

__all__ = ["BAD_INPUT_ERRORS", "run"]

SOME_FAILED = 1
COLOURS = {"confirmed": "green", "refuted": "red", "not measured": "dim"}


def run(arguments: Sequence[str]) -> int:
    """Measure what a figure or a table needs and draw it. Returns 1 if a case ended in an error."""
    given = list(arguments)
    if given == ["--list"]:
        return _list()
    return tyro.cli(_reproduce, prog="dptrain reproduce", args=given)


def _reproduce(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    /,
    scale: Scale = "small",
    out: Path = Path("reproduced"),
) -> int:
    """Measure what a figure or a table needs, draw it, and say which findings hold.

    `dptrain reproduce --list` says what there is. What is measured is not measured again, so that a killed
    run goes on, and figures share their cases.

    Args:
        names: Figures and tables, or all.
        scale: small: tiny models, minutes on two cores. paper: the paper's models and batches, on a GPU.
        out: The folder for records, tables and figures.
    """
    if not names:
        raise ValueError("Say what to reproduce: all, or names of `dptrain reproduce --list`.")
    chosen = list(STUDIES.values()) if "all" in names else [study(name) for name in names]
    console = Terminal()
    cases = list(dict.fromkeys(case for one in chosen for case in one.cases(scale)))
    console.print(
        f"{len(cases)} cases in {escape(str(out))}, about {_duration(estimate_s(cases, scale))} if none is "
        "measured yet.",
        highlight=False,
    )
    for one in chosen:
        _write_manifest(one, scale, out)
    records = watched(console, cases, out)
    for one in chosen:  # what some say beside their cases follows from records
        _write_manifest(one, scale, out)
    with Terminal(stderr=True).status("Drawing ..."):
        report.build(out)
    for found in report.read(out).studies:
        if found.name in {one.name for one in chosen}:
            _show(console, report.show(found))
    console.print(escape(f"tables, figures, records and report.html: {out}"), highlight=False, soft_wrap=True)
    return SOME_FAILED if any(record.status == "error" for record in records) else 0


def _write_manifest(one: Study, scale: Scale, folder: Path) -> None:
    path = folder / "studies" / f"{one.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest(one, scale, Records(folder)), indent=1) + "\n", encoding="utf-8")


def _show(console: Console, shown: report.Shown) -> None:
    table = Table(title=escape(shown.title), title_justify="left")
    for name in shown.table.columns:
        table.add_column(str(name))
    for row in tables.words(shown.table).itertuples(index=False):
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)
    for finding in shown.findings:
        colour = COLOURS[finding.verdict]
        console.print(f"[{colour}]{finding.verdict}[/]  {escape(finding.claim)} {escape(finding.evidence)}")


def _list() -> int:
    console = Terminal()
    table = Table()
    for name in ("name", "what it shows", "needs", "small", "paper"):
        table.add_column(name)
    for one in STUDIES.values():
        cost = one.cost
        table.add_row(
            one.name,
            escape(one.shows),
            escape(one.needs),
            f"{cost['small']:.0f} min",
            f"{cost['paper']:.0f} GPU h",
        )
    console.print(table)
    table = Table(title="methods, as the original scripts call them", title_justify="left")
    for name in ("name there", "as a case here"):
        table.add_column(name)
    for name, case in seed_methods().items():
        options = [case.precision] * (case.precision != "fp32") + ["--compile"] * case.compile
        table.add_row(name, " ".join([case.measure, f"{case.engine}:{case.method}", *options]))
    console.print(table)
    return 0


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.0f} hours"
