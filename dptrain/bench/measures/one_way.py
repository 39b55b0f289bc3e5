"""The contestant that a case is about, alone in its process."""

from __future__ import annotations

from dptrain.bench.case import Case
from dptrain.bench.contestant import Contestant
from dptrain.bench.engines import enter, is_ordinary


def alone(case: Case) -> Contestant:
    """The private way of a case; for one that is not private, the first way of ordinary training."""
    field = enter(case)
    if is_ordinary(case) or field.case is None:
        return next(iter(field.baselines.values()))()
    return field.case()
