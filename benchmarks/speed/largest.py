"""The largest physical batch that fits into a given memory, each try in a fresh process.

python -m benchmarks.speed largest --model vit-base --gib 40 --contestants 'non-private fresh,auto'

On a GPU the allocator is held to that much of the device, so that a smaller card is emulated (what the
driver itself takes comes on top, as it does on the card). On a CPU the process's address space may grow
by that much. The peaks of two small batches say where to look; then it is bisected.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .cases import CASES
from .environment import environment, save
from .fresh import Try, run

Result = dict[str, Any]
#: statuses that mean "too large"; anything else that is not "ok" ends the search
TOO_LARGE = ("out-of-memory", "killed")


@dataclass
class Search:
    """Bisection with a guess.

    Attributes:
        attempt: result of a try at a batch size.
        small: a size that surely fits; half of it is tried too.
        resolution: relative; the search ends when the answer is known to this, or exactly.
        tries: all results, by size.
    """

    attempt: Callable[[int], Result]
    small: int
    limit_bytes: int
    resolution: float = 0.01
    tries: dict[int, Result] = field(default_factory=dict)

    def fits(self, size: int) -> bool:
        """Raises ``Broken`` where it failed for another reason than memory."""
        if size not in self.tries:
            self.tries[size] = self.attempt(size)
        status = self.tries[size]["status"]
        if status not in ("ok", *TOO_LARGE):
            raise Broken(f"{status} at batch {size}: {self.tries[size].get('sentence', '')}")
        return status == "ok"

    def run(self) -> int:
        """The largest size that was seen to fit, 0 if one example does not."""
        low, high = self.bracket()
        while high - low > max(1, round(self.resolution * low)):
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low

    def bracket(self) -> tuple[int, int]:
        """A size that fits and one that does not."""
        if not self.fits(self.small):
            return 0, self.small
        low, guess = self.small, self.guess()
        step = max(1, round(3 * self.resolution * guess))
        while self.fits(guess):
            low, guess, step = guess, guess + step, 2 * step
        high = guess
        while low == self.small and high - step > low:
            guess, step = high - step, 2 * step
            if self.fits(guess):
                low = guess
            else:
                high = guess
        return low, high

    def guess(self) -> int:
        """Where the line through the peaks of two sizes meets the limit."""
        half = max(1, self.small // 2)
        if half == self.small or not self.fits(half):
            return 2 * self.small
        peaks = [self.tries[size]["peak_bytes"] for size in (half, self.small)]
        slope = (peaks[1] - peaks[0]) / (self.small - half)
        if slope <= 0:
            return 2 * self.small
        return max(self.small + 1, self.small + int((self.limit_bytes - peaks[1]) / slope))


class Broken(RuntimeError):
    """A try failed, and not for lack of memory."""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed largest", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="vit-base", choices=list(CASES))
    parser.add_argument("--gib", type=float, default=40.0, help="memory that there is")
    parser.add_argument("--contestants", default="non-private fresh,auto", help="by commas")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--from", dest="small", type=int, default=16, help="a batch that surely fits")
    parser.add_argument("--resolution", type=float, default=0.01, help="relative, of the answer")
    parser.add_argument(
        "--small-model", action="store_true", help="the case's tiny form: tries the code only"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    limit = round(args.gib * 2**30)
    template = Try(args.model, "", 1, args.device, args.precision, args.small_model, limit_bytes=limit)
    results: dict[str, Any] = {}
    for name in args.contestants.split(","):
        one = replace(template, contestant=name)
        search = Search(
            lambda n, one=one: run(replace(one, batch_size=n)), args.small, limit, args.resolution
        )
        try:
            results[name] = {"status": "ok", "largest": search.run()}
        except Broken as error:
            results[name] = {"status": "error", "sentence": str(error)}
        results[name]["tries"] = search.tries
        said = results[name].get("largest", results[name].get("sentence"))
        print(f"  {name:<24} {said}  ({len(search.tries)} tries)", flush=True)
    record = {
        "kind": "largest batch",
        "case": {
            "name": args.model,
            "device": args.device,
            "precision": args.precision,
            "gib": args.gib,
        },
        "environment": environment(args.device),
        "contestants": results,
    }
    save(record, args.out)
    return 0
