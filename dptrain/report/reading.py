"""A folder of records and studies, read. docs/records.md describes the files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptrain.report import names
from dptrain.report.errors import ReportError, needs

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
LARGEST = 64 * 2**20
"""Bytes of a file that is read."""
STATUSES = ("ok", "out-of-memory", "unsupported", "error")


@dataclass(frozen=True)
class Record:
    """One case, measured, as it was found.

    Attributes:
        case: the fields of the case.
        results: by measure; empty unless the status is ok.
    """

    id: str
    case: Mapping[str, Any]
    status: str
    sentence: str | None = None
    traceback: str | None = None
    seconds: float = 0.0
    environment: Mapping[str, Any] = field(default_factory=dict)
    quiet: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def measure(self) -> str:
        return str(self.case["measure"])

    @property
    def engine(self) -> str:
        """torch, jax, or a peer, however it is written."""
        return names.engine(self.case["engine"])

    @property
    def method(self) -> str:
        """The method's own name, whatever the record calls it."""
        return names.method(self.case["method"])

    @property
    def is_private(self) -> bool:
        return self.method != "non-private"

    @property
    def model(self) -> str:
        return str(self.case["model"])

    @property
    def way(self) -> str:
        """Library and method, for people."""
        return names.way(self.case["engine"], self.case["method"])

    @property
    def setting(self) -> dict[str, Any]:
        """The settings of a training run that are not fields of a case."""
        return {str(name): value for name, value in self.case.get("settings", ())}

    @property
    def unsound(self) -> str | None:
        """Why its speed is no result: the gradients are not what was asked for. None where they are."""
        trains = self.results.get("trains") or {}
        if skipped := trains.get("skipped"):
            first, more = skipped[0], len(skipped) - 1
            return f"leaves {first}{f' and {more} more' if more else ''} out of training"
        if (self.results.get("exactness") or {}).get("verdict") == "WRONG":
            return "clipped gradients are wrong"
        return None


@dataclass(frozen=True)
class Study:
    """The records of a figure or a table, in order.

    Attributes:
        missing: ids of cases that have no record yet.
        extra: what else its file holds, such as the curves of the simulation.
    """

    name: str
    title: str
    shows: str = ""
    scale: str = "small"
    records: tuple[Record, ...] = ()
    missing: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def ok(self, measure: str | None = None) -> list[Record]:
        """The records that hold a result, of one measure or of any."""
        return [r for r in self.records if r.ok and measure in (None, r.measure)]


@dataclass(frozen=True)
class Folder:
    """All records of a folder, by id, and its studies; what no study lists belongs to a study by measure."""

    path: Path
    records: Mapping[str, Record]
    studies: tuple[Study, ...]


def read(path: Path | str) -> Folder:
    """Everything that `dptrain bench` and `dptrain reproduce` wrote into a folder.

    Raises:
        ReportError: the folder has neither records nor studies, or a file is damaged.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise ReportError(f"{path} is not a folder; give one that dptrain bench or reproduce wrote.")
    records = {r.id: r for r in map(read_record, sorted((path / "records").glob("*.json")))}
    studies = [_study(file, records) for file in sorted((path / "studies").glob("*.json"))]
    if not records and not any(study.extra for study in studies):
        raise ReportError(f"{path} has no records; run dptrain bench or dptrain reproduce with this folder.")
    return Folder(path, records, (*studies, *_unlisted(records, studies)))


def read_record(file: Path | str) -> Record:
    """One record. Raises ReportError, with the file's name, if it is damaged or of another format."""
    file = Path(file)
    values = _json(file)
    if values.get("format") != FORMAT:
        raise ReportError(
            f"{file} is a record of format {values.get('format')!r}, and this version reads format {FORMAT}."
        )
    try:
        case, status = values["case"], values["status"]
        said = {key: case[key] for key in ("measure", "engine", "method", "model")}
        whole = all(isinstance(v, str) for v in (values["id"], *said.values())) and status in STATUSES
        record = Record(
            id=values["id"],
            case=case,
            status=status,
            sentence=values.get("sentence"),
            traceback=values.get("traceback"),
            seconds=float(values.get("seconds") or 0.0),
            environment=dict(values.get("environment") or {}),
            quiet=dict(values.get("quiet") or {}),
            results=dict(values.get("results") or {}),
            warnings=tuple(map(str, values.get("warnings") or ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = error if isinstance(error, KeyError) else "a value"
        raise ReportError(_damaged(file, f"it lacks or garbles {what}")) from error
    if not whole:
        raise ReportError(_damaged(file, "its case or its status is none"))
    return record


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row for each record: the case's fields, the status, and the results, flattened.

    Nested results have dotted names (``exactness.verdict``); lists stay as they are.
    """
    pandas = needs("pandas")
    rows = []
    for r in records:
        about = {"id": r.id, "status": r.status, "sentence": r.sentence, "seconds": r.seconds}
        case = {k: v for k, v in r.case.items() if k != "settings"}
        rows.append(about | case | r.setting | _flat(r.results))
    return pandas.DataFrame(rows)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _json(file: Path) -> dict[str, Any]:
    try:
        if not file.is_file():  # a pipe would keep us waiting
            raise ReportError(f"{file} is not a file; remove it.")
        if (size := file.stat().st_size) > LARGEST:
            raise ReportError(f"{file} has {size:,} bytes, more than {LARGEST:,} are not read.")
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{file} cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise ReportError(_damaged(file, "it nests too deep")) from error
    except ReportError:
        raise
    except ValueError as error:
        raise ReportError(_damaged(file, "it is not JSON")) from error
    if not isinstance(values, dict):
        raise ReportError(_damaged(file, "it is not a JSON object"))
    return values


def _damaged(file: Path, why: str) -> str:
    return f"{file} is damaged: {why}; remove it and measure its case again."


def _study(file: Path, records: Mapping[str, Record]) -> Study:
    values = _json(file)
    known = ("name", "title", "shows", "scale", "cases")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", str(values.get("name"))):
        raise ReportError(f"{file} is not a study: its name is to be letters, digits and hyphens; remove it.")
    try:
        ids = [str(case) for case in values.get("cases") or ()]
        return Study(
            name=str(values["name"]),
            title=str(values.get("title") or values["name"]),
            shows=str(values.get("shows") or ""),
            scale=str(values.get("scale") or "small"),
            records=tuple(records[i] for i in ids if i in records),
            missing=tuple(i for i in ids if i not in records),
            extra={k: v for k, v in values.items() if k not in known},
        )
    except (KeyError, TypeError) as error:
        raise ReportError(f"{file} is not a study: it lacks or garbles {error}; remove it.") from error


def _unlisted(records: Mapping[str, Record], studies: Sequence[Study]) -> list[Study]:
    listed = {r.id for study in studies for r in study.records}
    by_measure: dict[str, list[Record]] = {}
    for record in records.values():
        if record.id not in listed:
            by_measure.setdefault(record.measure, []).append(record)
    return [
        Study(f"bench-{measure}", measure.capitalize().replace("-", " "), "", "paper", tuple(found))
        for measure, found in by_measure.items()
    ]
