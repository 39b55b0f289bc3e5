"""Which way a batch is clipped: how many examples at once, and the route of each group of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from dptrain.core import cost, methods
from dptrain.core.cost import UseShape
from dptrain.core.methods import Method

from .bookkeeping import Part, Route
from .uses import Table

#: operations per second over bytes per second: what a byte costs in operations, on a CPU and elsewhere
OPERATIONS_PER_BYTE = {"cpu": 6.0, "gpu": 20.0, "tpu": 100.0}


#: terms of a sum beyond which no useful bound on the rounding of a Gram norm exists
LONGEST = 2**20


@dataclass(frozen=True)
class Plan:
    """How a physical batch is clipped.

    Attributes:
        capture: by uses, by ``vmap`` of the gradient, or one example after another.
        rows: examples at once.
        second_backward: form the sum by a second pass through the loss, so that nothing of the first has
            to be held.
        parts: groups of values with their routes, where uses are captured.
    """

    capture: methods.Capture
    rows: int
    second_backward: bool = False
    parts: tuple[Part, ...] = ()


def routed(method: Method, parts: Sequence[Part], device: str) -> tuple[Part, ...]:
    """The parts on the routes that a method prescribes, or that look fastest for ``auto``."""
    return tuple(replace(part, route=_route(method, part, device)) for part in parts)


def _route(method: Method, part: Part, device: str) -> Route:
    if not part.uses:
        return Route.KEEP  # already formed by the backward pass
    formed = _formed(method)
    single = part.single
    if single is None:
        return formed
    shape = stacked_shape(part)
    match method.norm:
        case methods.Norm.MATERIALISE:
            return formed
        case _ if max(shape.d_in, shape.d_out, shape.positions * shape.groups) > LONGEST:
            return formed if not isinstance(single.rule, Table) else Route.GRAM
        case methods.Norm.GRAM:
            return Route.GRAM
        case methods.Norm.CHEAPER:
            return Route.GRAM if cost.gram_saves_memory(shape) else formed
        case _:
            return _fastest(shape, isinstance(single.rule, Table), device)


def _formed(method: Method) -> Route:
    """What becomes of a gradient that was materialised."""
    keeps = method.sum in (methods.Sum.REUSE, methods.Sum.REUSE_OR_CONTRACT, methods.Sum.PLANNED)
    return Route.KEEP if keeps else Route.DROP


def stacked_shape(part: Part) -> UseShape:
    """The shape of a single use with the loops around it: slices are groups, turns positions."""
    use = part.single
    assert use is not None
    shape, stacking = use.rule.shape, use.stacking
    return replace(shape, groups=shape.groups * stacking.slices, positions=shape.positions * stacking.turns)


def _fastest(shape: UseShape, table: bool, device: str) -> Route:
    if table:
        return Route.GRAM  # by sorting: neither the table's size nor T² is formed
    price = OPERATIONS_PER_BYTE.get(device, OPERATIONS_PER_BYTE["gpu"])
    formed, summed = cost.materialise(shape), cost.contract(shape)
    by_gram = cost.gram(shape).flops + 3 * price * cost.gram(shape).bytes + summed.flops
    keep = formed.flops + 3 * price * formed.bytes
    return Route.GRAM if by_gram < keep else Route.KEEP


#: operations of a batch's weight gradients below which no way is worth a measurement
WORTH_MEASURING = 1e8


def is_worth_measuring(parts: Sequence[Part], size: int) -> bool:
    """Whether a batch of ``size`` takes long enough for the ways to differ."""
    uses = [use for part in parts for use in part.uses]
    turns = [use.stacking.slices * use.stacking.turns for use in uses]
    total = sum(n * cost.contract(use.rule.shape).flops for n, use in zip(turns, uses))
    return size * total >= WORTH_MEASURING


def parts_to_try(size: int) -> list[int]:
    """Parts of a batch of ``size`` that are worth a measurement beside the whole and single examples.

    On a CPU a few examples at a time stay in its caches; on other devices the whole batch is what fills them.
    """
    if jax.default_backend() != "cpu":
        return []
    few = next((rows for rows in (4, 2, 3, 5) if rows < size and size % rows == 0), None)
    more = [16] if size >= 64 and size % 16 == 0 else []
    return [few, *more] if few else []
