"""Peak memory of each rank of a model under FSDP2, most of whose memory is in its parameters.

Every rank is a fresh process, and its model is never whole anywhere. Bytes are resident memory above what the
process had before the model, at its peak in each phase: the first batch (probe, plan and rehearsal), a
physical batch that adds to an earlier sum, noise with a step of AdamW, and a physical batch beside AdamW's
state. They are also given in multiples of all parameters.

    python -m benchmarks.sharded_memory --out results/cpu-sharded-memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import dptrain.torch as dpt
from benchmarks.record import command, save
from dptrain.bench.meters import meter
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

RANKS, METHODS = (1, 2, 4), ("non-private", "auto", "ghost")
WIDTH, BLOCKS, TOKENS, BATCH = 512, 24, 4, 2


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
        self.head = nn.Linear(width, 100)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def losses(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sharded(mesh: DeviceMesh, width: int) -> nn.Module:
    with torch.device("meta"):
        model = Net(width)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh).to_empty(device="cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.to_local().normal_(std=0.02).add_(1.0 if name.endswith("norm.weight") else 0.0)
    return model


def rank_main(rank: int, ranks: int, folder: Path, method: str) -> None:
    """One rank: leaves its peaks in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks)
    torch.manual_seed(rank)
    mesh = init_device_mesh("cpu", (ranks,))
    train(mesh, 8, method, str)  # what libraries load when they are first used is not the model's
    memory = meter("cpu")
    found: dict[str, Any] = {}

    def phase(name: str) -> None:
        found[name] = memory.peak()
        memory.reset()

    model = train(mesh, WIDTH, method, phase)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    unit = sum(p.numel() * p.element_size() for p in model.blocks[0].parameters())
    found = {"parameter_bytes": parameters, "unit_bytes": unit, "peak_bytes": found}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def train(mesh: DeviceMesh, width: int, method: str, phase: Callable[[str], object]) -> nn.Module:
    """The phases, each of which is named when it is over."""
    model = sharded(mesh, width)
    phase("building the model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    clipped = dpt.clipped_grad(model, losses, clip_norm=1.0, method=method)
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.1, steps=2, expected_batch_size=8, delta=1e-5
    )

    def batch() -> Any:
        return torch.randint(100, (BATCH, TOKENS)), torch.randint(100, (BATCH,))

    phase("shards alone")
    total = clipped(batch())
    phase("first batch")
    total = clipped(batch(), None, total)
    phase("physical batch")
    if method != "non-private":
        for step in range(2):
            gradient = dpt.privatize(total, mechanism, Key.from_seed(step), donate=True)
            dpt.apply(optimizer, model, gradient)
            del total, gradient
            phase("noise and step")
            total = clipped(batch())
            phase("physical batch with optimizer state")
    return model


def measure(ranks: int, method: str) -> dict[str, Any]:
    """The highest peaks over the ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call = [sys.executable, "-m", "benchmarks.sharded_memory", "--method", method, "--folder", name]
        running = [
            subprocess.Popen([*call, "--ranks", str(ranks), "--rank", str(rank)]) for rank in range(ranks)
        ]
        codes = [process.wait() for process in running]
        if any(codes):
            raise RuntimeError(f"{method} failed on {ranks} ranks.")
        each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    peaks = {name: max(found["peak_bytes"][name] for found in each) for name in each[0]["peak_bytes"]}
    parameters, unit = each[0]["parameter_bytes"], each[0]["unit_bytes"]
    return {
        "ranks": ranks,
        "method": method,
        "parameter_bytes": parameters,
        "unit_bytes": unit,
        "peak_bytes": peaks,
        "peak_in_models": {name: round(peak / parameters, 3) for name, peak in peaks.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--method")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.rank, args.ranks, args.folder, args.method)
        return
    rows = []
    for method in [args.method] if args.method else METHODS:
        for ranks in [args.ranks] if args.ranks else RANKS:
            rows.append(measure(ranks, method))
            print(f"{method:12} {ranks} ranks, in models: {rows[-1]['peak_in_models']}", flush=True)
    record = {
        "kind": "sharded memory",
        "command": command("benchmarks.sharded_memory"),
        "case": {"width": WIDTH, "blocks": BLOCKS, "tokens": TOKENS, "batch": BATCH, "precision": "fp32"},
        "rows": rows,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    save(record, args.out)


if __name__ == "__main__":
    main()
