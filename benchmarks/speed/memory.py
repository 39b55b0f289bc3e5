"""Peak memory of a training step, each contestant in a fresh process.

python -m benchmarks.speed memory --model vit-small --batch 16 --method auto,bk-mix-opt --budget 64
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from .cases import CASES, SMALL
from .environment import environment, save
from .fresh import Try, run
from .peers import PEERS


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="vit-small", choices=list(CASES))
    parser.add_argument("--batch", type=int, help="physical batch size; by default the case's")
    parser.add_argument("--method", default="auto", help="of dptrain, by commas")
    parser.add_argument("--budget", type=float, help="of auto, in MiB: see dptrain.torch.clipped_grad")
    parser.add_argument("--peers", default="", help=f"by commas: {', '.join(PEERS)}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--usual", action="store_true", help="also with the allocator as it is")
    parser.add_argument("--tensors", action="store_true", help="also count tensors and say where they peak")
    parser.add_argument("--small", action="store_true", help="tiny forms of the cases: tries the code only")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    case = (SMALL if args.small else CASES)[args.model]
    size = args.batch or case.batch_size
    names = ["non-private kept", "non-private fresh", *args.method.split(",")]
    names += [p for p in args.peers.split(",") if p]
    results: dict[str, Any] = {}
    for name in names:
        given = args.budget is not None and name.split("+")[0] == "auto"
        budget = round(args.budget * 2**20) if given else None
        attempt = Try(args.model, name, size, args.device, args.precision, args.small, budget)
        result = results[name] = peak_of(attempt, args.usual, args.tensors)
        if result["status"] == "ok":
            base = min(r["peak_bytes"] for n, r in results.items() if n in names[:2])
            result["ratio_to_non_private"] = result["peak_bytes"] / base
        print(line(name, result), flush=True)
    record = {
        "kind": "memory",
        "case": {
            "name": case.name,
            "batch_size": size,
            "device": args.device,
            "precision": args.precision,
            "memory_budget": None if args.budget is None else round(args.budget * 2**20),
        },
        "environment": environment(args.device),
        "contestants": results,
    }
    save(record, args.out)
    return 0


def peak_of(attempt: Try, usual: bool, count_tensors: bool) -> dict[str, Any]:
    """With pages of their own for all tensors; on request with the allocator as it is."""
    result = run(attempt)
    if result["status"] == "ok" and attempt.device == "cpu":
        if usual:
            as_it_is = run(replace(attempt, own_pages=False))
            result["peak_bytes_with_usual_allocator"] = as_it_is.get("peak_bytes")
        if count_tensors:
            result |= run(replace(attempt, count_tensors=True))
    return result


def line(name: str, result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"  {name:<24} {result['status']}: {result['sentence']}"
    mib = 2**20
    text = (
        f"  {name:<24} peak {result['peak_bytes'] / mib:9.1f} MiB, ratio {result['ratio_to_non_private']:.3f}"
    )
    text += f"; while first called {result['peak_bytes_of_first_steps'] / mib:.1f} MiB"
    if result.get("peak_bytes_with_usual_allocator"):
        text += f"; with the usual allocator {result['peak_bytes_with_usual_allocator'] / mib:.1f} MiB"
    if "at" in result:
        tensors = result["peak_tensor_bytes_beside_the_model"] / mib
        text += f"; tensors {tensors:.1f} MiB beside the model, at {result['at']}"
    return text
