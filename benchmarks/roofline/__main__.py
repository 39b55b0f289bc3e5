"""What speed the machine allows: operations and bytes of ordinary training, and of clipping beside it.

python -m benchmarks.roofline vit-tiny bit-50x1 --out results/cpu-roofline.json

Clipping replaces the ordinary weight gradients and adds work of its own. For a use with T positions, a
weight of d x p and B examples:

* keep and reuse adds no product: the same 2BTdp operations give B gradients in place of their sum. They
  are written once, their norms are taken while they are in cache, and they are read once for the sum:
  2·B·d·p numbers of memory traffic.
* Gram and contract adds two symmetric products, 2BT²(d + p) operations, of which n row blocks need
  (1 + 1/n) / 2; the contraction costs what the ordinary gradient does.
* For a k x k convolution the Gram matrix of the patches is a sum over kernel offsets of shifted windows of
  the pixels' Gram matrix: H²W²·I products and k²·T² additions in place of k²·T²·I products.
* A depthwise convolution's gradient per example is what a convolution with (example, channel) as its
  groups gives: no more operations than the ordinary one, B·d·p numbers to keep.
* A bias or a scale: its per-example sums are partial sums of the ordinary one.

The cheaper way of each is added to the measured time of an ordinary step. That is a bound on what can be
reached by these means: every product at the rate of a large one, nothing else lost.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import dptrain.torch as dpt
from benchmarks.record import command, save
from dptrain.bench.environment import Quiet, environment
from dptrain.torch.uses.convolution import Convolution
from dptrain.torch.uses.lookup import Lookup

from .cases import CASES, SMALL, Case
from .rates import Rates, measure_rates, seconds

ITEMSIZE = 4
#: row blocks of a symmetric product
BLOCKS = 4
#: examples of the batch that the shapes of uses are read from
FEW = 2


@dataclass(frozen=True)
class Extra:
    """What clipping one group of uses adds to its ordinary gradients, for a physical batch."""

    parameter: str
    operation: str
    way: str
    flops: float
    bytes_written: float
    bytes_read: float
    bytes_read_cached: float = 0.0

    def seconds(self, rates: Rates) -> float:
        moved = self.bytes_written / rates.write_bytes_per_s + self.bytes_read / rates.read_bytes_per_s
        return self.flops / rates.flops_per_s + moved + self.bytes_read_cached / rates.read_cached_bytes_per_s


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write, as if nothing stayed in cache; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def extras(task: dpt.ClippedGrad, batch: Any, batch_size: int, rates: Rates) -> list[Extra]:
    """The cheapest way for each group of uses, at ``batch_size``."""
    findings = task.plan(batch).findings
    found = []
    for group in findings.groups:
        facts = [findings.uses[i] for i in group.uses if findings.uses[i].reached]
        if facts:
            name = ", ".join(group.leaves)
            found.append(min(ways(name, facts, batch_size), key=lambda extra: extra.seconds(rates)))
    return found


def ways(name: str, facts: list[Any], batch_size: int) -> Iterable[Extra]:
    """Every way to norm and sum the gradients of uses that share their leaves."""
    first = facts[0]
    numbers = batch_size * math.prod(first.value)
    operation = first.operation
    if first.size is None:
        yield Extra(name, operation, "direct", 0, ITEMSIZE * numbers, ITEMSIZE * numbers)
        return
    yield Extra(name, operation, "keep", 0, *3 * (ITEMSIZE * numbers,))
    positions = sum(fact.size.positions for fact in facts)  # of tied uses all with all
    half = (1 + 1 / BLOCKS) / 2 if positions > 1 else 1
    grams = 2 * 2 * batch_size * positions**2 * first.size.groups * ITEMSIZE
    features = sum(each_side(fact, positions) for fact in facts) / len(facts)
    flops = half * 2 * batch_size * positions**2 * first.size.groups * features
    yield Extra(name, operation, "gram", flops, grams / 2, grams / 2)
    if isinstance(first.rule, Convolution) and math.prod(first.rule.kernel) > 1:
        yield shifted_gram(name, first, batch_size, half)


def each_side(fact: Any, positions: int) -> float:
    """Features of both operands; rows that are picked from a table are compared, not multiplied."""
    return fact.size.cols + (0 if isinstance(fact.rule, Lookup) else fact.size.rows)


def shifted_gram(name: str, fact: Any, batch_size: int, half: float) -> Extra:
    """By the pixels' Gram matrix, k² shifted windows of which add up to that of the patches."""
    kernel, groups, size = fact.rule.kernel, fact.size.groups, fact.size
    taps = math.prod(kernel)
    pixels = size.positions * math.prod(fact.rule.stride)
    channels = size.cols / taps
    products = half * 2 * batch_size * groups * (pixels**2 * channels + size.positions**2 * size.rows)
    window = batch_size * groups * taps * size.positions**2
    grams = batch_size * groups * (pixels**2 + 2 * size.positions**2) * ITEMSIZE
    return Extra(name, fact.operation, "gram of pixels", products + window, grams, grams + window * ITEMSIZE)


