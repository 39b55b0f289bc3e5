"""Private against non-private training steps, interleaved in one process.

python -m benchmarks.speed vit-tiny --out results/cpu-speed-vit-tiny.json
python -m benchmarks.speed bit-50x1 --method auto,bk-ghost --peers opacus,fastdp --channels-last
python -m benchmarks.speed vit-tiny --compiled
python -m benchmarks.speed memory --model vit-small --batch 16 --budget 64
python -m benchmarks.speed roofline --out results/cpu-roofline.json
python -m benchmarks.speed largest --model vit-base --gib 40 --device cuda
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from . import largest, memory, roofline
from .cases import CASES, SMALL
from .environment import save
from .measure import Settings, is_exact, measure
from .peers import PEERS


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("case", nargs="+", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--method", default="auto", help="of dptrain, by commas; each may end in +compiled or +channels_last"
    )
    parser.add_argument(
        "--ordinary", default="kept,fresh", help="non-private variants, with the same options"
    )
    parser.add_argument("--compiled", action="store_true", help="also all of them compiled")
    parser.add_argument("--channels-last", action="store_true", help="also dptrain's with channels last")
    parser.add_argument("--peers", default="", help=f"by commas: {', '.join(PEERS)}")
    parser.add_argument("--fastdp", help="checkout of awslabs/fast-differential-privacy (or $FASTDP)")
    parser.add_argument("--batch", type=int, help="physical batch size; by default the case's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--memory-budget", type=float, help="of auto, in MiB")
    parser.add_argument("--accumulate", type=int, default=16, help="physical batches in a logical one")
    parser.add_argument("--seconds", type=float, default=90, help="limit of the timed part of a case")
    parser.add_argument("--precise", type=float, default=0.005, help="stop when ratios are known to this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--poisson-steps", type=int, default=0, help="count compilations in so many")
    parser.add_argument("--no-check", action="store_true", help="no exactness (while tuning)")
    parser.add_argument("--small", action="store_true", help="tiny forms of the cases: tries the code only")
    parser.add_argument("--out", type=Path, help="the record; with several cases a folder")
    return parser.parse_args(argv)


def settings(args: argparse.Namespace, convolutional: bool) -> Settings:
    methods, ordinary = args.method.split(","), args.ordinary.split(",")
    if convolutional:  # a fair baseline for convolutions
        ordinary += ["kept+channels_last"]
        methods += [f"{m}+channels_last" for m in methods] if args.channels_last else []
    if args.compiled:
        ordinary += [f"{spec}+compiled" for spec in ordinary if not spec.startswith("fresh")]
        methods += [f"{spec}+compiled" for spec in methods]
    return Settings(
        methods=methods,
        ordinary=ordinary,
        peers=[p for p in args.peers.split(",") if p],
        batch_size=args.batch,
        device=args.device,
        precision=args.precision,
        accumulate=args.accumulate,
        limit_s=args.seconds,
        precise=args.precise,
        poisson_steps=args.poisson_steps,
        check=not args.no_check,
        memory_budget=None if args.memory_budget is None else round(args.memory_budget * 2**20),
    )


def show(record: dict[str, Any]) -> None:
    case = record["case"]
    print(f"{case['name']}, batch {case['batch_size']}, {case['precision']} on {case['device']}")
    for name, r in record["contestants"].items():
        if r["status"] != "ok":
            continue
        first, later, end = (
            1e3 * statistics.median(r[f"raw_{part}_s"])
            for part in ("first_physical_step", "later_physical_step", "end_of_logical_step")
        )
        low, high = r["quartiles_of_paired_ratios"]
        rounds = len(r["raw_end_of_logical_step_s"])
        exact = ""
        if "float64" in r:
            verdict, timed = r["float64"], r["as_timed"]
            error = verdict.get("error_of_sum")
            exact = verdict["verdict"] + (f" {error:.0e}" if error is not None else "")
            exact += f" ({verdict['sentence']})" if verdict.get("sentence") else ""
            if timed:
                exact += f", as timed {timed['relative_error']:.0e} (autograd {timed['rounding']:.0e})"
        if "recompilations" in r:
            exact += f", {r['recompilations']} recompilations in {case['poisson_steps']} Poisson steps"
        print(
            f"  {name:<32} {first:8.1f} / {later:8.1f} ms a first / later step, {end:6.1f} ms to end, "
            f"ratio {r['ratio_to_non_private']:.3f} ({low:.3f} to {high:.3f}, n = {rounds})"
            f"  {exact}"
        )
    quiet = record["quiet"]
    others = quiet["cpu_share_of_others"]
    print(f"  load before {quiet['load_before'][0]:.2f}; others took {others or 0:.0%} of the cores")


def main(argv: list[str]) -> int:
    others = {"memory": memory.main, "roofline": roofline.main, "largest": largest.main}
    if argv and argv[0] in others:
        return others[argv[0]](argv[1:])
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")  # those of peers, mostly
    if args.fastdp:
        os.environ["FASTDP"] = args.fastdp
    exact = True
    for name in args.case:
        case = (SMALL if args.small else CASES)[name]
        record = measure(case, settings(args, case.convolutional))
        show(record)
        exact &= is_exact(record)
        if args.out:
            out = args.out / f"{args.device}-speed-{name}.json" if len(args.case) > 1 else args.out
            save(record, out)
    if not exact:
        print("a result above is not exact: its speed means nothing.", file=sys.stderr)
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
