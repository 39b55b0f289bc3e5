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
from dptrain.bench.contestant import Unsupported
from dptrain.bench.engines import framework
from dptrain.bench.measures.one_way import alone
from dptrain.bench.meters import limit, meter
from dptrain.bench.outcome import Outcome
from dptrain.bench.processes import Ended, run
from dptrain.training.device import matmul_precision

#: relative: the search ends when the answer is known to this, or exactly
RESOLUTION = 0.03
TRY_TIMEOUT_S = 900.0
#: times a size that fits, a guess may go
FARTHEST = 8


def batch_size(case: Case) -> dict[str, Any]:
    """The largest batch that was seen to fit, and all tries.

    Raises:
        Unsupported: JAX on a GPU.
        Ended: a try failed for another reason than memory.
    """
    assert case.memory_gib is not None
    if framework(case) == "jax" and case.device.startswith("cuda"):
        raise Unsupported("memory of JAX is measured on a CPU.")
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
    """A logical step of two physical ones and one step more: peak bytes, and seconds of a physical step."""
    gauge = meter(case.device)
    limit(case.device, room)
    with matmul_precision(case.precision):
        contestant = alone(case)
        contestant.step()
        times = [race.seconds(contestant.step)]
        contestant.end()
        times.append(race.seconds(contestant.step))
    return {"peak_bytes": gauge.peak(), "physical_step_s": min(times)}


@dataclass
class Search:
    """Bisection that guesses: peaks grow in proportion to the batch.

    Attributes:
        attempt: what came of a batch size.
        small: where to begin.
        limit_bytes: what the peaks are extrapolated to.
        tries: all outcomes, by size.
    """

    attempt: Callable[[int], Outcome]
    small: int
    limit_bytes: int
    tries: dict[int, Outcome] = field(default_factory=dict)

    def run(self) -> int:
        """The largest size that was seen to fit, 0 if one example does not.

        Raises Ended where a try failed for another reason than memory.
        """
        low, high = 0, None
        size: int | None = self.small
        while size is not None:
            low, high = (size, high) if self._fits(size) else (low, size)
            size = self._next(low, high)
        return low

    def _fits(self, size: int) -> bool:
        self.tries[size] = self.attempt(size)
        if self.tries[size].status not in ("ok", "out-of-memory"):
            raise Ended(self.tries[size])
        return self.tries[size].status == "ok"

    def _next(self, low: int, high: int | None) -> int | None:
        """What to try between a size that fits and one that does not; None where the edge is known."""
        step = max(1, round(RESOLUTION * low))
        if high is None:
            return min(max(self._guess(low), low + 4 * step), FARTHEST * low)
        if high - low <= step:
            return None
        middle = (low + high) // 2
        if len(self.tries) % 3 == 0:  # guesses may creep
            return middle
        return min(max(self._guess(low) or middle, low + step), high - 1)

    def _guess(self, low: int) -> int:
        """Where the line through the peaks of the two largest sizes that fit meets the limit; 0: unknown."""
        fitting = sorted(size for size, tried in self.tries.items() if tried.status == "ok")[-2:]
        if len(fitting) < 2:
            return 2 * low
        first, second = (self.tries[size].value["peak_bytes"] for size in fitting)
        slope = (second - first) / (fitting[1] - fitting[0])
        return low + int((self.limit_bytes - second) / slope) if slope > 0 else 2 * low
