"""An append-only record of what has been released, one JSON object a line.

An entry is on disk before its release is made, so that a crash can make the record claim
too much, never too little. A step that is repeated after a crash is a release of its own
and is counted again.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dptrain.core import accounting, checks
from dptrain.core.accounting import ADD_OR_REMOVE_ONE, PLD
from dptrain.core.spec import StepSpec


@dataclass(frozen=True)
class Release:
    """One noisy step.

    Attributes:
        step: its number in the run, from 0.
        spec: everything that its accounting reads.
    """

    step: int
    spec: StepSpec


class Ledger:
    """The record at `path`, created by the first `append`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, step: int, spec: StepSpec) -> None:
        """Record a release that is about to be made; returns once it is on disk.

        Raises:
            OSError: it could not be written; the release must then not be made.
        """
        entry = {"step": checks.whole("step", step, minimum=0), "spec": spec.to_dict()}
        line = json.dumps(entry, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            if self._ends_within_a_line():  # looks at one byte: a run appends thousands of lines
                file.truncate(self._complete_bytes())
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> tuple[Release, ...]:
        """All releases, in order; none if there is no file.

        A last line without its end is left out: the process died while writing it, hence
        before its release.

        Raises:
            ValueError: a complete line is not a release.
        """
        return tuple(self._entries())

    def epsilon(self, delta: float, neighbours: str = ADD_OR_REMOVE_ONE, accountant: str = PLD) -> float:
        """ε of all that is on record, computed from the record alone."""
        segments = accounting.merge([(release.spec, 1) for release in self._entries()])
        return accounting.epsilon(segments, delta, neighbours, accountant)

    def _entries(self) -> Iterator[Release]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return
            try:
                data: dict[str, Any] = checks.known_keys("a release", json.loads(line), ("step", "spec"))
                step = checks.whole("step", data["step"], minimum=0)
                yield Release(step, StepSpec.from_dict(data["spec"]))
            except (ValueError, TypeError) as error:
                raise ValueError(f"line {number} of {self.path} is not a release: {error}") from error

    def _ends_within_a_line(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def _complete_bytes(self) -> int:
        return self.path.read_bytes().rfind(b"\n") + 1
