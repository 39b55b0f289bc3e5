"""An append-only record of what has been released, one JSON object a line, each bound to all before it.

An entry is on disk before its release is made, so that a crash can make the record claim too much, never
too little. A step that is repeated with fresh randomness is a release of its own and is counted again; one
that is repeated bit for bit is none.

The first line names the data set, as the user does: never by anything computed from its content. Each line
ends with the SHA-256 of the one before and of itself. Who changes, removes or inserts a line breaks the
chain; who cuts lines off the end is found out by a checkpoint, which carries the length and the last link.
It is no signature: whoever can write the file can write another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dptrain.core import accounting, checks
from dptrain.core.accounting import ADD_OR_REMOVE_ONE, PLD, Segments
from dptrain.core.durable import flush
from dptrain.core.files import Unreadable, parse_json, size_of
from dptrain.core.spec import StepSpec

_FORMAT = 2
_LONGEST_LINE = 2**16
_MOST_BYTES = 2**33
_RUN = re.compile("[0-9a-f]{32}")  # names a file (`dptrain.core.key_file`), and no other
_HEAD = ("ledger", "run", "dataset", "neighbours", "link")
_ENTRY = ("step", "spec", "fingerprint", "link")


class LedgerError(ValueError):
    """A record that cannot be trusted or continued. The message says where, and what to do."""


@dataclass(frozen=True)
class Release:
    """One noisy step.

    Attributes:
        step: its number in the run, from 0.
        spec: everything that its accounting reads.
        fingerprint: SHA-256 of the noisy gradient, by which a repetition is known to be the same; None
            where repetitions are drawn afresh.
    """

    step: int
    spec: StepSpec
    fingerprint: str | None = None


@dataclass(frozen=True)
class Mark:
    """How far a ledger was at some time.

    Attributes:
        length: number of releases.
        link: of the last line.
    """

    length: int
    link: str


class Ledger:
    """The record in one file: made by `create`, continued by `open`, read by `read`.

    Attributes:
        run: 128 random bits that name the run, in hexadecimal.
        dataset: the name of the data set.
        neighbours: the neighbouring relation that its releases are accounted under.
        releases: all of them, in order.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.run: str = head["run"]
        self.dataset: str = head["dataset"]
        self.neighbours: str = head["neighbours"]
        self.releases: list[Release] = []
        self._links: list[str] = [head["link"]]
        self._file: IO[bytes] | None = None

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], *, dataset: str, neighbours: str = ADD_OR_REMOVE_ONE
    ) -> Ledger:
        """A new record, on disk and locked for this process.

        Args:
            dataset: the name under which releases from the same data are added up.
            neighbours: a key of `dptrain.core.accounting.RELATIONS`.

        Raises:
            LedgerError: there is a file already.
            OSError: it cannot be written.
        """
        path = Path(path)
        checks.one_of("neighbouring relation", neighbours, accounting.RELATIONS)
        if not isinstance(dataset, str) or not dataset:
            raise LedgerError(f"a ledger needs the name of its data set, and was given {dataset!r}.")
        head = {"ledger": _FORMAT, "run": os.urandom(16).hex(), "dataset": dataset, "neighbours": neighbours}
        line = _linked("", head)
        try:
            file = path.open("xb", buffering=0)
        except FileExistsError as error:
            raise LedgerError(f"{path} exists: a ledger is never overwritten.") from error
        made = cls(path, json.loads(line))
        made._file = _locked(file, path)
        made._write(line)
        flush(path.parent)
        return made

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Ledger:
        """A record to be continued, locked for this process.

        A last line without its end is removed: the process died while writing it, hence before its release.

        Raises:
            LedgerError: there is none, it is damaged, or another process is writing to it.
        """
        path = Path(path)
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError as error:
            raise LedgerError(f"there is no ledger {path}.") from error
        _locked(file, path)
        try:
            ledger = cls.read(path)
            whole = sum(map(len, _lines(path)))
            file.truncate(whole)
            file.seek(whole)
        except BaseException:
            file.close()
            raise
        ledger._file = file
        return ledger

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Ledger:
        """A record to be looked at.

        Raises:
            LedgerError: there is none, or a complete line is no release or breaks the chain.
        """
        path = Path(path)
        numbered = enumerate(_lines(path), 1)
        head = _head(path, numbered)
        ledger = cls(path, head)
        specs: dict[str, StepSpec] = {}  # equal lines of a long run are read once
        for number, line in numbered:
            entry = _parsed(path, number, line, _ENTRY, ledger._links[-1])
            ledger._add(_release(path, number, entry, specs), entry["link"])
        return ledger

    @property
    def mark(self) -> Mark:
        """How far it is."""
        return Mark(len(self.releases), self._links[-1])

    def check_continues(self, mark: Mark) -> None:
        """Raise unless this record goes on from `mark`.

        Raises:
            LedgerError: releases that were there then are missing, or other ones stand in their place.
        """
        if mark.length > len(self.releases):
            raise LedgerError(
                f"{self.path} holds {len(self.releases)} releases, but {mark.length} had been made when the "
                "checkpoint was written: put the whole ledger back."
            )
        if self._links[mark.length] != mark.link:
            raise LedgerError(
                f"{self.path} is not the ledger that the checkpoint was written with: put that one back."
            )

    def append(self, step: int, spec: StepSpec, fingerprint: str | None = None) -> None:
        """Record a release that is about to be made; returns once it is on disk.

        Raises:
            OSError: it could not be written; the release must then not be made, and the ledger takes no
                other one until it is opened again.
            LedgerError: it was only read, or such an error has closed it.
        """
        if self._file is None:
            raise LedgerError(f"{self.path} is not open for writing: open it with Ledger.open.")
        release = Release(checks.whole("step", step, minimum=0), spec, fingerprint)
        entry = {"step": release.step, "spec": spec.to_dict(), "fingerprint": fingerprint}
        line = _linked(self._links[-1], entry)
        self._write(line)
        self._add(release, json.loads(line)["link"])

    def close(self) -> None:
        """Let other processes write to it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def segments(self) -> Segments:
        """All releases as runs of equal steps; of shuffled epochs, all steps of those that were begun."""
        return accounting.recorded((release.step, release.spec) for release in self.releases)

    def epsilon(self, delta: float, accountant: str = PLD) -> float:
        """ε of all that is on record, computed from the record alone."""
        return accounting.epsilon(self.segments, delta, self.neighbours, accountant)

    def _add(self, release: Release, link: str) -> None:
        self.releases.append(release)
        self._links.append(link)

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        try:
            if self._file.write(line) != len(line):  # a full disk may take a part
                raise OSError(28, os.strerror(28), str(self.path))
            os.fsync(self._file.fileno())
        except OSError:
            # What is on disk is not known: `open` will look.
            self.close()
            raise


def together(ledgers: Iterable[Ledger]) -> dict[str, tuple[Segments, str]]:
    """By data set: all releases from it, and the relation that they are accounted under.

    Raises:
        LedgerError: two ledgers of one data set have different relations, or are of one and the same run.
    """
    found: dict[str, tuple[Segments, str]] = {}
    runs: dict[str, Path] = {}
    for ledger in ledgers:
        if ledger.run in runs:
            raise LedgerError(f"{ledger.path} and {runs[ledger.run]} are of the same run: give one of them.")
        runs[ledger.run] = ledger.path
        segments, neighbours = found.get(ledger.dataset, ((), ledger.neighbours))
        if neighbours != ledger.neighbours:
            raise LedgerError(
                f"the releases from {ledger.dataset!r} are accounted under '{neighbours}' and "
                f"'{ledger.neighbours}': they cannot be added up."
            )
        found[ledger.dataset] = (accounting.merge([*segments, *ledger.segments]), neighbours)
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """The complete ones.

    Raises:
        LedgerError: there is no such file, or one with lines that no ledger has.
    """
    try:
        size_of(path, _MOST_BYTES)
        with path.open("rb") as file:
            while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                yield line
    except Unreadable as error:
        raise LedgerError(f"the ledger {path} {error}.") from error
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be read ({error.strerror}).") from error
    if len(line) == _LONGEST_LINE:
        raise LedgerError(f"{path} is no ledger: it has a line of more than {_LONGEST_LINE:,} bytes.")


def _locked(file: IO[bytes], path: Path) -> IO[bytes]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise LedgerError(f"another process is writing to {path}: wait for it, or end it.") from error
    return file


def _text(data: dict[str, Any]) -> str:
    return json.dumps(data, allow_nan=False, sort_keys=True)


def _link(before: str, data: dict[str, Any]) -> str:
    return hashlib.sha256(f"{before}\n{_text(data)}".encode()).hexdigest()


def _linked(before: str, data: dict[str, Any]) -> bytes:
    """A line that continues the chain."""
    return (_text(data | {"link": _link(before, data)}) + "\n").encode()


def _head(path: Path, lines: Iterator[tuple[int, bytes]]) -> dict[str, Any]:
    number, line = next(lines, (1, b""))
    if not line:
        raise LedgerError(f"{path} is empty: nothing has been released, and it can be removed.")
    head = _parsed(path, number, line, _HEAD, "")
    words = ("run", "dataset", "neighbours")
    texts = all(isinstance(head[word], str) for word in words)
    if head["ledger"] != _FORMAT or not texts or not _RUN.fullmatch(head["run"]):
        raise LedgerError(f"{path} is no ledger of format {_FORMAT}, which this version reads.")
    try:
        checks.one_of("neighbouring relation", head["neighbours"], accounting.RELATIONS)
    except ValueError as error:
        raise LedgerError(f"line 1 of {path}: {error}") from error
    return head


def _parsed(path: Path, number: int, line: bytes, keys: tuple[str, ...], before: str) -> dict[str, Any]:
    """One line as data, its link checked."""
    try:
        data: dict[str, Any] = checks.known_keys("a line of a ledger", parse_json(line.decode()), keys)
    except UnicodeDecodeError as error:
        raise LedgerError(f"line {number} of {path} is not one of a ledger: it is not UTF-8.") from error
    except Unreadable as error:
        raise LedgerError(f"line {number} of {path} {error}: put the original back.") from error
    except (ValueError, TypeError) as error:
        raise LedgerError(f"line {number} of {path} is not one of a ledger: {error}") from error
    own = {key: value for key, value in data.items() if key != "link"}
    try:
        whole = data["link"] == _link(before, own)
    except ValueError:  # not a number that JSON has
        whole = False
    if not whole:
        raise LedgerError(
            f"line {number} of {path} does not continue the lines before it: the file was changed after it "
            "was written; put the original back."
        )
    return data


def _release(path: Path, number: int, entry: dict[str, Any], specs: dict[str, StepSpec]) -> Release:
    try:
        step = checks.whole("step", entry["step"], minimum=0)
        text = _text(entry["spec"])
        if text not in specs:
            specs[text] = StepSpec.from_dict(entry["spec"])
        fingerprint = entry["fingerprint"]
        if fingerprint is not None and not isinstance(fingerprint, str):
            raise TypeError("its fingerprint is not a text.")
    except (ValueError, TypeError) as error:
        raise LedgerError(f"line {number} of {path} is not a release: {error}") from error
    return Release(step, specs[text], fingerprint)
