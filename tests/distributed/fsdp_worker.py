"""One rank of a sharded model: takes every case's steps and leaves what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh

from dptrain.core.ledger import Ledger
from tests.distributed import fsdp_scenes

if __name__ == "__main__":
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    cases = getattr(fsdp_scenes, sys.argv[4])
    found = {name: g for case in cases for name, g in fsdp_scenes.steps(case, rank, size, mesh)}
    if size > 1:
        found |= fsdp_scenes.counted(rank, mesh)
        for method in ("auto", "ghost"):
            found |= fsdp_scenes.again(method, size, mesh)
    if size == 2:
        ledger = Ledger.create(folder / "ledger.jsonl", dataset="toy") if rank == 0 else None
        found |= fsdp_scenes.trained(mesh, ledger)
        found |= fsdp_scenes.in_trouble(rank, mesh)
    save_file({name: g.contiguous() for name, g in found.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
