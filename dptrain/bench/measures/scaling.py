"""Throughput on several devices, each with a process of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dptrain.bench import processes
from dptrain.bench.case import Case
from dptrain.bench.contestant import Unsupported
from dptrain.bench.engines import check_device
from dptrain.bench.measures.throughput import throughput


def scaling(case: Case) -> dict[str, Any]:
    """As of `throughput`, on all devices together. Of a CPU, a device is one core."""
    check_device(case)
    on_gpu = case.device.startswith("cuda")
    there = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    if case.devices > there:
        raise Unsupported(f"there are {there} devices here, and not {case.devices}.")
    if case.devices == 1:
        if not on_gpu:
            torch.set_num_threads(1)
        return throughput(case)
    if case.engine != "torch":
        raise Unsupported(f"several devices are not measured with {case.engine}.")
    with tempfile.TemporaryDirectory(prefix="dptrain-") as folder:
        ranks = [(case, rank, Path(folder) / "meeting") for rank in range(case.devices)]
        return processes.run_together(_rank, ranks)[0]


def _rank(case: Case, rank: int, meeting: Path) -> dict[str, Any]:
    """One of the processes. They meet at a file and race side by side."""
    on_gpu = case.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    own = Case.from_dict(case.to_dict() | {"device": f"cuda:{rank}" if on_gpu else "cpu"})
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=case.devices,
    )
    return throughput(own)
