"""What each use of a plan costs by its route, by the cost model of ``core.cost``.

Operations over the device's rate, and bytes over its bandwidth: what clipping adds to the forward
and backward pass. Only ratios between uses mean anything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dptrain.core import cost

from .uses.convolution import Convolution
from .uses.lookup import Lookup

if TYPE_CHECKING:
    from .planner import Plan
    from .routes import Machine, Route
    from .trace import UseFacts

ITEMSIZE = 4
#: a per-example gradient is written, read for its norm and read for the sum
PASSES_OVER_GRADIENTS = 3
#: a sum is formed, and read and written where it is added to
PASSES_OVER_SUMS = 4
#: both Gram matrices are written and read for their product
PASSES_OVER_GRAMS = 4


def shares(plan: Plan, machine: Machine) -> list[float]:
    """For each use, in their order, its share of what clipping costs; they add up to 1."""
    spent = [0.0] * len(plan.findings.uses)
    for group, route in zip(plan.findings.groups, plan.routes):
        for index in group.uses:
            spent[index] = seconds(plan.findings.uses[index], route, plan.batch_size, machine)
    total = sum(spent)
    return [s / total if total else 0.0 for s in spent]


def shape_of(fact: UseFacts) -> cost.UseShape:
    """The shape of an outer use as the cost model has it."""
    groups, positions, rows, cols = fact.size
    window = fact.rule.window if isinstance(fact.rule, Convolution) else 1
    return cost.UseShape(positions, cols, rows, groups, isinstance(fact.rule, Lookup), window)


def seconds(fact: UseFacts, route: Route, batch_size: int, machine: Machine) -> float:
    """What norm and sum of one use take by a route."""
    if fact.layout is None:
        return 0.0
    if fact.size is None:
        moved = PASSES_OVER_GRADIENTS * batch_size * math.prod(fact.value) * ITEMSIZE
        return moved / machine.bytes_per_s
    shape = shape_of(fact)
    if route.norm == "gram":
        norm = cost.gram(shape, batch_size, ITEMSIZE)
        passes = PASSES_OVER_GRAMS
    else:
        norm = cost.materialise(shape, batch_size, ITEMSIZE)
        passes = PASSES_OVER_GRADIENTS
    taken = norm.flops / machine.flops_per_s + passes * norm.bytes / machine.bytes_per_s
    if route.sum != "reuse":
        taken += cost.contract(shape, batch_size, ITEMSIZE).flops / machine.flops_per_s
    return taken
