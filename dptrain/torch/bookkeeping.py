"""What is kept of each use: its part of the norms, then its part of the clipped sum."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import standardised
from .capture import Capture, Use
from .errors import Changed, Misfit, Unforeseen
from .planner import Plan, Route
from .pullback import (
    Group,
    Kind,
    pull_back_examples,
    pull_back_sums,
    tied_factors,
    tied_gradients,
    tied_squared_norms,
)
from .trace import CHANGING
from .uses.base import add_to, squared_norm, weighted_sum, widen
from .workspace import Workspace

#: the name in the workspace of gradients that are not kept
SCRATCH = "scratch"


@contextlib.contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """Norms and clipped sums are formed without autocast and TF32 (rule 7)."""
    with torch.autocast(tensor.device.type, enabled=False):
        if not tensor.is_cuda:
            yield
            return
        before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
        torch.set_float32_matmul_precision("highest")
        try:
            with cudnn.flags(
                enabled=cudnn.enabled,
                benchmark=cudnn.benchmark,
                deterministic=cudnn.deterministic,
                allow_tf32=False,
            ):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


def in_full_precision(method):
    """For methods that take a capture: without autocast, TF32 and autograd."""

    @functools.wraps(method)
    def wrapped(self, capture: Capture, *args):
        with torch.no_grad(), full_precision(capture.anchor):
            return method(self, capture, *args)

    return wrapped


def clip_factors(squared: Tensor, clip_norm: float) -> Tensor:
    """``min(1, C / ||g_b||)``, a hair less so that rounding never lets a norm exceed C.

    Zero where the norm is not finite (rule 5). Float32 or better (rule 7).
    """
    norms = squared.sqrt()
    shade = 1 - 8 * torch.finfo(squared.dtype).eps
    factors = (clip_norm * shade / norms).clamp(max=1)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


class Bookkeeping:
    """What becomes of each use in the backward pass of one physical batch."""

    def __init__(
        self, plan: Plan, parameters: dict[str, Tensor], batch_size: int, workspace: Workspace | None = None
    ):
        self.plan, self.parameters, self.batch_size = plan, parameters, batch_size
        self.workspace = workspace or Workspace()
        self.group_of: dict[int, tuple[int, Group, Route]] = {
            index: (number, group, route)
            for number, (group, route) in enumerate(zip(plan.findings.groups, plan.routes))
            for index in group.uses
        }
        self.squared: Tensor | None = None
        self.operands: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.gradients: dict[int, Tensor] = {}
        self.waiting: dict[int, dict[int, Any]] = {}
        self.leaf_gradients: list[tuple[str, Tensor]] = []
        self.sums: dict[int, tuple[Tensor, Tensor]] = {}
        #: sums by name and by leaf, to which this batch is added in place
        self.grads: dict[str, Tensor] = {}
        self.running: dict[int, Tensor] = {}
        #: clip factors ``[B]``, and the examples that count, or None if all do
        self.factors: Tensor
        self.included: Tensor | None = None

    # ---------------------------------------------------------------- first backward: norms

    def norms(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        """The sink of the first backward pass."""
        with full_precision(g):
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
            self._add(self._trusted(squared, bound, lambda: squared_norm(dense())))
            return
        gradient = self._example_gradients(use, fact, a, g, use.index if route.keeps_gradients else SCRATCH)
        self._add(squared_norm(gradient))
        if route.keeps_gradients:
            self.gradients[use.index] = gradient

    def _record_standardised(self, use, fact, route: Route, a, g) -> None:
        standard = standardised.of(use.value, self.parameters[fact.leaves[0]])
        if standard is None:
            raise Changed(CHANGING)
        if route.norm == "gram":
            squared, bound = standard.gram_norms(use.rule, a, g, use.result, fact.layout, self.batch_size)
            dense = functools.partial(self._example_gradients, use, fact, a, g, SCRATCH)
        else:
            name = use.index if route.keeps_gradients else SCRATCH
            gradient = self._example_gradients(use, fact, a, g, name)
            squared, bound = standard.norms(gradient)
            dense = lambda: gradient  # noqa: E731
            if route.keeps_gradients:
                self.gradients[use.index] = gradient
        self._add(self._trusted(squared, bound, lambda: squared_norm(standard.pulled_back(dense()))))

    def _trusted(self, squared: Tensor, bound: Tensor, plainly: Callable[[], Tensor]) -> Tensor:
        """Squared norms with their error bound added; the plain way where that exceeds 1 % (rule 7)."""
        doubtful = (bound > 0.01 * squared) & squared.isfinite()
        padded = squared + bound
        if not bool(doubtful.any()):
            return padded
        return torch.where(doubtful, plainly().to(padded.dtype), padded)

    def _add(self, squared: Tensor) -> None:
        self.squared = squared if self.squared is None else self.squared + squared

    @in_full_precision
    def finish(self, capture: Capture) -> Tensor:
        """Squared norms ``[B]`` over all parameters."""
        for number, members in self.waiting.items():
            group, route = self.plan.findings.groups[number], self.plan.routes[number]
            if group.kind is Kind.TIED and route.norm == "gram":
                factors, leaf = list(members.values()), self.parameters[group.leaves[0]]
                squared, bound = tied_squared_norms(factors)
                dense = functools.partial(tied_gradients, factors, leaf.shape)
                self._add(self._trusted(squared, bound, lambda dense=dense: squared_norm(dense())))
                continue
            values = [capture.uses[i].value for i in members]
            leaves = [self.parameters[name] for name in group.leaves]
            pulled = pull_back_examples(capture, values, list(members.values()), leaves)
            for name, gradient in zip(group.leaves, pulled):
                if gradient is not None:
                    self._add(squared_norm(gradient))
                    if group.one_by_one:
                        self.leaf_gradients.append((name, gradient))
            if route.keeps_gradients and not group.one_by_one:
                self.gradients.update(members)  # pulling back is linear: their sum is, once
        self.waiting.clear()
        if self.squared is None:
            some = next(iter(self.parameters.values()))
            self.squared = torch.zeros(self.batch_size, dtype=widen(some).dtype, device=some.device)
        return self.squared

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
        with full_precision(g):
            total = use.rule.contract(value.shape, a, widen(g), self.factors, layout, self.batch_size, into)
        if into is None:
            self._add_sum(value, total)

    @in_full_precision
    def contract(self, capture: Capture) -> None:
        """Sums at the parameter-only values, from what the first backward pass kept."""
        for index, gradient in self.gradients.items():
            value, into = capture.uses[index].value, self._running(capture.uses[index].value)
            total = self._weigh(gradient, into)
            if into is None:
                self._add_sum(value, total)
        for index, (a, g) in self.operands.items():
            self._contract(capture.uses[index], a, g)
        self.gradients.clear()
        self.operands.clear()

    def _weigh(self, gradient: Tensor, into: Tensor | None = None) -> Tensor:
        """Weighted sum of per-example gradients; a product with zero would keep NaN (rule 4)."""
        if self.included is not None:
            keep = self.included.reshape(-1, *[1] * (gradient.dim() - 1))
            gradient = torch.where(keep, gradient, 0.0)
        return weighted_sum(gradient, self.factors, into)

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
    def pull_back(self, capture: Capture) -> dict[str, Tensor]:
        """Clipped sums by name: one vector-Jacobian product for values that are no leaves."""
        grads = pull_back_sums(capture, list(self.sums.values()), self.parameters, self.grads)
        for name, gradient in self.leaf_gradients:
            total = self._weigh(gradient)
            grads[name] = add_to(grads.get(name), total)
        return grads
