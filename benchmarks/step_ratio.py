"""Private against non-private training steps, interleaved in one process.

A logical step is ``--accumulate`` physical batches, one draw of noise and one optimizer step. The
ratio is non-private time over private time, from medians of interleaved repeats; exactness is
checked in the same run, in float64 against single examples on two of them.

    python benchmarks/step_ratio.py --model vit_tiny_patch16_224 --batch 16 --opacus --out x.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

BF16 = [False]  # set once by main


def loss_fn(model, batch):
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=BF16[0]):
        logits = model(batch[0])
    return F.cross_entropy(logits.float() if BF16[0] else logits, batch[1], reduction="none")


def build(args):
    torch.manual_seed(0)
    options = {"img_size": args.size} if args.size and "vit" in args.model else {}
    return timm.create_model(args.model, num_classes=100, **options).to(args.device)


def exactness(args) -> float:
    """Largest relative error of a parameter's clipped sum, float64, three examples."""
    model = build(args).double()
    side = args.size or 224
    images = torch.randn(3, 3, side, side, device=args.device).double()
    batch = (images, torch.randint(100, (3,), device=args.device))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    grads = []
    for b in range(3):
        loss = loss_fn(model, (batch[0][b : b + 1], batch[1][b : b + 1])).sum()
        grads.append(torch.autograd.grad(loss, [model.get_parameter(n) for n in names]))
    norms = [sum(g.square().sum() for g in each).sqrt() for each in grads]
    bound = float(sorted(norms)[1])
    out = dpt.clipped_grad(model, loss_fn, clip_norm=bound, method=args.method)(batch)
    worst = 0.0
    for i, name in enumerate(names):
        want = sum(min(1.0, bound / float(n)) * each[i] for n, each in zip(norms, grads))
        worst = max(worst, float((out.grads[name] - want).norm() / want.norm().clamp(min=1e-12)))
    return worst


class Contestant:
    """One way to take a physical step (``step``) and to end a logical one (``end``)."""

    def __init__(self, name, step, end):
        self.name, self.step, self.end = name, step, end
        self.step_s: list[float] = []
        self.end_s: list[float] = []

    def logical_s(self, accumulate: int) -> float:
        return accumulate * statistics.median(self.step_s) + statistics.median(self.end_s)


def non_private(args, batch) -> Contestant:
    model = build(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step():
        loss_fn(model, batch).sum().backward()

    def end():
        optimizer.step()
        for p in model.parameters():  # keep the buffers, as accumulation does
            p.grad.zero_()

    return Contestant("non-private", step, end)


def private(args, batch, method) -> Contestant:
    model = build(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    mechanism = Mechanism.constant(
        noise_multiplier=1.0,
        clip_norm=1.0,
        sample_rate=0.1,
        steps=1000,
        expected_batch_size=args.batch,
    )
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=1.0, method=method)
    key = Key.from_entropy()
    state = {"sum": None, "step": 0}
    mask = torch.ones(args.batch, dtype=torch.bool, device=args.device)

    def step():
        part = clipped(batch, mask)
        state["sum"] = part if state["sum"] is None else state["sum"].add_(part)

    def end():
        gradient = dpt.privatize(state["sum"], mechanism, key.child(state["step"]))
        dpt.apply(optimizer, model, gradient)
        state["sum"], state["step"] = None, state["step"] + 1

    return Contestant(method, step, end)


def opacus(args, batch) -> Contestant:
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(build(args))
    base = torch.optim.SGD(model.parameters(), lr=1e-4)
    optimizer = DPOptimizer(base, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=args.batch)

    def step():
        loss_fn(model, batch).sum().backward()
        optimizer.signal_skip_step(True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def end():
        loss_fn(model, batch).sum().backward()
        optimizer.signal_skip_step(False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contestant("opacus", step, end)


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=None, help="image side, where the model takes it")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--method", default="auto", help="methods, separated by commas")
    parser.add_argument("--accumulate", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--opacus", action="store_true")
    parser.add_argument("--skip-exactness", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = args.method.split(",")
    args.method = methods[0]
    error = None if args.skip_exactness else exactness(args)
    BF16[0] = args.precision == "bf16"
    torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    torch.manual_seed(1)
    side = args.size or 224
    images = torch.randn(args.batch, 3, side, side, device=args.device)
    batch = (images, torch.randint(100, (args.batch,), device=args.device))
    contestants = [non_private(args, batch)] + [private(args, batch, m) for m in methods]
    if args.opacus:
        contestants.append(opacus(args, batch))
    for repeat in range(args.repeats + 1):
        for c in contestants:
            start = now(args.device)
            c.step()
            middle = now(args.device)
            c.end()
            stop = now(args.device)
            if repeat:  # the first is a warm-up
                c.step_s.append(middle - start)
                # Opacus ends a logical step inside a physical one: only the surplus is the end's
                ended = stop - middle
                c.end_s.append(max(0.0, ended - (middle - start)) if c.name == "opacus" else ended)
    base = contestants[0].logical_s(args.accumulate)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "case": vars(args) | {"out": None, "methods": methods},
        "commit": commit,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "largest_relative_error_float64": error,
        "results": {
            c.name: {
                "physical_step_s": statistics.median(c.step_s),
                "end_of_logical_step_s": statistics.median(c.end_s),
                "ratio_to_non_private": base / c.logical_s(args.accumulate),
                "raw_physical_step_s": c.step_s,
                "raw_end_s": c.end_s,
            }
            for c in contestants
        },
    }
    print(f"{args.model}, batch {args.batch}, float64 error {error}")
    for c in contestants:
        r = record["results"][c.name]
        print(
            f"  {c.name:16s} {1e3 * r['physical_step_s']:9.1f} ms a physical step, "
            f"{1e3 * r['end_of_logical_step_s']:7.1f} ms to end, ratio {r['ratio_to_non_private']:.3f}"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
