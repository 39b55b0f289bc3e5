"""What hardened noise and sums on an integer grid cost, contestants interleaved in one process.

The noise: sums of float32 and of int64, to which noise is added, divided by L. Then the physical step of
a small vision transformer: ``auto`` and ``per-example`` in floating point, and on the grid.

    python -m benchmarks.hardened --out results/cpu-hardened.json

What it does to accuracy: the same training with both kinds of noise, over seeds.

    python -m benchmarks.hardened --accuracy 10 --out results/cpu-hardened-accuracy.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F

import dptrain.torch as dpt
from benchmarks.noise import MECHANISM, interleaved
from dptrain.core.entropy import Key
from dptrain.torch.noise import noisy_mean, noisy_mean_on_grid
from dptrain.training import TrainConfig, train

SIZES = [10**5, 10**6, 10**7, 10**8]
MODEL = "vit_tiny_patch16_224"
HARDENED = MECHANISM.hardened()
GIGABYTE = 1e9  # of float32 parameters


def noise(shapes: dict[str, torch.Size], repeats: int) -> dict[str, dict]:
    key, spec = Key.from_entropy(), HARDENED.step(0)
    floats = {name: torch.zeros(shape) for name, shape in shapes.items()}
    integers = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    results = interleaved(
        {
            "ordinary, in place": lambda: noisy_mean(floats, spec.noise_stddev, 256.0, key, out=floats),
            "ordinary, into new tensors": lambda: noisy_mean(floats, spec.noise_stddev, 256.0, key),
            "hardened": lambda: noisy_mean_on_grid(integers, spec.noise_stddev, spec.grid, 256.0, key),
        },
        repeats,
    )
    size = sum(shape.numel() for shape in shapes.values())
    for result in results.values():
        result["million_per_s"] = size / result["median_s"] / 1e6
        result["s_per_gb_of_parameters"] = result["median_s"] * GIGABYTE / (4 * size)
    return results


def physical_steps(name: str, batch_size: int, repeats: int) -> dict[str, dict]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=100)
    batch = torch.randn(batch_size, 3, 224, 224), torch.randint(100, (batch_size,))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def step(method: str, grid: float | None):
        clipped = dpt.clipped_grad(model, loss_fn, clip_norm=HARDENED.clip_norm, method=method, grid=grid)
        return lambda: clipped(batch)

    results = interleaved(
        {
            "auto": step("auto", None),
            "per-example": step("per-example", None),
            "per-example on the grid": step("per-example", HARDENED.grid),
            "per-example-loop": step("per-example-loop", None),
            "per-example-loop on the grid": step("per-example-loop", HARDENED.grid),
        },
        repeats,
    )
    for result in results.values():
        result["examples_per_s"] = batch_size / result["median_s"]
    return results


def accuracies(seeds: int) -> dict[str, list[float]]:
    """On the held-out digits, at the command's defaults (epsilon 8)."""
    found: dict[str, list[float]] = {"ordinary": [], "hardened": []}
    for seed in range(seeds):
        for name, results in found.items():
            with tempfile.TemporaryDirectory() as folder:
                settings = {"hardened": name == "hardened", "seed": seed, "out": Path(folder) / "run"}
                # Another physical batch would make other sums of the same numbers.
                run = TrainConfig(method="per-example", physical_batch_size=128, evaluations=1, **settings)
                results.append(train(run).score.accuracy)
        print(f"seed {seed}: " + ", ".join(f"{name} {r[-1]:.4f}" for name, r in found.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accuracy", type=int, metavar="SEEDS", help="measure accuracy instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.accuracy:
        record = {
            "kind": "accuracy with hardened noise",
            "data": "digits",
            "accuracy": accuracies(args.accuracy),
        }
    else:
        record = speeds(args)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record |= {
        "commit": commit,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


def speeds(args: argparse.Namespace) -> dict[str, Any]:
    """Of noise and of physical steps, measured and shown."""
    drawn = {
        f"{n:,} numbers": noise({"w": torch.Size([n])}, args.repeats) for n in SIZES if n <= args.largest
    }
    shapes = {n: p.shape for n, p in timm.create_model(args.model, num_classes=100).named_parameters()}
    drawn[args.model] = noise(shapes, args.repeats)
    steps = physical_steps(args.model, args.batch_size, args.repeats)
    for case, results in drawn.items():
        print(case)
        for name, r in results.items():
            print(
                f"  {name:30s} {1e3 * r['median_s']:9.2f} ms {r['million_per_s']:7.0f} million/s "
                f"{r['s_per_gb_of_parameters']:6.2f} s/GB"
            )
    print(f"{args.model}, a physical step of {args.batch_size}")
    for name, r in steps.items():
        print(f"  {name:30s} {1e3 * r['median_s']:9.2f} ms {r['examples_per_s']:7.1f} examples/s")
    return {
        "kind": "hardened noise and sums",
        "noise": drawn,
        "physical_step": {"model": args.model, "batch_size": args.batch_size, "contestants": steps},
    }


if __name__ == "__main__":
    main()
