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
#: what the stopwatch takes for a norm and for a sum
PARTS = {KEEP: ("keep", "reuse"), DROP: ("drop", "contract"), GRAM: ("gram", "contract")}
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
    seconds = [_seconds(group, facts, route, batch_size, machine, stopwatch) for route in routes]
    # a Gram norm may turn out in doubt, and is then materialised after all
    seconds = [s * (1 + DOUBT) if route is GRAM else s for route, s in zip(routes, seconds)]
    held = [_kept(facts, batch_size) if r is KEEP else _operands(facts, batch_size) for r in routes]
    return sorted(map(Offer, routes, seconds, held), key=lambda offer: (offer.seconds, offer.bytes))


def _seconds(
    group: Group,
    facts: list[UseFacts],
    route: Route,
    batch_size: int,
    machine: Machine,
    stopwatch: Stopwatch | None,
) -> float:
    """Of a route: measured if all of it can be, otherwise by the cost model."""
    norms, sums = (
        [_part(stopwatch, group, fact, part, batch_size) for fact in facts] for part in PARTS[route]
    )
    if None in norms or None in sums:
        norms = [route_cost.seconds(fact, route, batch_size, machine) for fact in facts]
        sums = [0.0]
    if group.kind is Kind.TIED and route is GRAM:  # a cross term of two uses costs what their own ones do
        norms = norms * len(facts)
    elif group.kind is Kind.TIED:  # the gradients of an example are added up before they are normed
        moved = route_cost.PASSES_OVER_GRADIENTS * _kept(facts[1:], batch_size)
        norms = [*norms, moved / machine.bytes_per_s]
    return sum(norms) + sum(sums)


def _part(
    stopwatch: Stopwatch | None, group: Group, fact: UseFacts, part: str, batch_size: int
) -> float | None:
    if stopwatch is None or group.kind is Kind.GENERAL:
        return None
    return stopwatch.seconds(fact, part, batch_size, group.kind is Kind.STANDARDISED)


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


@dataclass(frozen=True)
class Choice:
    """Routes, and in how many parts a batch is taken, one after the other."""

    routes: list[Route]
    parts: int = 1


def choose(
    menu: list[list[Offer]], budget: int | None, batch_size: int = 1, part_s: float = math.inf
) -> Choice | None:
    """A route from each list so that what is held fits into ``budget`` bytes; None if nothing does.

    Either other routes are taken, or fewer examples at a time, whichever takes less.

    Args:
        part_s: what each part takes besides its examples, in seconds.
    """
    fastest = [each[0] for each in menu]
    held = sum(offer.bytes for offer in fastest)
    if budget is None or held <= budget:
        return Choice([offer.route for offer in fastest])
    others = _exchanged(menu, budget)
    fit = batch_size * budget // held  # examples
    if fit:
        parts = -(-batch_size // fit)
        slower = math.inf if others is None else sum(o.seconds - f.seconds for o, f in zip(others, fastest))
        if (parts - 1) * part_s < slower:
            return Choice([offer.route for offer in fastest], parts)
    return None if others is None else Choice([offer.route for offer in others])


def _exchanged(menu: list[list[Offer]], budget: int) -> list[Offer] | None:
    """From the fastest of each, the exchange that gives most memory back for its time is made until it
    fits: the greedy solution of a knapsack problem."""
    taken = [each[0] for each in menu]
    while sum(offer.bytes for offer in taken) > budget:
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
    return taken
