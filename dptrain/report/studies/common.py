"""What the studies share: tables that drop nothing, series, and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dptrain.report import names, palette
from dptrain.report.errors import needs
from dptrain.report.intervals import Interval
from dptrain.report.reading import Record, Study
from dptrain.report.shown import Axis, Chart, Finding, Look, Series

if TYPE_CHECKING:
    import pandas as pd

Getter = Callable[[Record], Any]
Number = Callable[[Record], float | None]
Bounds = Callable[[Record], Interval | None]

SMALL = "At small scale"
PER_EXAMPLE = ("per-example", "per-example-vmap")

#: what a case is, for people; of these a table has those that differ between its records
_ABOUT: dict[str, Getter] = {
    "Model": lambda r: names.model(r.model),
    "Library": lambda r: names.library(r.case["engine"]),
    "Method": lambda r: r.method,
    "Precision": lambda r: names.precision(str(r.case.get("precision", "fp32"))),
    "Physical batch": lambda r: r.case.get("batch_size"),
    "Devices": lambda r: r.case.get("devices", 1),
    "Memory (GiB)": lambda r: r.case.get("memory_gib"),
    "Compiled": lambda r: "yes" if r.case.get("compile") else "no",
    "Channels last": lambda r: "yes" if r.case.get("channels_last") else "no",
    "Input size": lambda r: r.case.get("image_size"),
    "Physical batches per step": lambda r: r.case.get("accumulate"),
    "Classes": lambda r: r.case.get("num_classes"),
    "Device": lambda r: device(r),
}


def device(record: Record) -> str:
    """The GPU's name, or CPU."""
    if str(record.case.get("device", "cpu")).startswith("cuda"):
        gpu = (record.environment.get("machine") or {}).get("gpu")
        return str(gpu[0] if isinstance(gpu, list) and gpu else gpu or "GPU")
    return "CPU"


def table(
    study: Study,
    values: Mapping[str, Getter],
    always: Sequence[str] = ("Model", "Library", "Method"),
    never: Sequence[str] = (),
    also: Mapping[str, Getter] | None = None,
    records: Iterable[Record] | None = None,
) -> pd.DataFrame:
    """One row for each record, whatever its status.

    Args:
        values: columns that only a record with a result fills.
        always: fields of the case that are columns even where all records agree.
        never: fields that are no columns here, as they do not bear on what is shown.
        also: columns of every row, beside what the case is: the paper's number, say.
        records: instead of all of the study's.
    """
    pandas = needs("pandas")
    chosen = list(study.records if records is None else records)
    about = {
        name: get
        for name, get in _ABOUT.items()
        if name not in never and (name in always or len({get(r) for r in chosen}) > 1)
    }
    about = {name: about[name] for name in (*always, *about) if name in about}
    rows = [
        {name: get(r) for name, get in about.items()}
        | {name: get(r) if r.ok else None for name, get in values.items()}
        | {name: get(r) for name, get in (also or {}).items()}
        | {"Status": status(r)}
        for r in chosen
    ]
    columns = [*about, *values, *(also or {}), "Status"]
    found = pandas.DataFrame(rows, columns=list(dict.fromkeys(columns)))
    # A column of a paper's numbers none of which is known here, say of models that it does not have.
    empty = [name for name in also or {} if rows and found[name].isna().all()]
    return found.drop(columns=empty)


def status(record: Record) -> str:
    """``ok``, or what happened, and why."""
    if record.ok:
        return f"ok, but {record.unsound}" if record.unsound else "ok"
    return f"{record.status}: {record.sentence}" if record.sentence else record.status


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A table that is not one row for each record."""
    return needs("pandas").DataFrame(list(rows), columns=list(columns))


def common_note(study: Study) -> tuple[str, ...]:
    """What all records agree on, in a sentence; and how many are missing."""
    notes = []
    if study.records:
        shared = []
        for name in ("Model", "Input size", "Physical batch", "Precision", "Device"):
            found = {_ABOUT[name](r) for r in study.records}
            if len(found) == 1 and (value := found.pop()) not in (None, ""):
                shared.append(f"{name.lower() if name != 'Device' else 'device'} {value}")
        if shared:
            notes.append(f"Common to all: {', '.join(shared)}.")
    if study.missing:
        total = len(study.missing) + len(study.records)
        notes.append(f"{len(study.missing)} of {total} cases are not measured yet.")
    if any(r.ok and r.unsound for r in study.records):
        notes.append("† Leaves parameters out or clips wrongly: its speed is no result.")
    return tuple(notes)


def ordered_models(records: Iterable[Record]) -> list[str]:
    """Names of models, the paper's by size, then the others as they come."""
    found = dict.fromkeys(r.model for r in records)
    return sorted(found, key=names.model_rank)


