"""What came of a case: an immutable JSON file, ``FOLDER/records/ID.json``. Its fields: docs/records.md."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dptrain.bench.case import Case
from dptrain.core.files import MIB, read_json

Status = Literal["ok", "out-of-memory", "unsupported", "error"]
FORMAT = 1
LARGEST = 64 * MIB
#: a case with such a record is not measured again; what is unsupported today may be supported tomorrow
FINAL = ("ok", "out-of-memory")


KINDS: dict[str, Any] = {
    "case": dict,
    "status": str,
    "sentence": str | None,
    "traceback": str | None,
    "seconds": float | int,
    "environment": dict,
    "quiet": dict,
    "results": dict,
    "warnings": list,
}


@dataclass(frozen=True)
class Record:
    """One case, measured.

    Attributes:
        status: ``unsupported`` means that the engine does not do this, ``error`` anything unexpected.
        sentence: why, where the status is not ok.
        traceback: of an error.
        seconds: that the whole case took.
        environment: commit, versions, machine.
        quiet: how busy others kept the machine meanwhile.
        results: by measure; raw samples among them.
    """

    case: Case
    status: Status
    sentence: str | None = None
    traceback: str | None = None
    seconds: float = 0.0
    environment: dict[str, Any] = field(default_factory=dict)
    quiet: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        changed = {"case": self.case.to_dict(), "warnings": list(self.warnings)}
        return {"format": FORMAT, "id": self.case.id, **fields, **changed}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """Raises ValueError for a record of another format, or what is none."""
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise ValueError(f"a record of format {found!r} cannot be read; {FORMAT} can.")
        if damaged := [name for name, kind in KINDS.items() if not isinstance(values.get(name), kind)]:
            raise ValueError(f"a record has no such {damaged[0]}; remove it and measure its case again.")
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        fields |= {"case": Case.from_dict(values["case"]), "warnings": tuple(values["warnings"])}
        return cls(**fields)


class Records:
    """The records in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder / "records"

    def path(self, case: Case) -> Path:
        """Where the record of a case is, or would be."""
        return self.folder / f"{case.id}.json"

    def get(self, case: Case) -> Record | None:
        """The record of a case; None if there is none, or it is damaged or of another case."""
        try:
            record = Record.from_dict(read_json(self.path(case), LARGEST))
        except (ValueError, KeyError, TypeError, OverflowError):
            return None
        return record if record.case == case and record.status in get_args(Status) else None

    def put(self, record: Record) -> Path:
        """Write it whole or not at all."""
        path = self.path(record.case)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)
        return path

    def __iter__(self) -> Iterator[Record]:
        for path in sorted(self.folder.glob("*.json")):
            yield Record.from_dict(read_json(path, LARGEST))
