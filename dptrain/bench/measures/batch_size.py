"""The largest physical batch that fits a given memory: bisection, each try in a process of its own.

On a GPU the allocator is held to that much of the device, so that a smaller card is emulated. On a CPU the
process's address space may grow by that much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from dptrain.bench import race
from dptrain.bench.case import Case
from dptrain.bench.measures.one_way import alone
from dptrain.bench.meters import limit, meter
from dptrain.bench.outcome import Outcome
from dptrain.bench.processes import Ended, run
from dptrain.bench.torch_task import arithmetic

#: relative: the search ends when the answer is known to this, or exactly
RESOLUTION = 0.02
TRY_TIMEOUT_S = 900.0


def batch_size(case: Case) -> dict[str, Any]:
    """The largest batch that was seen to fit, and all tries.

    Raises:
        ValueError: the case states no memory.
        Ended: a try failed for another reason than memory.
    """
    if case.memory_gib is None:
        raise ValueError("the largest batch is searched under a given memory: state memory_gib.")
    room = round(case.memory_gib * 2**30)

    def attempt(size: int) -> Outcome:
        return run(fits, replace(case, batch_size=size), room, timeout_s=TRY_TIMEOUT_S)

    search = Search(attempt, case.batch_size, room)
    largest = search.run()
    speed = search.tries[largest].value["physical_step_s"] if largest else None
    return {
        "largest": largest,
        "limit_bytes": room,
        "examples_per_s": largest / speed if speed else None,
        "tries": [
            {"batch_size": size, "status": tried.status, **(tried.value or {})}
            for size, tried in sorted(search.tries.items())
        ],
    }


def fits(case: Case, room: int) -> dict[str, float]:
    """Two logical steps of two physical ones under the limit: peak bytes and the time of a physical step."""
    gauge = meter(case.device)
    limit(case.device, room)
    with arithmetic(case.precision):
        contestant = alone(case)
        for _ in range(2):
            times = [race.seconds(contestant.step) for _ in range(2)]
            contestant.end()
    return {"peak_bytes": gauge.peak(), "physical_step_s": min(times)}


@dataclass
class Search:
    """Bisection with a guess.

    Attributes:
        attempt: what came of a batch size.
        small: where to begin; half of it is tried too.
        limit_bytes: what the peaks are extrapolated to.
        tries: all outcomes, by size.
    """

    attempt: Callable[[int], Outcome]
    small: int
    limit_bytes: int
    tries: dict[int, Outcome] = field(default_factory=dict)

    def fits(self, size: int) -> bool:
        """Raises Ended where it failed for another reason than memory."""
        if size not in self.tries:
            self.tries[size] = self.attempt(size)
        if self.tries[size].status not in ("ok", "out-of-memory"):
            raise Ended(self.tries[size])
        return self.tries[size].status == "ok"

    def run(self) -> int:
        """The largest size that was seen to fit, 0 if one example does not."""
        low, high = self._bracket()
        while high - low > max(1, round(RESOLUTION * low)):
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return low

    def _bracket(self) -> tuple[int, int]:
        """A size that fits and one that does not."""
        if not self.fits(self.small):
            return 0, self.small
        low, guess = self.small, self._guess()
        step = max(1, round(2 * RESOLUTION * guess))
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

    def _guess(self) -> int:
        """Where the line through the peaks of two sizes meets the limit."""
        half = max(1, self.small // 2)
        if half == self.small or not self.fits(half):
            return 2 * self.small
        first, second = (self.tries[size].value["peak_bytes"] for size in (half, self.small))
        slope = (second - first) / (self.small - half)
        if slope <= 0:
            return 2 * self.small
        return max(self.small + 1, self.small + int((self.limit_bytes - second) / slope))