def ways(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by library and method: non-private first, then by method, ours first."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(series_name(record), []).append(record)
    return dict(sorted(found.items(), key=lambda item: _rank(item[1][0])))


def series_name(record: Record) -> str:
    """Library, method and, where it is not FP32, precision; marked where its speed is no result."""
    lower = record.case.get("precision", "fp32")
    suffix = "" if lower == "fp32" else f", {names.precision(lower)}"
    return record.way + suffix + ("†" if record.unsound else "")


def by_way(records: Iterable[Record]) -> dict[str, list[Record]]:
    """As `ways`, all precisions of a way together."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.way, []).append(record)
    return dict(sorted(found.items(), key=lambda item: _rank(item[1][0])))


def _rank(record: Record) -> tuple[int, int, str]:
    method = record.method
    rank = names.METHODS.index(method) if method in names.METHODS else len(names.METHODS)
    libraries = list(names.LIBRARIES)
    library = libraries.index(record.engine) if record.engine in libraries else len(libraries)
    return rank, library, record.engine


def look(record: Record) -> Look:
    """How a record's way of training looks; lower precision is dotted."""
    usual = palette.look(record.engine, record.method, faint=bool(record.unsound))
    return usual if record.case.get("precision", "fp32") == "fp32" else replace(usual, line="dot")


def series(
    name: str,
    records: Sequence[Record],
    x: Getter,
    y: Number,
    appearance: Look,
    bounds: Bounds | None = None,
) -> Series:
    """Points of the records that have a `y`, in the order of the records."""
    points = [(r, value) for r in records if (value := y(r)) is not None]
    return Series(
        name=name,
        x=tuple(x(r) for r, _ in points),
        y=tuple(value for _, value in points),
        look=appearance,
        intervals=tuple(bounds(r) for r, _ in points) if bounds else (),
    )


def lines(
    records: Iterable[Record], x: Getter, y: Number, bounds: Bounds | None = None
) -> tuple[Series, ...]:
    """A line for each way of training, over numbers `x`."""
    return tuple(
        made
        for name, group in ways(records).items()
        if (made := series(name, sorted(group, key=x), x, y, look(group[0]), bounds)).x
    )


def over_models(
    records: Sequence[Record],
    title: str,
    y: Axis,
    value: Number,
    bounds: Bounds | None = None,
    reference: tuple[float, str] | None = None,
) -> tuple[Chart, ...]:
    """A panel for each family of models: lines over their sizes, a ranking where there is one size."""
    panels = []
    families = dict.fromkeys(names.family(m) for m in ordered_models(records))
    for family in families:
        group = [r for r in records if names.family(r.model) == family]
        models = ordered_models(group)
        heading = f"{title}, {family}" if len(families) > 1 else title
        if len(models) == 1:
            where = f"{title}, {names.model(models[0])}"
            panels.append(ranking(group, where, y, value, bounds, reference))
            continue
        made = tuple(
            line
            for name, own in ways(group).items()
            if (
                line := series(
                    name,
                    sorted(own, key=lambda r: models.index(r.model)),
                    lambda r: names.model(r.model),
                    value,
                    look(own[0]),
                    bounds,
                )
            ).x
        )
        sizes = Axis("model", categories=tuple(map(names.model, models)))
        panels.append(Chart("line", heading, sizes, y, made, reference))
    return tuple(panels)


def ranking(
    records: Iterable[Record],
    title: str,
    y: Axis,
    value: Number,
    bounds: Bounds | None = None,
    reference: tuple[float, str] | None = None,
    name: Callable[[Record], str] = series_name,
    appearance: Callable[[Record], Look] = look,
) -> Chart:
    """A horizontal bar for each record."""
    chosen = [(r, v) for group in ways(records).values() for r in group if (v := value(r)) is not None]
    bars = Series(
        name=title,
        x=tuple(name(r) for r, _ in chosen),
        y=tuple(v for _, v in chosen),
        look=Look("ideal"),
        intervals=tuple(bounds(r) for r, _ in chosen) if bounds else (),
        looks=tuple(appearance(r) for r, _ in chosen),
    )
    return Chart("ranking", title, Axis(""), y, (bars,), reference)


def pick(
    records: Iterable[Record], method: str | Sequence[str], engines: Sequence[str] = ("torch",)
) -> list[Record]:
    """The records with a result of one of the methods, by the first of the engines that has any.

    Those whose gradients are what was asked for come before others.
    """
    wanted = (method,) if isinstance(method, str) else tuple(method)
    found = [r for r in records if r.ok and r.method in wanted]
    for sound_only in (True, False):
        for engine in engines:
            own = [r for r in found if r.engine == engine and not (sound_only and r.unsound)]
            if own:
                return own
    return []


def per_example(records: Iterable[Record], engines: Sequence[str] = ("opacus", "torch")) -> list[Record]:
    """Records of per-example clipping: the first engine's, by hooks or uses, else under vmap."""
    chosen = list(records)
    for engine in engines:
        for method in PER_EXAMPLE:
            if found := pick(chosen, method, (engine,)):
                return found
    return []


def finding(claim: str, holds: bool | None, evidence: str, study: Study | None = None) -> Finding:
    """A claim judged. `holds` None: not measured. With a study of small scale the evidence says so."""
    if holds is None:
        return Finding(claim, "not measured", evidence)
    if study is not None and study.scale == "small":
        evidence = f"{SMALL}: {evidence}"
    return Finding(claim, "confirmed" if holds else "refuted", f"{evidence.rstrip('.')}.")


def on_paper_hardware(claim: str, holds: bool | None, evidence: str, study: Study) -> Finding:
    """A claim about absolute numbers of the paper's models and devices: judged at its scale alone."""
    if study.scale != "paper":
        said = f" Here: {evidence}" if holds is not None else ""
        return Finding(claim, "not measured", f"It needs the paper's models on a GPU (--scale paper).{said}")
    return finding(claim, holds, evidence)


def near(value: float, wanted: float, share: float) -> bool:
    """Whether a value is within a share of what is wanted."""
    return abs(value - wanted) <= share * abs(wanted)


def times(value: float) -> str:
    """×3.1"""
    return f"×{value:.3g}" if value < 100 else f"×{value:,.0f}"


def percent(share: float, digits: int = 1) -> str:
    """69.2 %"""
    return f"{100 * share:.{digits}f} %"


def listed(parts: Iterable[str], most: int = 6) -> str:
    """a, b, c and 4 more"""
    found = list(parts)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
