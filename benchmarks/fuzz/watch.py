"""Worker processes for one target, watched from outside: what ends a process or holds it up is a bug too."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz.target import Result, Target
from benchmarks.fuzz.worker import LIMIT_S, keep

GRACE_S = 120.0
"""Beyond the limit of an input, for those that nothing in Python can stop, and for the libraries to load."""
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

    def start(self, first: int) -> subprocess.Popen[bytes]:
        self.progress.write_bytes(struct.pack("<Q", first))
        arguments = [self.target.name, self.seed, first, self.last, self.step, self.out]
        with (self.out / f"said-{self.place}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fuzz.worker", *map(str, arguments)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

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
            ended = process.poll() is not None
            held_up = time.time() - os.stat(share.progress).st_mtime > LIMIT_S + GRACE_S
            if not ended and not held_up:
                continue
            if not ended:
                process.kill()
                process.wait()
            total += share.counts()
            (share.out / f"counts-{place}.json").unlink(missing_ok=True)
            del working[place]
            if process.returncode == 0:
                continue
            number, kind = share.at, "hang" if not ended else f"crash ({process.returncode})"
            total += Counter({"bug": 1, f"bug: {kind}": 1})
            keep(out, target.name, seed, number, target.input(seed, number), Result("bug", kind, "", "outside"))
            deaths += 1
            if number + share.step < inputs and deaths < TRIES:
                working[place] = (share, share.start(number + share.step))
    return dict(total)


def shared_out(targets: Mapping[str, Target], inputs: int) -> dict[str, int]:
    """How many inputs each target gets: fast ones more, slow ones more than their speed alone would give."""
    weights = {name: math.sqrt(target.speed) for name, target in targets.items()}
    return {name: max(1, round(inputs * weight / sum(weights.values()))) for name, weight in weights.items()}
