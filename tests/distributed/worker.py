"""One rank: takes every case's step, trains, and leaves what came out."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.optim import ZeroRedundancyOptimizer

import dptrain.torch as dpt
from dptrain.core.ledger import Ledger
from dptrain.optim import build_optimizer
from dptrain.torch import reduction
from tests.distributed import scenes

if __name__ == "__main__":
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    ranks = dpt.Ranks(dist.group.WORLD)
    cases = scenes.CASES if size == 2 else scenes.FEWER
    if size == 4:
        reduction.BUCKET_BYTES = 4000  # several, which leave one after the other
    found = {name: g for case in cases for name, g in scenes.steps(case, ranks)}
    if size == 2:
        ledger = Ledger.create(folder / "ledger.jsonl", dataset="toy") if rank == 0 else None
        adam = partial(torch.optim.Adam, lr=0.01)
        found |= {f"trained: {n}": p for n, p in scenes.train(ranks, ledger, adam).items()}
        of_quantile = scenes.train(ranks, None, adam, scenes.quantile())
        found |= {f"trained, quantile: {n}": p for n, p in of_quantile.items()}
        of_bands = scenes.train(ranks, None, adam, scenes.bands())
        found |= {f"trained, bands: {n}": p for n, p in of_bands.items()}
        shared = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.Adam, lr=0.01)
        found |= {f"trained, shared state: {n}": p for n, p in scenes.train(ranks, None, shared).items()}
        for name in scenes.OPTIMIZERS:
            shared = partial(build_optimizer, name, lr=0.01, shared=dist.group.WORLD)
            found |= {f"trained, {name}: {n}": p for n, p in scenes.train(ranks, None, shared).items()}
        counts = [scenes.sent(ranks, physical, last) for physical, last in ((1, True), (4, True), (4, False))]
        (folder / f"{rank}.json").write_text(json.dumps(counts))
    else:
        found |= scenes.otherwise(ranks)
        counts = [scenes.sent(ranks, 2, last) for last in (True, False)]
        (folder / "buckets.json").write_text(json.dumps(counts))
    found |= {f"noise: {n}": g for n, g in scenes.noise_of_nothing(ranks).items()}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()
