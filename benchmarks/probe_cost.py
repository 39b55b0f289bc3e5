"""What the probe and the capture cost, in ordinary steps of the same model on the same machine.

The probe (with plan and rehearsal) runs once per input signature. The capture's own cost is what a
forward pass takes longer under it, seen against a whole ordinary step. Repeats are interleaved, figures
are medians.

    python benchmarks/probe_cost.py --model vit_small_patch16_224 --batch 16 --out x.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import dptrain.torch as dpt
from dptrain.torch.capture import Capture, ignore
from dptrain.torch.guards import trainable


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=100)
    side = model.pretrained_cfg["input_size"][-1]
    batch = (torch.randn(args.batch, 3, side, side), torch.randint(100, (args.batch,)))
    parameters = trainable(model)
    ordinary = dpt.clipped_grad(model, loss_fn, clip_norm=1.0, method="non-private")
    layouts = dpt.clipped_grad(model, loss_fn, clip_norm=1.0).plan(batch).findings.layouts

    def probe() -> None:
        dpt.clipped_grad(model, loss_fn, clip_norm=1.0).plan(batch)

    def captured() -> None:
        capture = Capture(parameters, args.batch, ignore, layouts)
        images = capture.mark_data(batch[0].view_as(batch[0]))
        with capture:
            loss_fn(model, (images, capture.mark_data(batch[1].view_as(batch[1]))))

    runs = {
        "step": lambda: ordinary(batch),
        "forward": lambda: loss_fn(model, batch),
        "captured_forward": captured,
        "probe": probe,
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    median = {name: statistics.median(each) for name, each in times.items()}
    record = {
        "kind": "probe cost",
        "case": {"model": args.model, "batch": args.batch, "precision": "fp32"},
        "probe_in_steps": median["probe"] / median["step"],
        "capture_overhead_of_a_step": (median["captured_forward"] - median["forward"]) / median["step"],
        "median_s": median,
        "all_s": times,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(record, indent=2))
    if args.out:
        args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