def convolution_backward_flops(grad, image, weight, *rest: Any, out_shape: Any = None, **_: Any) -> int:
    """As many as forward for each of both gradients; torch's own count overlooks groups."""
    transposed, output_mask = rest[4], rest[7]
    return sum(output_mask[:2]) * conv_flop_count(image, weight, grad, transposed=transposed)


def ordinary(case: Case, batch: Any, device: str, repeats: int) -> dict[str, float]:
    """Operations, bytes and seconds of an ordinary forward and backward pass."""
    model = case.build(device)

    def step() -> None:
        case.loss_fn(model, batch).sum().backward()

    grouped = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as flops, Traffic() as traffic:
        step()
    times = [seconds(step, device) for _ in range(repeats + 1)][1:]
    return {
        "flops": flops.get_total_flops(),
        "bytes_of_operations": traffic.bytes,
        "seconds": statistics.median(times),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def row(
    case: Case, batch_size: int, rates: Rates, device: str, accumulate: int, repeats: int
) -> dict[str, Any]:
    """One case: ordinary counts, what clipping adds at best, and the ratio that follows."""
    torch.manual_seed(1)
    plain = ordinary(case, case.make_batch(batch_size), device, repeats)
    task = dpt.clipped_grad(case.build(device), case.loss_fn, clip_norm=1.0)
    added = extras(task, case.make_batch(FEW), batch_size, rates)
    clipping = sum(extra.seconds(rates) for extra in added)
    noise = plain["parameters"] / rates.noise_per_s
    step = plain["seconds"]
    by_way: dict[str, dict[str, float]] = {}
    for extra in added:
        sums = by_way.setdefault(extra.way, dict.fromkeys(("uses", "flops", "bytes", "seconds"), 0.0))
        sums["uses"] += 1
        sums["flops"] += extra.flops
        sums["bytes"] += extra.bytes_written + extra.bytes_read
        sums["seconds"] += extra.seconds(rates)
    return {
        "batch_size": batch_size,
        "ordinary": plain | {"seconds_of_products_alone": plain["flops"] / rates.flops_per_s},
        "added": {
            "flops": sum(extra.flops for extra in added),
            "bytes": sum(extra.bytes_written + extra.bytes_read for extra in added),
            "seconds": clipping,
            "noise_s_of_a_logical_step": noise,
            "by_way": by_way,
        },
        "ratio_allowed": step / (step + clipping + noise / accumulate),
        "uses": [vars(extra) | {"seconds": extra.seconds(rates)} for extra in added],
    }


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.split("\n")[0])
    parser.add_argument("case", nargs="*", choices=[[], *CASES], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--accumulate", type=int, default=16, help="physical batches in a logical one")
    parser.add_argument("--repeats", type=int, default=3, help="of the ordinary step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="tiny forms of the cases: tries the code only")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> int:
    args = arguments(sys.argv[1:])
    torch.set_num_threads(args.threads)
    with Quiet() as quiet:
        rates = measure_rates(args.device, *((256, 2**22) if args.small else ()))
        print(", ".join(f"{name} {value / 1e9:.2f}e9" for name, value in rates.record.items()))
        rows = {}
        for name in args.case or CASES:
            case = (SMALL if args.small else CASES)[name]
            rows[name] = row(case, case.batch_size, rates, args.device, args.accumulate, args.repeats)
            print(line(name, rows[name]), flush=True)
    record = {
        "kind": "roofline",
        "environment": environment(args.device) | {"command": command("benchmarks.roofline")},
        "quiet": quiet.record(),
        "rates": rates.record,
        "cases": rows,
    }
    save(record, args.out)
    return 0


def line(name: str, row: dict[str, Any]) -> str:
    plain, added = row["ordinary"], row["added"]
    ways = ", ".join(
        f"{int(sums['uses'])} {way} {1e3 * sums['seconds']:.1f} ms" for way, sums in added["by_way"].items()
    )
    return "; ".join(
        [
            f"  {name:<14} ordinary {plain['flops'] / 1e9:.1f} GFLOP, "
            f"{plain['bytes_of_operations'] / 1e9:.2f} GB, {1e3 * plain['seconds']:.1f} ms",
            f"added {added['flops'] / 1e9:.2f} GFLOP, {added['bytes'] / 1e9:.2f} GB, "
            f"{1e3 * added['seconds']:.1f} ms ({ways})",
            f"ratio allowed {row['ratio_allowed']:.3f}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
