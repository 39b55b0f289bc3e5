"""One HTML file that holds everything: figures to move in, tables to sort, findings, environment."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dptrain.report import interactive, studies
from dptrain.report.errors import needs
from dptrain.report.palette import COLOURS
from dptrain.report.reading import STATUSES, Folder, Record, read
from dptrain.report.shown import Shown, Verdict
from dptrain.report.tables import numeric
from dptrain.report.words import written

VERDICTS: tuple[Verdict, ...] = ("confirmed", "refuted", "not measured")


def page(folder: Path | str, out: Path | str) -> Path:
    """Write the report of a folder as one file that needs no network.

    Raises:
        ReportError: the folder has no records, one is damaged, or a library of the extra is missing.
    """
    read_folder = read(folder)
    shown = [studies.show(study) for study in studies.in_order(read_folder.studies)]
    return write_page(read_folder, shown, Path(out))


def write_page(folder: Folder, shown: Sequence[Shown], out: Path) -> Path:
    """As `page`, of what has been read and made already."""
    jinja2 = needs("jinja2")
    scripts = {"plotly": needs("plotly.offline").get_plotlyjs(), "page": _file("page.js")}
    scales = {study.name: study.scale for study in folder.studies}
    records = list(folder.records.values())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_file("page.html.jinja"))
    html = template.render(
        title=f"dptrain report: {folder.path.resolve().name}",
        style=jinja2.utils.markupsafe.Markup(_file("page.css")),
        colours=COLOURS,
        scripts={name: jinja2.utils.markupsafe.Markup(text) for name, text in scripts.items()},
        hashes=[_hash(text) for text in scripts.values()],
        studies=[_section(one, scales.get(one.name, "")) for one in shown],
        verdicts=[(v, sum(f.verdict == v for one in shown for f in one.findings)) for v in VERDICTS],
        statuses=[(s, sum(r.status == s for r in records)) for s in STATUSES],
        failures=_failures(records),
        environment=_environment(records),
        total=len(records),
        seconds=sum(r.seconds for r in records),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def _file(name: str) -> str:
    return resources.files("dptrain.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """What a content security policy calls a script: no other one may run, whatever a record holds."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _section(shown: Shown, scale: str) -> dict[str, Any]:
    columns = [{"name": str(c), "numeric": numeric(shown.table, c)} for c in shown.table.columns]
    rows = [
        [{"text": written(cell), "value": _sort_key(cell)} for cell in row]
        for row in shown.table.to_numpy().tolist()
    ]
    return {
        "name": shown.name,
        "title": shown.title,
        "shows": shown.shows,
        "scale": scale if not shown.name.startswith("bench-") else "",
        "columns": columns,
        "rows": rows,
        "panels": [{"title": c.title, "figure": interactive.figure(c)} for c in shown.panels],
        "findings": shown.findings,
        "verdicts": Counter(f.verdict for f in shown.findings),
        "notes": shown.notes,
    }


def _sort_key(cell: Any) -> str:
    """Numbers as they are, for the script sorts by them; nothing for what is missing."""
    if isinstance(cell, bool) or cell is None or cell != cell:
        return ""
    return repr(float(cell)) if isinstance(cell, int | float) else str(cell)


def _failures(records: Sequence[Record]) -> list[dict[str, Any]]:
    """What has no result, by status and sentence, with the ids of the cases."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if not record.ok:
            groups.setdefault((record.status, record.sentence or "No reason is given."), []).append(record)
    order = {status: place for place, status in enumerate(STATUSES)}
    return [
        {
            "status": status,
            "sentence": sentence,
            "ids": [r.id for r in group],
            "traceback": next((r.traceback for r in group if r.traceback), None),
        }
        for (status, sentence), group in sorted(
            groups.items(), key=lambda item: (order[item[0][0]], item[0][1])
        )
    ]


def _environment(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What the records say of where they come from; several values where they disagree."""
    said: dict[str, Counter[str]] = {}

    def note(name: str, value: Any) -> None:
        if value not in (None, "", {}):
            said.setdefault(name, Counter())[_plain(value)] += 1

    for record in records:
        found = record.environment
        commit = str(found.get("commit") or "")[:12]
        note("Commit", f"{commit}, with changes" if commit and found.get("changed_since_commit") else commit)
        machine = found.get("machine")
        for name, value in (machine if isinstance(machine, Mapping) else {"machine": machine}).items():
            note(str(name).capitalize() if name != "gpu" else "GPU", value)
        note("Threads", found.get("threads"))
        note("Python", found.get("python"))
        versions = found.get("versions")
        for name, value in (versions if isinstance(versions, Mapping) else {}).items():
            note(str(name), value)
        note("Date", found.get("date"))
    few = 4
    return [
        (
            name,
            "; ".join(v for v, _ in values.most_common(few)) + (" and others" if len(values) > few else ""),
        )
        for name, values in said.items()
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
