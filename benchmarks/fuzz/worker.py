"""A process that feeds inputs of one target, and tells of each before it begins."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.fuzz.target import Result, Target, judge, place
from benchmarks.fuzz.targets import TARGETS

MEMORY_BYTES = 3 << 29
"""What one input may take beyond what the libraries have."""
LIMIT_S = 10.0
"""Of processor time, per input."""
WAIT_S = 100.0
"""Of wall-clock time, per input: for what waits, on a machine that others keep busy."""
KEPT = 5  # inputs that are kept of each kind of bug


class Hang(BaseException):
    """An input has taken too long."""


def _too_long(signum: int, frame: FrameType | None) -> None:
    raise Hang


@contextmanager
def limited_memory(more: int = MEMORY_BYTES) -> Iterator[None]:
    """Let the process have no more than `more` bytes beside what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def one(
    target: Target, given: Any, scratch: Path, limit_s: float = LIMIT_S, wait_s: float = WAIT_S
) -> Result:
    """`judge` under limits of time."""
    for kind, timer, seconds in (
        (signal.SIGALRM, signal.ITIMER_REAL, wait_s),
        (signal.SIGPROF, signal.ITIMER_PROF, limit_s),
    ):
        signal.signal(kind, _too_long)
        signal.setitimer(timer, seconds)
    try:
        return judge(target, given, scratch)
    except Hang as error:
        return Result(
            "bug", "hang", f"more than {limit_s:g} s of work or {wait_s:g} s of waiting", place(error)
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(name: str, seed: int, first: int, last: int, step: int, out: Path) -> None:
    """Feed inputs first, first + step, ... below last; results go to files in `out` as they come."""
    target = TARGETS[name]
    counts: Counter[str] = Counter()
    kept: Counter[tuple[str, str]] = Counter()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("error")
    (out / "bugs").mkdir(parents=True, exist_ok=True)
    progress = out / f"progress-{first % step}"
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as folder:
        scratch = Path(folder)
        with limited_memory(), progress.open("wb", buffering=0) as at:
            for done, number in enumerate(range(first, last, step)):
                at.seek(0)
                at.write(struct.pack("<Q", number))
                given = target.input(seed, number)
                result = one(target, given, scratch)
                counts[result.verdict] += 1
                if result.verdict == "refused":
                    counts[f"refused: {result.kind}"] += 1
                if result.verdict == "bug":
                    counts[f"bug: {result.kind}"] += 1
                    kept[result.kind, result.place] += 1
                    if kept[result.kind, result.place] <= KEPT:
                        keep(out, name, seed, number, given, result)
                if done % 500 == 0:
                    if done % 2000 == 0:
                        gc.collect()
                    (out / f"counts-{first % step}.json").write_text(json.dumps([number, counts]))
        (out / f"counts-{first % step}.json").write_text(json.dumps([last, counts]))


def keep(out: Path, name: str, seed: int, number: int, given: Any, result: Result) -> None:
    """Write down a bug so that it can be replayed."""
    about = {
        "target": name,
        "seed": seed,
        "number": number,
        "kind": result.kind,
        "place": result.place,
        "told": result.told[:2000],
        "input": repr(given)[:4000],
    }
    (out / "bugs" / f"{name}-{number}.json").write_text(json.dumps(about, indent=1))


def alone(log: Path, *arguments: Any) -> None:
    """`main` in a process of its own, which writes to a log and reads nothing."""
    with log.open("ab") as file, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    main(*arguments)
