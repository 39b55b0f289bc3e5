"""``python -m benchmarks.fuzz --inputs 1000000 --processes 2 --out results/fuzz.json``"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import record
from benchmarks.fuzz import watch, worker
from benchmarks.fuzz.targets import TARGETS
from dptrain.bench.environment import environment


@dataclass(frozen=True)
class Options:
    """Feed damaged and hostile inputs to every reader; ends with 1 if one of them found a bug.

    Attributes:
        inputs: how many over all targets.
        targets: which; all by default.
        replay: TARGET:NUMBER: feed that one input in this process, with its traceback.
        work: where bugs and logs are kept.
        out: the record.
    """

    inputs: int = 100_000
    processes: int = 1
    seed: int = 0
    targets: tuple[str, ...] = tuple(TARGETS)
    replay: str | None = None
    work: Path | None = None
    out: Path | None = None


def main(options: Options) -> int:
    if options.replay is not None:
        return replay(options.replay, options.seed)
    work = options.work or Path(tempfile.mkdtemp(prefix="dptrain-fuzz-"))
    console = Console()
    console.print(f"bugs and logs: {escape(str(work))}", highlight=False)
    chosen = {name: TARGETS[name] for name in options.targets}
    found, started = {}, time.perf_counter()
    for name, inputs in watch.shared_out(chosen, options.inputs).items():
        before = time.perf_counter()
        counts = watch.run(TARGETS[name], options.seed, inputs, options.processes, work / name)
        found[name] = {"inputs": inputs, "seconds": round(time.perf_counter() - before, 1), **counts}
        console.print(f"{name}: {found[name]}", highlight=False, markup=False)
        save(options, found, time.perf_counter() - started)
    show(console, found)
    return 1 if any(counts.get("bug") for counts in found.values()) else 0


def replay(which: str, seed: int) -> int:
    name, _, number = which.rpartition(":")
    target = TARGETS[name]
    given = target.input(seed, int(number))
    print(repr(given)[:2000])
    warnings.simplefilter("error")
    with worker.limited_memory(), tempfile.TemporaryDirectory() as folder:
        print(worker.one(target, given, Path(folder)))
        target.feed(given, Path(folder))
    return 0


def save(options: Options, found: dict[str, dict[str, float]], seconds: float) -> None:
    bugs = sum(int(counts.get("bug", 0)) for counts in found.values())
    commit = subprocess.run(["git", "status", "--porcelain", "--", "dptrain"], capture_output=True, text=True)
    values = {
        "kind": "fuzz",
        "command": record.command("benchmarks.fuzz"),
        "environment": environment("cpu"),
        "sources changed since the commit": bool(commit.stdout.strip()),
        "seed": options.seed,
        "limits": {
            "seconds": worker.LIMIT_S,
            "wall-clock seconds": worker.WAIT_S,
            "bytes": worker.MEMORY_BYTES,
        },
        "seconds": round(seconds),
        "inputs": sum(int(counts["inputs"]) for counts in found.values()),
        "bugs": bugs,
        "targets": found,
    }
    record.save(json.loads(json.dumps(values, default=str)), options.out)


def show(console: Console, found: dict[str, dict[str, float]]) -> None:
    table = Table(title="inputs by target and outcome", title_justify="left")
    for name in ("target", "inputs", "accepted", "refused", "bugs"):
        table.add_column(name, justify="left" if name == "target" else "right")
    for name, counts in found.items():
        table.add_row(name, *(f"{int(counts.get(k, 0)):,}" for k in ("inputs", "accepted", "refused", "bug")))
    totals = (sum(int(c.get(k, 0)) for c in found.values()) for k in ("inputs", "accepted", "refused", "bug"))
    table.add_section()
    table.add_row("all", *(f"{number:,}" for number in totals))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
