"""Clipped sums of a model under FSDP2: unit after unit they are formed, added up over the ranks and sharded.

A rank never holds more than one unit's sums whole. The units come in the same order on all ranks, that of the
backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor

from .bookkeeping import Bookkeeping
from .capture import Capture, Use
from .clipped_sum import ClippedSum
from .errors import Refused
from .fsdp import Sharding, Unit
from .planner import Plan
from .shards import local


class Trouble:
    """Keeps a refusal until all ranks have come to the same place: the others wait for this one's gathers.

    Use as a context; without FSDP it does nothing.
    """

    def __init__(self, sharding: Sharding | None):
        self.sharding = sharding
        self.first: Refused | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if self.sharding is None or not isinstance(error, Refused):
            return False
        self.first = self.first or error
        return True

    def withheld(self, sink: Callable[..., None]) -> Callable[..., None]:
        """A sink of the backward pass, which goes on after a refusal."""
        if self.sharding is None:
            return sink

        def careful(*args: Any) -> None:
            if self.first is None:
                with self:
                    sink(*args)

        return careful

    def share(self, way: str) -> None:
        """See ``Sharding.agree``."""
        if self.sharding is not None:
            self.sharding.agree(self.first, way)


@dataclass(frozen=True)
class Portion:
    """Units whose uses are contracted together, for their sums are pulled back together: one, as a rule."""

    units: tuple[Unit, ...]
    uses: frozenset[int]


def portions(plan: Plan, sharding: Sharding) -> list[Portion]:
    """All units, those first that a backward pass is done with first."""
    owners: dict[Unit, Unit] = {}

    def root(unit: Unit) -> Unit:
        while owners.setdefault(unit, unit) != unit:
            unit = owners[unit]
        return unit

    for group in plan.findings.groups:
        first, *others = (sharding.unit_of[leaf] for leaf in group.leaves)
        for other in others:
            owners[root(other)] = root(first)
    members: dict[Unit, list[Unit]] = {}
    for unit in sharding.units:
        if unit.names:
            members.setdefault(root(unit), []).append(unit)
    uses: dict[Unit, list[int]] = {}
    for index, fact in enumerate(plan.findings.uses):
        if fact.layout is not None:
            uses.setdefault(root(sharding.unit_of[fact.leaves[0]]), []).append(index)
    found = [Portion(tuple(units), frozenset(uses.get(unit, ()))) for unit, units in members.items()]
    return sorted(found, key=lambda portion: -min(portion.uses, default=-1))


class Shards:
    """This rank's rows of sums over all ranks, as they come in.

    Args:
        into: an earlier sum, to whose shards they are added in place.
    """

    def __init__(self, sharding: Sharding, into: ClippedSum | None):
        self.sharding = sharding
        self.into = None if into is None else into.grads
        self._held: dict[str, Tensor] = {}

    def reduce(self, unit: Unit, totals: dict[str, Tensor]) -> None:
        """Take a unit's whole sums out of these of this rank, and add them up over the ranks."""
        whole = {n: totals.pop(n) if n in totals else self.sharding.nothing(n) for n in unit.names}
        for name, part in self.sharding.reduce(whole).items():
            if self.into is None:
                self._held[name] = part
            else:
                local(self.into[name]).add_(part)

    def grads(self) -> dict[str, Tensor]:
        """By name, when all units have been reduced."""
        if self.into is not None:
            return self.into
        return {name: self.sharding.shard(name, self._held[name]) for name in self.sharding.shards}


class ShardedSums:
    """The clipped sums of one physical batch, as shards; see ``Shards``."""

    def __init__(self, books: Bookkeeping, capture: Capture, sharding: Sharding, into: ClippedSum | None):
        self.books, self.capture, self.sharding = books, capture, sharding
        self.due = portions(books.plan, sharding)
        #: in which order what is reduced
        self.way = repr([unit.names for portion in self.due for unit in portion.units])
        self._missing = [set(portion.uses) for portion in self.due]
        self._shards = Shards(sharding, into)

    def arrive(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        """The sink of a second backward pass: a unit is reduced as soon as the last of its uses has come."""
        self.books.second_pass(use, a, g)
        for missing in self._missing:
            missing.discard(use.index)
        while self.due and not self._missing[0] and not self._made(self.due[0]):
            self._missing.pop(0)
            self._reduce(self.due.pop(0))

    def finish(self) -> dict[str, Tensor]:
        """Whatever is still due; then the sums by name."""
        for portion in self.due:
            self._reduce(portion)
        return self._shards.grads()

    def _made(self, portion: Portion) -> list[Tensor]:
        """Values that are no leaves."""
        values = (self.capture.uses[i].value for i in sorted(portion.uses))
        return [value for value in values if value.grad_fn is not None]

    def _reduce(self, portion: Portion) -> None:
        self.books.contract(self.capture, portion.uses)
        made = self._made(portion)
        with self.books.at_hand(made) if made else contextlib.nullcontext():
            totals = self.books.pull_back(self.capture, sorted(portion.uses))
        for unit in portion.units:
            self._shards.reduce(unit, totals)
        if totals:
            raise Refused(f"a gradient of {', '.join(sorted(totals))} came where the plan has none.")
