"""Judge engines on the zoo.

python -m benchmarks.zoo --engine dptrain --engine opacus-hooks
python -m benchmarks.zoo --engine dptrain:ghost --only 'timm/*' --out ghost.json
python -m benchmarks.zoo --docs           # write the table of docs/zoo.md from the records
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch

from .docs import write_docs
from .engines import ENGINES, Engine, Missing, engine_named
from .entry import Entry
from .families import CATALOGUE
from .verdict import Verdict, judge

RESULTS = Path("results")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--engine", action="append", help=f"{', '.join(ENGINES)} or dptrain:METHOD; repeatable"
    )
    parser.add_argument("--only", default="*", help="a pattern of names or families")
    parser.add_argument(
        "--out", type=Path, help="the record; by default results/zoo-ENGINE.json for a whole run"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--fastdp", help="checkout of awslabs/fast-differential-privacy (or $FASTDP)")
    parser.add_argument("--private-vision", help="checkout of woodyx218/private_vision (or $PRIVATE_VISION)")
    parser.add_argument(
        "--docs", action="store_true", help="write docs/zoo.md's table from results/zoo-*.json"
    )
    return parser.parse_args()


def chosen(pattern: str) -> list[Entry]:
    return [e for e in CATALOGUE if fnmatch.fnmatch(e.name, pattern) or fnmatch.fnmatch(e.family, pattern)]


def run(name: str, engine: Engine, entries: list[Entry], seed: int) -> list[Verdict]:
    verdicts = []
    for number, entry in enumerate(entries, 1):
        verdict = judge(entry, engine, seed)
        verdicts.append(verdict)
        line = (
            f"{name} {number}/{len(entries)}  {entry.name:<40} {verdict.verdict:<8} {verdict.seconds:6.1f} s"
        )
        print(f"{line}  {verdict.sentence[:110]}".rstrip(), flush=True)
    return verdicts


def record(name: str, engine: Engine, verdicts: list[Verdict], seed: int) -> dict:
    return {
        "engine": name,
        "command": f"python -m benchmarks.zoo --engine {name} --seed {seed}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": engine.versions(),
        "models": [verdict.record for verdict in verdicts],
    }


def summary(verdicts: list[Verdict]) -> str:
    """Counts over the models that have a private gradient, and over those that have none."""
    parts = []
    for title, refusable in (("models", False), ("to be refused", True)):
        count = collections.Counter(v.verdict for v in verdicts if v.refusable == refusable)
        found = ", ".join(f"{count[kind]} {kind}" for kind in ("exact", "refused", "raises", "WRONG"))
        parts.append(f"{sum(count.values())} {title}: {found}")
    return "; ".join(parts)


def main() -> int:
    args = arguments()
    for variable, path in (("FASTDP", args.fastdp), ("PRIVATE_VISION", args.private_vision)):
        if path:
            os.environ[variable] = path
    if args.docs:
        write_docs(RESULTS, Path("docs/zoo.md"))
        return 0
    torch.set_num_threads(1)  # tiny tensors: threads only wait for each other
    warnings.filterwarnings("ignore")
    entries = chosen(args.only)
    names = args.engine or ["dptrain"]
    if not entries or (args.out and len(names) > 1):
        print("nothing matches --only." if not entries else "--out takes one --engine.", file=sys.stderr)
        return 2
    summaries = {}
    for name in names:
        try:
            engine = engine_named(name)
        except (Missing, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        verdicts = run(name, engine, entries, args.seed)
        summaries[name] = summary(verdicts)
        out = args.out or (RESULTS / f"zoo-{name.replace(':', '-')}.json" if args.only == "*" else None)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record(name, engine, verdicts, args.seed), indent=1) + "\n")
    for name, text in summaries.items():
        print(f"{name:<18} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
