"""The contestant that a case is about, alone in its process."""

from __future__ import annotations

from collections.abc import Callable

from dptrain.bench.case import Case
from dptrain.bench.contestant import Contestant
from dptrain.bench.engines import enter


def alone(case: Case) -> Contestant:
    """The private way of a case; for one that is not private, ordinary training."""
    return made(case)()


def made(case: Case) -> Callable[[], Contestant]:
    """What sets it up; model and data are there before, and nobody is judged."""
    field = enter(case, clip_norm=1.0)
    return field.case or field.plain
