"""Audits on the terminal: what is attacked, how far it is, what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dptrain.audit import KINDS, Audit, AuditRecord, run


def show_what_it_does(console: Console, audits: Sequence[Audit]) -> None:
    """The claim, and how it is attacked."""
    audit = audits[0]
    console.print(
        f"Claimed: epsilon {audit.epsilon:g} at delta {audit.delta:g}, {audit.steps} steps, sample rate "
        f"{audit.sample_rate:g}, clip norm {audit.clip_norm:g}, on {audit.device}; seed {audit.seed}.",
        highlight=False,
        soft_wrap=True,
    )
    for kind in dict.fromkeys(audit.kind for audit in audits):
        of_kind = [audit for audit in audits if audit.kind == kind]
        size = (
            f"{of_kind[0].runs:,} trainings in each of {len(of_kind[0].scenes)} scenes"
            if kind == "final-model"
            else f"{of_kind[0].canaries:,} canaries"
        )
        who = ", ".join(audit.subject for audit in of_kind)
        console.print(f"{kind}: {KINDS[kind]}; {size}: {who}.", highlight=False, soft_wrap=True)


def watched(console: Console, audits: Sequence[Audit]) -> Iterator[AuditRecord]:
    """Audit under a progress bar."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        for audit in audits:
            unit = "trainings" if audit.kind == "final-model" else "steps"
            task = progress.add_task(f"{escape(audit.subject)}, {audit.kind}, {unit}", total=None)
            record = run(audit, lambda done, of, task=task: progress.update(task, completed=done, total=of))
            progress.remove_task(task)
            yield record


def show_records(console: Console, records: Sequence[AuditRecord]) -> None:
    """A table for each kind: of each way to bound, the adversary who found out most."""
    for kind in dict.fromkeys(record.case.kind for record in records):
        of_kind = [record for record in records if record.case.kind == kind]
        if any(record.status == "ok" for record in of_kind):
            console.print(_table(of_kind))
    for record in records:
        if record.status != "ok":
            told = (
                f"[yellow]{record.status}[/]  {escape(record.case.subject)}: {escape(record.sentence or '')}"
            )
            console.print(told, highlight=False, soft_wrap=True)
    supposed = {
        finding["bound"]: finding["assumes"]
        for record in records
        for finding in record.results.get("findings", ())
    }
    for bound, assumes in supposed.items():
        what = "; ".join(["the canaries' coins are fair and secret", *assumes])
        console.print(f"[dim]{bound}: supposes that {what}.[/]", highlight=False, soft_wrap=True)


def _table(records: Sequence[AuditRecord]) -> Table:
    audit = records[0].case
    table = Table(
        title=f"{audit.kind}: epsilon is at least, at delta {audit.delta:g} and {100 * audit.confidence:g} % "
        "confidence",
        title_justify="left",
    )
    table.add_column("subject")
    table.add_column("bound")
    table.add_column("adversary")
    table.add_column("epsilon", justify="right")
    table.add_column(f"claim: {audit.epsilon:g}", no_wrap=True)
    for record in records:
        for finding in _best_of_each_bound(record) if record.status == "ok" else ():
            refuted = finding["epsilon"] > audit.epsilon
            table.add_row(
                escape(record.case.subject),
                finding["bound"],
                finding["adversary"],
                f"{finding['epsilon']:.2f}",
                "[bold red]refuted[/]" if refuted else "[green]not refuted[/]",
            )
    return table


def _best_of_each_bound(record: AuditRecord) -> list[dict]:
    best: dict[str, dict] = {}
    for finding in record.results["findings"]:
        name = finding["bound"]
        if name not in best or finding["epsilon"] > best[name]["epsilon"]:
            best[name] = finding
    return list(best.values())
