"""What is kept of each use: its part of the norms, then its part of the clipped sum."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dptrain.core import clipping_error
from dptrain.core.clip_rules import ClipRule, Flat

from . import standardised
from .capture import Capture, Use
from .errors import Changed, Misfit, Unforeseen
from .full_precision import full_precision, is_full
from .planner import Plan
from .pullback import (
    Kind,
    pull_back_examples,
    pull_back_sums,
    tied_factors,
    tied_gradients,
    tied_squared_norms,
)
from .routes import DIRECT, Route
from .trace import CHANGING, UseFacts
from .uses import gram
from .uses.base import add_to, squared_norm, weighted_sum, widen
from .workspace import Workspace

#: the name in the workspace of gradients that are not kept
SCRATCH = "scratch"
#: elements of a gradient that waits until it can be normed and summed together with others
SMALL = 2**16


class Bounded(NamedTuple):
    """Squared norms ``[B]``, a bound on their error, and the way to take them without cancellation."""

    squared: Tensor
    bound: Tensor
    plainly: Callable[[], Tensor]
    part: int  #: of the clip rule


def in_full_precision(method):
    """For methods that take a capture: without autocast, TF32 and autograd."""

    @functools.wraps(method)
    def wrapped(self, capture: Capture, *args):
        with torch.no_grad(), full_precision(capture.anchor.device):
            return method(self, capture, *args)

    return wrapped


def clip_factors(
    squared: Tensor, clip_norm: float, elements: int, parts: int, stability: float | None = None
) -> Tensor:
    """``min(1, C / ||g_b||)``, a hair less so that rounding never lets a norm exceed C; with a stability
    ``C / (||g_b|| + stability)``.

    Zero where the norm is not finite (rule 5). Float32 or better (rule 7). How much a hair is:
    ``core/clipping_error.py``.

    Args:
        squared: ``[B]`` or ``[]``, squared norms by ``squared_norm`` and ``total_of``.
        elements: of a gradient.
        parts: of which its squared norm is the sum.
    """
    norms = squared.sqrt()
    dtype = str(squared.dtype).removeprefix("torch.")
    margin = clipping_error.margin(dtype, elements, parts, clip_norm, clipping_error.BLOCKS)
    if stability is None:
        factors = (clip_norm * margin / norms).clamp(max=1)
    else:
        factors = clip_norm * margin / (norms + stability)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


def _stacked(rows: list[Tensor]) -> Tensor:
    """``[n, B]`` in the widest of their types."""
    if any(row.dtype != rows[0].dtype for row in rows):
        rows = [row.double() for row in rows]
    return torch.stack(rows)


def factors_by_part(rule: ClipRule, squared: list[Tensor], elements: int, parts: int) -> list[Tensor]:
    """Clip factors ``[B]`` or ``[]`` for each part of the rule; a gradient that is not finite in one of them
    counts in none.

    Args:
        squared: of each part, as for ``clip_factors``, like the last two.
    """
    found = [
        clip_factors(each, threshold, elements, parts, rule.stability)
        for each, threshold in zip(squared, rule.thresholds, strict=True)
    ]
    if len(found) == 1:
        return found
    finite = torch.stack([each.isfinite() for each in squared]).all(0)
    return [torch.where(finite, factors, 0.0) for factors in found]


def total_of(parts: list[Tensor]) -> Tensor:
    """Their sum ``[B]``, added up in float64, in the narrowest of their types: it is as exact as that."""
    narrow = any(part.dtype != torch.float64 for part in parts)
    whole = _stacked(parts).sum(0, dtype=torch.float64)
    return whole.float() if narrow else whole


class Bookkeeping:
    """What becomes of each use in the backward pass of one physical batch."""

    def __init__(
        self,
        plan: Plan,
        parameters: dict[str, Tensor],
        batch_size: int,
        workspace: Workspace | None = None,
        rule: ClipRule = Flat(1.0),  # noqa: B008 -- for norms alone
    ):
        self.plan, self.parameters, self.batch_size = plan, parameters, batch_size
        self.rule = rule
        #: by name: the part of the rule that a parameter belongs to
        self.part_of = dict(zip(parameters, rule.partition(list(parameters)), strict=True))
        self.workspace = workspace or Workspace()
        self.group_of = plan.group_of
        #: asked once and not at every use; ``guards.precision_untouched`` sees to it that it stays so
        self._is_full = is_full(next(iter(parameters.values())).device)
        #: parts of the squared norms ``[B]``, each with the part of the rule that it belongs to
        self.parts: list[tuple[int, Tensor]] = []
        self.bounded: list[Bounded] = []
        #: gradients ``[B, *value]`` so small that a call for each would cost more than the arithmetic, by
        #: the part of the rule that they belong to; then side by side
        self.small: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.small_gradients: dict[int, Tensor] = {}
        self.operands: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.gradients: dict[int, Tensor] = {}
        self.waiting: dict[int, dict[int, Any]] = {}
        self.leaf_gradients: list[tuple[str, Tensor]] = []
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}
        #: sums by name and by leaf, to which this batch is added in place
        self.grads: dict[str, Tensor] = {}
        self.running: dict[int, Tensor] = {}
        #: a context in which values can be differentiated: under FSDP their graphs need what was freed
        self.at_hand: Callable[[list[Tensor]], AbstractContextManager] = contextlib.nullcontext
        #: told the name of each leaf whose sum will not change any more, as far as it is known early
        self.settled: Callable[[str], None] | None = None
        #: clip factors ``[B]`` by part of the rule, and the examples that count, or None if all do
        self.factors: list[Tensor]
        self.included: Tensor | None = None

    # ---------------------------------------------------------------- first backward: norms

    def norms(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        """The sink of the first backward pass."""
        if self._is_full and not torch.is_autocast_enabled(g.device.type):
            self._record(use, a, g)
            return
        with full_precision(g.device):
            self._record(use, a, g)

    def _record(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        number, group, route = self.group_of[use.index]
        fact = self.plan.findings.uses[use.index]
        if fact.layout is None and not bool((g.ne(0) & g.isfinite()).any()):
            return  # 0 * inf of an example that will not count anyway is no gradient either
        if fact.layout is None:
            raise Unforeseen(
                f"a gradient of {', '.join(fact.leaves)} came where the probe saw none: its "
                "operations depend on more than the shapes of the batch."
            )
        if not fact.layout.fits(g, self.batch_size):
            raise Misfit(CHANGING, fact.pattern)
        if route.keeps_operands:
            self.operands[use.index] = (a, g)
        if group.kind is Kind.ALONE:
            self._record_alone(use, fact, route, a, g)
        elif group.kind is Kind.STANDARDISED:
            self._record_standardised(use, fact, route, a, g)
        elif group.kind is Kind.TIED and route.norm == "gram":
            flipped = group.flipped[group.uses.index(use.index)]
            factors = tied_factors(use, flipped, a, g, fact.layout, self.batch_size)
            self.waiting.setdefault(number, {})[use.index] = factors
        else:
            gradient = self._example_gradients(use, fact, a, g, use.index)
            self.waiting.setdefault(number, {})[use.index] = gradient

    def _example_gradients(self, use, fact, a, g, name: Hashable) -> Tensor:
        """In the workspace, under a name: what lay there before under it is overwritten."""
        shape = (self.batch_size, *use.value.shape)
        out = self.workspace.take(name, shape, widen(g[:0] if g.dim() else g)) if fact.size else None
        return use.rule.example_gradients(use.value.shape, a, g, fact.layout, self.batch_size, out)

    def _record_alone(self, use, fact, route: Route, a, g) -> None:
        if route.norm == "gram":
            squared, bound = use.rule.squared_norms(a, g, fact.layout, self.batch_size)
            dense = functools.partial(self._example_gradients, use, fact, a, g, SCRATCH)
            part = self._part(fact)
            self._trust(Bounded(squared, bound, lambda: squared_norm(dense()), part), route)
            return
        gradient = self._example_gradients(use, fact, a, g, use.index if route.keeps_gradients else SCRATCH)
        if route == DIRECT and use.value.numel() <= SMALL:
            self.small.setdefault(self._part(fact), []).append((use.value, gradient))
            return
        self.parts.append((self._part(fact), squared_norm(gradient)))
        if route.keeps_gradients:
            self.gradients[use.index] = gradient

    def _record_standardised(self, use, fact, route: Route, a, g) -> None:
        standard = standardised.of(use.value, self.parameters[fact.leaves[0]])
        if standard is None:
            raise Changed(CHANGING)
        dense = functools.partial(self._example_gradients, use, fact, a, g, SCRATCH)
        if route.norm == "gram":
            squared, bound = standard.gram_norms(use.rule, a, g, use.result, fact.layout, self.batch_size)
        elif route.keeps_gradients:
            gradient = self.gradients[use.index] = self._example_gradients(use, fact, a, g, use.index)
            squared, bound = standard.norms(gradient)
            dense = lambda: gradient  # noqa: E731
        else:
            squared, bound = standard.norms(dense())
        plainly = lambda: squared_norm(standard.pulled_back(dense()))  # noqa: E731
        self._trust(Bounded(squared, bound, plainly, self._part(fact)), route)

    def _part(self, fact: UseFacts) -> int:
        """Of the rule; uses that are not ``one_by_one`` have leaves of one part."""
        return self.part_of[fact.leaves[0]]

    def _trust(self, norms: Bounded, route: Route) -> None:
        """Take squared norms with a bound on their error, whose use may need to be looked at again."""
        self.bounded.append(norms)
        if not (route.keeps_operands or route.keeps_gradients):
            self._settle()

    def _settle(self) -> None:
        """Add the bounds to the norms; the plain way where they exceed 1 % (rule 7)."""
        if not self.bounded:
            return
        squared = _stacked([norms.squared for norms in self.bounded])
        bounds = _stacked([norms.bound for norms in self.bounded])
        doubtful = gram.doubtful(squared, bounds)
        padded = squared + bounds
        if bool(doubtful.any()):
            for i in doubtful.any(1).nonzero().flatten().tolist():
                plain = self.bounded[i].plainly().to(padded.dtype)
                padded[i] = torch.where(doubtful[i], plain, padded[i])
        rows: dict[int, list[int]] = {}
        for row, norms in enumerate(self.bounded):
            rows.setdefault(norms.part, []).append(row)
        for part, its in rows.items():
            mine = padded if len(rows) == 1 else padded[its]
            self.parts.append((part, mine.sum(0, dtype=torch.float64).to(padded.dtype)))
        self.bounded.clear()

    @in_full_precision
    def finish(self, capture: Capture) -> list[Tensor]:
        """Squared norms ``[B]`` over the parameters of each part of the rule."""
        for number, members in self.waiting.items():
            group, route = self.plan.findings.groups[number], self.plan.routes[number]
            if group.kind is Kind.TIED and route.norm == "gram":
                factors, leaf = list(members.values()), self.parameters[group.leaves[0]]
                dense = functools.partial(tied_gradients, factors, leaf.shape)
                plainly = lambda dense=dense: squared_norm(dense())  # noqa: E731
                part = self.part_of[group.leaves[0]]
                self.bounded.append(Bounded(*tied_squared_norms(factors), plainly, part))
                continue
            values = [capture.uses[i].value for i in members]
            leaves = [self.parameters[name] for name in group.leaves]
            with self.at_hand(values):
                pulled = pull_back_examples(capture, values, list(members.values()), leaves)
            for name, gradient in zip(group.leaves, pulled):
                if gradient is not None:
                    self.parts.append((self.part_of[name], squared_norm(gradient)))
                    if group.one_by_one:
                        self.leaf_gradients.append((name, gradient))
            if route.keeps_gradients and not group.one_by_one:
                self.gradients.update(members)  # pulling back is linear: their sum is, once
        self.waiting.clear()
        self._settle()
        for part, small in self.small.items():
            together = torch.cat([g.reshape(self.batch_size, -1) for _, g in small], 1)
            self.small_gradients[part] = together
            self.parts.append((part, squared_norm(together)))
        return [self._total(part) for part in range(len(self.rule.thresholds))]

    def _total(self, part: int) -> Tensor:
        if mine := [squared for its, squared in self.parts if its == part]:
            return total_of(mine)
        some = next(iter(self.parameters.values()))
        return torch.zeros(self.batch_size, dtype=widen(some).dtype, device=some.device)

    @staticmethod
    def whole(squared: list[Tensor]) -> Tensor:
        """Squared norms ``[B]`` over all parameters, of those by part."""
        return squared[0] if len(squared) == 1 else torch.stack(squared).sum(0)

    def clip_factors(self, squared: list[Tensor], rule: ClipRule | None = None) -> list[Tensor]:
        """``factors_by_part`` of the squared norms; by another rule of the same parts where one is given."""
        elements = sum(p.numel() for p in self.parameters.values())
        parts = len(self.plan.findings.uses) + len(self.parameters)
        return factors_by_part(rule or self.rule, squared, elements, parts)

    # ---------------------------------------------------------------- the clipped sum

    def second_pass(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        """The sink of the second backward pass: contract at once, keep nothing.

        Uses whose gradients were kept in the first pass have their sum already.
        """
        _, _, route = self.group_of[use.index]
        if route.sum == "second-backward" and self.plan.findings.uses[use.index].layout is not None:
            self._contract(use, a, g)

    def _contract(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        fact = self.plan.findings.uses[use.index]
        layout, included = fact.layout, self.included
        if included is None and fact.routed:  # rows of nobody may hold anything
            included = torch.ones(self.batch_size, dtype=torch.bool, device=g.device)
        if included is not None:
            a, g = use.rule.zero_rows(a, g, included, layout)
        value, into = use.value, self._running(use.value)
        with full_precision(g.device):
            factors = self.factors[self._part(fact)]
            total = use.rule.contract(value.shape, a, widen(g), factors, layout, self.batch_size, into)
        if into is None:
            self._add_sum(value, total)

    @in_full_precision
    def contract(self, capture: Capture, uses: Collection[int] | None = None) -> None:
        """Sums at the values of these uses, or of all, from what the first backward pass kept."""
        if self.small:
            self._contract_small()
        left = self._uses_left(capture)
        for index in [i for i in self.gradients if uses is None or i in uses]:
            value, into = capture.uses[index].value, self._running(capture.uses[index].value)
            part = self._part(self.plan.findings.uses[index])
            total = self._weigh(self.gradients.pop(index), part, into)
            if into is None:
                self._add_sum(value, total)
            self._count_down(left, index, capture)
        for index in [i for i in self.operands if uses is None or i in uses]:
            self._contract(capture.uses[index], *self.operands.pop(index))
            self._count_down(left, index, capture)

    def _uses_left(self, capture: Capture) -> dict[str, int]:
        """By leaf: how many uses its sum waits for; without leaves whose sum is completed elsewhere."""
        if self.settled is None:
            return {}
        left = dict.fromkeys(self.parameters, 0)
        elsewhere = {name for name, _ in self.leaf_gradients}
        for index, (_, group, route) in self.group_of.items():
            value = capture.uses[index].value
            name = capture.names.get(id(value))
            if name is None or self._running(value) is None or route.sum == "second-backward":
                elsewhere.update(group.leaves)
            elif index in self.gradients or index in self.operands:
                left[name] += 1
        left = {name: count for name, count in left.items() if name not in elsewhere}
        for name, count in left.items():
            if not count:
                self.settled(name)
        return left

    def _count_down(self, left: dict[str, int], index: int, capture: Capture) -> None:
        name = capture.names.get(id(capture.uses[index].value))
        if self.settled is not None and name is not None and name in left:
            left[name] -= 1
            if not left[name]:
                self.settled(name)

    def _contract_small(self) -> None:
        running: list[tuple[Tensor, Tensor]] = []
        for part, small in self.small.items():
            totals = self._weigh(self.small_gradients.pop(part), part).split([v.numel() for v, _ in small])
            for (value, gradient), total in zip(small, totals):
                total = total.view(value.shape).to(gradient.dtype)
                into = self._running(value)
                if into is None:
                    self._add_sum(value, total)
                else:
                    running.append((into, total))
        if running:
            torch._foreach_add_(*map(list, zip(*running)))
        self.small.clear()

    def _weigh(self, gradient: Tensor, part: int, into: Tensor | None = None) -> Tensor:
        """Weighted sum of per-example gradients of a part of the rule; a product with zero would keep NaN
        (rule 4)."""
        if self.included is not None:
            keep = self.included.reshape(-1, *[1] * (gradient.dim() - 1))
            gradient = torch.where(keep, gradient, 0.0)
        return weighted_sum(gradient, self.factors[part], into)

    def _running(self, value: Tensor) -> Tensor | None:
        """The running sum of a leaf, to which it can be added in place; None where there is none."""
        return self.running.get(id(value))

    def add_to(self, grads: dict[str, Tensor]) -> None:
        """Add what comes from now on to these, by name, in place."""
        self.grads = grads
        self.running = {
            id(p): grads[name] for name, p in self.parameters.items() if grads[name].is_contiguous()
        }

    def _add_sum(self, value: Tensor, total: Tensor) -> None:
        held = self.sums.get(id(value))
        self.sums[id(value)] = (value, total if held is None else held[1] + total)

    @in_full_precision
    def pull_back(self, capture: Capture, uses: Collection[int] | None = None) -> dict[str, Tensor]:
        """Clipped sums by name, of these uses and their leaves, or of all: one vector-Jacobian product for
        values that are no leaves."""
        wanted = range(len(capture.uses)) if uses is None else uses
        values = dict.fromkeys(id(capture.uses[i].value) for i in wanted)
        leaves = {name for i in wanted for name in self.plan.findings.uses[i].leaves}
        sums = [self.sums.pop(value) for value in values if value in self.sums]
        grads = pull_back_sums(capture, sums, self.parameters, self.grads)
        for name, gradient in self.leaf_gradients:
            if name in leaves:
                total = self._weigh(gradient, self.part_of[name])
                grads[name] = add_to(grads.get(name), total)
        return grads
