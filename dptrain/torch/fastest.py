"""The plan of ``auto``: each group of uses by the route that takes the least time, within a memory budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import route_cost
from .layout import Layout
from .pullback import Group, Kind
from .routes import DIRECT, Machine, Route, has_gram, is_direct
from .stopwatch import Stopwatch

if TYPE_CHECKING:
    from .trace import UseFacts

KEEP = Route("materialise", "reuse")
DROP = Route("materialise", "contract")
GRAM = Route("gram", "contract")
#: by how much a Gram route must be faster to be preferred
DOUBT = 0.05


@dataclass(frozen=True)
class Offer:
    """A route, what it takes, and what it holds until the clip factors are known."""

    route: Route
    seconds: float
    bytes: int


def offers(
    group: Group, facts: list[UseFacts], batch_size: int, machine: Machine, stopwatch: Stopwatch | None
) -> list[Offer]:
    """The routes of a group, the fastest first."""
    if is_direct(group, facts):
        return [Offer(DIRECT, 0.0, _kept(facts, batch_size))]
    if group.one_by_one or not all(fact.size for fact in facts):
        return [Offer(KEEP, 0.0, _kept(facts, batch_size))]
    routes = [KEEP, DROP] + ([GRAM] if has_gram(group, facts) else [])
    seconds = _measured(group, facts, routes, batch_size, stopwatch)
    if seconds is None:
        tied = len(facts) if group.kind is Kind.TIED else 1
        seconds = [
            sum(route_cost.seconds(fact, route, batch_size, machine) for fact in facts)
            * (tied if route is GRAM else 1)
            for route in routes
        ]
    # a Gram norm may turn out in doubt, and is then materialised after all
    seconds = [s * (1 + DOUBT) if route is GRAM else s for route, s in zip(routes, seconds)]
    held = [_kept(facts, batch_size) if r is KEEP else _operands(facts, batch_size) for r in routes]
    return sorted(map(Offer, routes, seconds, held), key=lambda offer: (offer.seconds, offer.bytes))


def _measured(
    group: Group, facts: list[UseFacts], routes: list[Route], batch_size: int, stopwatch: Stopwatch | None
) -> list[float] | None:
    """Seconds of each route, or None if one of them cannot be timed by itself."""
    if stopwatch is None or group.kind not in (Kind.ALONE, Kind.STANDARDISED):
        return None
    standardised = group.kind is Kind.STANDARDISED
    found = [
        stopwatch.seconds(fact, (route.norm, route.sum), batch_size, standardised)
        for route in routes
        for fact in facts
    ]
    if any(seconds is None for seconds in found):
        return None
    each = len(facts)
    return [sum(found[i * each : (i + 1) * each]) for i in range(len(routes))]  # type: ignore[arg-type]


def _kept(facts: list[UseFacts], batch_size: int) -> int:
    return sum(batch_size * math.prod(fact.value) * route_cost.ITEMSIZE for fact in facts)


def _operands(facts: list[UseFacts], batch_size: int) -> int:
    """Bytes of what two operands hold; where their shapes do not tell, by positions and features."""
    held = 0
    for fact in facts:
        if fact.shapes is None or not isinstance(fact.layout, Layout):
            groups, positions, rows, cols = fact.size
            held += batch_size * groups * positions * (rows + cols)
            continue
        for shape in filter(None, fact.shapes):
            axis = fact.layout.axis
            held += math.prod(shape[:axis]) * fact.layout.rows(batch_size) * math.prod(shape[axis + 1 :])
    return held * route_cost.ITEMSIZE


def choose(menu: list[list[Offer]], budget: int | None) -> list[Route] | None:
    """A route from each list so that what is held fits into ``budget`` bytes; None if nothing does.

    From the fastest of each, the exchange that gives most memory back for its time is made until it
    fits: the greedy solution of a knapsack problem.
    """
    taken = [each[0] for each in menu]
    while budget is not None and sum(offer.bytes for offer in taken) > budget:
        exchanges = [
            ((other.seconds - now.seconds) / (now.bytes - other.bytes), i, other)
            for i, (now, each) in enumerate(zip(taken, menu))
            for other in each
            if other.bytes < now.bytes
        ]
        if not exchanges:
            return None
        _, i, other = min(exchanges, key=lambda exchange: exchange[:2])
        taken[i] = other
    return [offer.route for offer in taken]
