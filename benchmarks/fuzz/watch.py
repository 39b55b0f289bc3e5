"""Worker processes for one target, watched from outside: what ends a process or holds it up is a bug too."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.fuzz import worker
from benchmarks.fuzz.target import Result, Target
from benchmarks.fuzz.worker import WAIT_S, keep

GRACE_S = 120.0
"""Beyond the limit of an input, for those that nothing in Python can stop, and for the libraries to load."""
LEAST = 100  # inputs for each target
TRIES = 20  # processes that may die for one target


@dataclass
class Share:
    """Every `step`-th input of a target, in a process."""

    target: Target
    seed: int
    first: int
    last: int
    step: int
    out: Path

    def start(self, first: int) -> BaseProcess:
        self.progress.write_bytes(struct.pack("<Q", first))
        log = self.out / f"said-{self.place}.log"
        arguments = (log, self.target.name, self.seed, first, self.last, self.step, self.out)
        process = _context().Process(target=worker.alone, args=arguments)
        process.start()
        return process

    @property
    def place(self) -> int:
        return self.first % self.step

    @property
    def progress(self) -> Path:
        return self.out / f"progress-{self.place}"

    @property
    def at(self) -> int:
        return int(struct.unpack("<Q", self.progress.read_bytes().ljust(8, b"\0"))[0])

    def counts(self) -> Counter[str]:
        path = self.out / f"counts-{self.place}.json"
        return Counter(json.loads(path.read_text())[1]) if path.is_file() else Counter()


def run(target: Target, seed: int, inputs: int, processes: int, out: Path) -> dict[str, int]:
    """Feed inputs 0 to `inputs` - 1 and count what came of them."""
    out.mkdir(parents=True, exist_ok=True)
    shares = [Share(target, seed, i, inputs, processes, out) for i in range(min(processes, inputs))]
    total: Counter[str] = Counter()
    working = {share.place: (share, share.start(share.first)) for share in shares}
    deaths = 0
    while working:
        time.sleep(0.2)
        for place, (share, process) in list(working.items()):
            ended = not process.is_alive()
            held_up = time.time() - os.stat(share.progress).st_mtime > WAIT_S + GRACE_S
            if not ended and not held_up:
                continue
            if not ended:
                process.kill()
            process.join()
            total += share.counts()
            (share.out / f"counts-{place}.json").unlink(missing_ok=True)
            del working[place]
            if process.exitcode == 0:
                continue
            number, kind = share.at, "hang" if not ended else f"crash ({process.exitcode})"
            total += Counter({"bug": 1, f"bug: {kind}": 1})
            keep(
                out, target.name, seed, number, target.input(seed, number), Result("bug", kind, "", "outside")
            )
            deaths += 1
            if number + share.step < inputs and deaths < TRIES:
                working[place] = (share, share.start(number + share.step))
    return dict(total)


def _context() -> Any:
    """Forked from a server that has only imported the libraries, which takes a while."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.fuzz.worker"])
    return context


def shared_out(targets: Mapping[str, Target], inputs: int) -> dict[str, int]:
    """How many inputs each target gets: fast ones more, slow ones more than their speed alone would give."""
    weights = {name: target.speed**0.8 for name, target in targets.items()}
    return {
        name: max(min(LEAST, inputs), round(inputs * weight / sum(weights.values())))
        for name, weight in weights.items()
    }
