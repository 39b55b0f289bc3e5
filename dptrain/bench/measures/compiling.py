"""How much longer the first step takes than later ones."""

from __future__ import annotations

import statistics
from typing import Any

from dptrain.bench import race
from dptrain.bench.case import Case
from dptrain.bench.measures.one_way import made
from dptrain.training.device import matmul_precision

LATER = 5


def compiling(case: Case) -> dict[str, Any]:
    """Seconds of the first logical step of two physical ones and all that it needs, and of later ones."""
    with matmul_precision(case.precision):

        def first() -> None:
            nonlocal contestant
            contestant = begin()
            whole()

        def whole() -> None:
            contestant.step()
            contestant.step()
            contestant.end()

        begin, contestant = made(case), None
        first_s = race.seconds(first)
        later = [race.seconds(whole) for _ in range(LATER)]
    median = statistics.median(later)
    return {
        "first_step_s": first_s,
        "later_step_s": median,
        "compile_s": first_s - median,
        "raw_later_step_s": later,
    }
