"""What a step's sample costs a rank in time and memory, each rank in a process of its own, one at a time.

A rank draws the whole logical batch, takes its share and cuts it into physical batches: all that it does
before it reads an example. Memory is the most that a step takes above what was there before, by tracemalloc,
which NumPy reports to, and by the peak of resident memory, which Linux tells.

    python -m benchmarks.sampling --out results/cpu-sampling.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dptrain.core.entropy import Key
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batch_count, physical_batches, share
from dptrain.core.spec import Sampling

PHYSICAL_BATCH_SIZE = 64


@dataclass(frozen=True)
class Case:
    examples: int
    sample_rate: float
    ranks: int


CASES = (
    Case(50_000, 0.5, 8),
    Case(1_281_167, 0.05, 8),
    Case(10**9, 1e-5, 8),
    Case(10**9, 1e-3, 8),
)


def pieces(sampler: LogicalSampler, step: int, rank: int, ranks: int) -> list[PhysicalBatch]:
    """The physical batches of a rank."""
    drawn = sampler.sample(step)
    count = physical_batch_count(len(drawn), PHYSICAL_BATCH_SIZE, ranks)
    return list(physical_batches(share(drawn, rank, ranks), PHYSICAL_BATCH_SIZE, count=count))


def measured(case: Case, rank: int, steps: int) -> dict[str, Any]:
    """Seconds of each step, of its sample alone, and bytes. To be run in a fresh process."""
    sampler = LogicalSampler(case.examples, Sampling("poisson", case.sample_rate), Key.from_seed(0))
    before = _peak_resident_bytes()
    drawing, whole = [], []
    for step in range(steps + 1):
        start = time.perf_counter()
        sampler.sample(step)
        drawn = time.perf_counter()
        pieces(sampler, step, rank, case.ranks)
        if step:  # the first is a warm-up
            drawing.append(drawn - start)
            whole.append(time.perf_counter() - drawn)
    resident = _peak_resident_bytes() - before
    tracemalloc.start()
    pieces(sampler, 0, rank, case.ranks)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "sample_s": statistics.median(drawing),
        "step_s": statistics.median(whole),
        "peak_bytes": traced,
        "peak_resident_growth_bytes": resident,
        "raw_sample_s": drawing,
        "raw_step_s": whole,
    }


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    # Here, so that the processes that are measured do without torch.
    from benchmarks import record
    from dptrain.bench.environment import Quiet, environment

    fresh = multiprocessing.get_context("spawn")
    results = []
    with Quiet() as quiet:
        for case in CASES:
            ranks = []
            for rank in range(case.ranks):
                with fresh.Pool(1) as pool:
                    ranks.append(pool.apply(measured, (case, rank, args.steps)))
            most = {
                f"most_{name}": max(found[name] for found in ranks)
                for name in ("sample_s", "step_s", "peak_bytes", "peak_resident_growth_bytes")
            }
            results.append({**asdict(case), **most, "of_each_rank": ranks})
            print(f"{case.examples:,} examples, q = {case.sample_rate:g}, the slowest of {case.ranks} ranks:")
            print(
                f"  {1e3 * most['most_sample_s']:.2f} ms the sample, {1e3 * most['most_step_s']:.2f} ms in "
                f"pieces, {most['most_peak_bytes'] / 1e6:.2f} MB "
                f"({most['most_peak_resident_growth_bytes'] / 1e6:.1f} MB resident)"
            )
    record.save(
        {
            "kind": "sampling",
            "command": record.command("benchmarks.sampling"),
            "environment": environment("cpu", packages=("numpy",)),
            "quiet": quiet.record(),
            "physical_batch_size": PHYSICAL_BATCH_SIZE,
            "cases": results,
        },
        args.out,
    )


if __name__ == "__main__":
    main()
