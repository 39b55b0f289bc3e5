"""One contestant in a process of its own: its peak memory, and whether a step fits under a limit.

python -m benchmarks.speed.fresh '{"case": "vit-tiny", "contestant": "auto", "batch_size": 16}'

prints one line of JSON. ``run`` does this from another process.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .environment import without_places

ROOT = Path(__file__).resolve().parents[2]
#: glibc then gives every larger block pages of its own and takes them back when it is freed, so that
#: resident memory is what is alive; left to itself it keeps some of what was freed
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True)
class Try:
    """What to run.

    Attributes:
        contestant: see ``measure.enter``.
        steps: logical steps of two physical ones, after as many to warm up.
        limit_bytes: of a GPU's memory, or by which a CPU process's address space may grow.
        own_pages: see ``OWN_PAGES``; False leaves the allocator as it is.
        count_tensors: count bytes of tensors at each operation (CPU only, eager only).
    """

    case: str
    contestant: str
    batch_size: int
    device: str = "cpu"
    precision: str = "fp32"
    small: bool = False
    memory_budget: int | None = None
    steps: int = 1
    limit_bytes: int | None = None
    own_pages: bool = True
    count_tensors: bool = False
    threads: int = 2


def run(attempt: Try, timeout_s: float = 600.0) -> dict[str, Any]:
    """Status and figures of a fresh process."""
    env = os.environ | (OWN_PAGES if attempt.own_pages else {})
    command = [sys.executable, "-m", "benchmarks.speed.fresh", json.dumps(dataclasses.asdict(attempt))]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": "error", "sentence": f"took more than {timeout_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    if done.returncode == -9:
        return {"status": "killed", "sentence": "killed by the system, which is mostly for lack of memory"}
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    if "bad_alloc" in done.stderr:
        return {"status": "out-of-memory", "sentence": last[0][:300]}
    return {"status": "error", "sentence": last[0][:300], "traceback": without_places(done.stderr[-4000:])}


# ---------------------------------------------------------------- in the fresh process


def attempt_here(attempt: Try) -> dict[str, Any]:
    import torch
    from torch.utils._pytree import tree_map

    from .cases import CASES, SMALL, arithmetic, under_autocast
    from .contestants import Task
    from .measure import enter, failure

    torch.set_num_threads(attempt.threads)
    case = (SMALL if attempt.small else CASES)[attempt.case]
    meter: Any = Allocator(attempt.device) if attempt.device.startswith("cuda") else Resident()
    empty = meter.now()
    limit(attempt)
    with arithmetic(attempt.precision) as dtype:
        try:
            torch.manual_seed(1)
            batch = tree_map(lambda t: t.to(attempt.device), case.make_batch(attempt.batch_size))
            loss_fn = under_autocast(case.loss_fn, dtype)
            task = Task(case, loss_fn, batch, attempt.batch_size, attempt.device, 1.0)
            contestant = enter(task, attempt.contestant, attempt.memory_budget)
            if attempt.count_tensors:
                return {"status": "ok"} | tensors(contestant, attempt)
            logical_steps(contestant, attempt)
            first = meter.peak() - empty
            meter.reset()
            times = logical_steps(contestant, attempt)
        except Exception as error:
            return failure(error)
    return {
        "status": "ok",
        "peak_bytes": meter.peak() - empty,
        "peak_bytes_of_first_steps": first,
        "physical_step_s": statistics.median(times),
    }


def logical_steps(contestant, attempt: Try) -> list[float]:
    """Seconds of each physical step."""
    from .race import seconds

    times = []
    for _ in range(attempt.steps):
        times += [seconds(contestant.step, attempt.device) for _ in range(2)]
        contestant.end()
    return times


def tensors(contestant, attempt: Try) -> dict[str, Any]:
    """Peak bytes of tensors made since the beginning, and the operation at which they peak.

    The model, which was there before, is not among them.
    """
    from dptrain.torch.live_bytes import LiveBytes

    live = LiveBytes()
    with live:
        logical_steps(contestant, attempt)
        warm = len(live.moments)
        logical_steps(contestant, attempt)
    operation, peak = max(live.moments[warm:], key=lambda moment: moment[1])
    return {"peak_tensor_bytes_beside_the_model": peak, "at": operation}


def limit(attempt: Try) -> None:
    """Make this much memory all there is."""
    if attempt.limit_bytes is None:
        return
    if attempt.device.startswith("cuda"):
        import torch

        total = torch.cuda.get_device_properties(attempt.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, attempt.limit_bytes / total))
    else:
        room = mapped_bytes() + attempt.limit_bytes
        resource.setrlimit(resource.RLIMIT_AS, (room, room))


def mapped_bytes() -> int:
    """Address space of this process: with a GPU's libraries, many GiB before anything is done."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


class Resident:
    """Peak resident memory of this process, from the kernel."""

    def now(self) -> int:
        self.reset()
        return self.peak()

    def reset(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now

    def peak(self) -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


class Allocator:
    """Peak of what the CUDA allocator has given out."""

    def __init__(self, device: str):
        import torch

        self.device, self.cuda = torch.device(device), torch.cuda

    def now(self) -> int:
        return self.cuda.memory_allocated(self.device)

    def reset(self) -> None:
        gc.collect()
        self.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return self.cuda.max_memory_allocated(self.device)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    print(json.dumps(attempt_here(Try(**json.loads(sys.argv[1])))))
