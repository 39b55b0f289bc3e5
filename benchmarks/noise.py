"""How fast noise is drawn and a logical step ended, contestants interleaved in one process.

Numbers per second: ``torch.normal_``, which only draws, against our noise, which is added to a sum
and divided by L as well, in place and into new tensors. Then the end of a logical step, noise and
optimizer, for ViT-Tiny and ViT-Base.

    python benchmarks/noise.py --out results/cpu-noise.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.torch.noise import noisy_mean

SIZES = [10**4, 10**5, 10**6, 10**7, 10**8]
MODELS = ["vit_tiny_patch16_224", "vit_base_patch16_224"]
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p, **how: torch.optim.SGD(p, lr=1e-6, **how),
    "momentum": lambda p, **how: torch.optim.SGD(p, lr=1e-6, momentum=0.9, **how),
    "adamw": lambda p, **how: torch.optim.AdamW(p, lr=1e-6, **how),
}
MECHANISM = Mechanism.constant(
    noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.1, steps=10**6, expected_batch_size=256
)


def interleaved(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict]:
    """Median and raw seconds of each; the first round is a warm-up."""
    raw: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if repeat:
                raw[name].append(time.perf_counter() - start)
    return {name: {"median_s": statistics.median(times), "raw_s": times} for name, times in raw.items()}


def drawing(sums: dict[str, Tensor], repeats: int) -> dict[str, dict]:
    key = Key.from_entropy()
    drawn = {name: torch.empty_like(total) for name, total in sums.items()}
    source = torch.Generator()

    def torch_normal() -> None:
        for total in drawn.values():
            total.normal_(generator=source)

    def cloned() -> None:
        """Clone, draw, add, scale: one pass over memory each."""
        out = {name: total.clone() for name, total in sums.items()}
        for total in out.values():
            total.add_(torch.empty_like(total).normal_(generator=source))
        torch._foreach_mul_(list(out.values()), 1.0 / 256)

    results = interleaved(
        {
            "torch.normal_, drawn only": torch_normal,
            "torch.normal_, cloned, added, scaled": cloned,
            "ours, added, scaled, into new tensors": lambda: noisy_mean(sums, 1.0, 256.0, key),
            "ours, added, scaled, in place": lambda: noisy_mean(drawn, 1.0, 256.0, key, out=drawn),
        },
        repeats,
    )
    size = sum(total.numel() for total in sums.values())
    for result in results.values():
        result["billion_per_s"] = size / result["median_s"] / 1e9
    return results


def ending(name: str, repeats: int) -> dict[str, dict]:
    """Noise and optimizer step, by optimizer and by its implementation."""
    model = timm.create_model(name, num_classes=100)
    key = Key.from_entropy()
    zeros = {n: torch.zeros_like(p, requires_grad=False) for n, p in model.named_parameters()}
    results = {}
    for kind, make in OPTIMIZERS.items():
        contestants = {
            how or "default": _stepper(
                model, make(model.parameters(), **({how: True} if how else {})), zeros, key
            )
            for how in (None, "foreach", "fused")
        }
        for how, result in interleaved(contestants, repeats).items():
            results[f"{kind}, {how}"] = result
    return results


def _stepper(model: nn.Module, optimizer, zeros: dict[str, Tensor], key: Key) -> Callable[[], None]:
    sums = {n: z.clone() for n, z in zeros.items()}

    def step() -> None:
        clipped = dpt.ClippedSum(dict(sums), torch.zeros(1), torch.zeros(1), 1.0)
        dpt.apply(optimizer, model, dpt.privatize(clipped, MECHANISM, key, donate=True))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--largest", type=int, default=SIZES[-1])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    noise, ends = {}, {}
    for size in (size for size in SIZES if size <= args.largest):
        noise[f"{size:,} numbers"] = drawing({"w": torch.zeros(size)}, args.repeats)
    for name in filter(None, args.models.split(",")):
        model = timm.create_model(name, num_classes=100)
        noise[name] = drawing({n: torch.zeros_like(p) for n, p in model.named_parameters()}, args.repeats)
        ends[name] = ending(name, args.repeats)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "kind": "noise and the end of a step",
        "commit": commit,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "noise": noise,
        "end_of_logical_step": ends,
    }
    for case, results in noise.items():
        print(case)
        for name, result in results.items():
            print(f"  {name:40s} {1e3 * result['median_s']:9.2f} ms {result['billion_per_s']:7.3f} billion/s")
    for case, results in ends.items():
        print(f"{case}, noise and optimizer")
        for name, result in results.items():
            print(f"  {name:40s} {1e3 * result['median_s']:9.2f} ms")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
