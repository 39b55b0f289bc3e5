"""What is kept of each use: its part of the norms, then its part of the clipped sum."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .capture import Capture, Use
from .errors import Misfit, Unforeseen
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
from .uses.base import weighted_sum, widen

#: elements whose squares float32 can add one after the other
BLOCK = 1024


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

    def __init__(self, plan: Plan, batch_size: int):
        self.plan, self.batch_size = plan, batch_size
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
        if group.kind is Kind.ALONE:
            self._record_alone(use, fact, route, a, g)
            return
        if group.kind is Kind.TIED and route.norm == "gram":
            flipped = group.flipped[group.uses.index(use.index)]
            factors = tied_factors(use, flipped, a, g, fact.layout, self.batch_size)
            self.waiting.setdefault(number, {})[use.index] = factors
        else:
            gradient = self._example_gradients(use, fact, a, g)
            self.waiting.setdefault(number, {})[use.index] = gradient
        if route.keeps_operands:
            self.operands[use.index] = (a, g)

    def _example_gradients(self, use, fact, a, g) -> Tensor:
        return use.rule.example_gradients(use.value.shape, a, g, fact.layout, self.batch_size)

    def _record_alone(self, use, fact, route: Route, a, g) -> None:
        if route.norm == "gram":
            squared, bound = use.rule.squared_norms(a, g, fact.layout, self.batch_size)
            self._add(self._trusted(squared, bound, lambda: self._example_gradients(use, fact, a, g)))
        else:
            gradient = self._example_gradients(use, fact, a, g)
            self._add(squared_norm(gradient))
            if route.keeps_gradients:
                self.gradients[use.index] = gradient
        if route.keeps_operands:
            self.operands[use.index] = (a, g)

    def _trusted(self, squared: Tensor, bound: Tensor, materialise: Callable[[], Tensor]) -> Tensor:
        """Gram norms with their error bound added; materialised where that exceeds 1 % (rule 7)."""
        doubtful = (bound > 0.01 * squared) & squared.isfinite()
        padded = squared + bound
        if not bool(doubtful.any()):
            return padded
        return torch.where(doubtful, squared_norm(materialise()).to(padded.dtype), padded)

    def _add(self, squared: Tensor) -> None:
        self.squared = squared if self.squared is None else self.squared + squared

    @in_full_precision
    def finish(self, capture: Capture, parameters: dict[str, Tensor]) -> Tensor:
        """Squared norms ``[B]`` over all parameters."""
        for number, members in self.waiting.items():
            group, route = self.plan.findings.groups[number], self.plan.routes[number]
            if group.kind is Kind.TIED and route.norm == "gram":
                factors, leaf = list(members.values()), parameters[group.leaves[0]]
                squared, bound = tied_squared_norms(factors)
                dense = functools.partial(tied_gradients, factors, leaf.shape)
                self._add(self._trusted(squared, bound, dense))
                continue
            values = [capture.uses[i].value for i in members]
            leaves = [parameters[name] for name in group.leaves]
            pulled = pull_back_examples(capture, values, list(members.values()), leaves)
            for name, gradient in zip(group.leaves, pulled):
                if gradient is not None:
                    self._add(squared_norm(gradient))
                    if route.keeps_gradients:
                        self.leaf_gradients.append((name, gradient))
        self.waiting.clear()
        if self.squared is None:
            some = next(iter(parameters.values()))
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
        with full_precision(g):
            total = use.rule.contract(use.value.shape, a, widen(g), self.factors, layout, self.batch_size)
        self._add_sum(use.value, total)

    @in_full_precision
    def contract(self, capture: Capture) -> None:
        """Sums at the parameter-only values, from what the first backward pass kept."""
        for index, gradient in self.gradients.items():
            self._add_sum(capture.uses[index].value, self._weigh(gradient))
        for index, (a, g) in self.operands.items():
            self._contract(capture.uses[index], a, g)
        self.gradients.clear()
        self.operands.clear()

    def _weigh(self, gradient: Tensor) -> Tensor:
        """Weighted sum of per-example gradients; a product with zero would keep NaN (rule 4)."""
        if self.included is not None:
            keep = self.included.reshape(-1, *[1] * (gradient.dim() - 1))
            gradient = torch.where(keep, gradient, 0.0)
        return weighted_sum(gradient, self.factors)

    def _add_sum(self, value: Tensor, total: Tensor) -> None:
        held = self.sums.get(id(value))
        self.sums[id(value)] = (value, total if held is None else held[1] + total)

    @in_full_precision
    def pull_back(self, capture: Capture, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clipped sums by name: one vector-Jacobian product for values that are no leaves."""
        grads = pull_back_sums(capture, list(self.sums.values()), parameters)
        for name, gradient in self.leaf_gradients:
            total = self._weigh(gradient)
            grads[name] = grads[name] + total if name in grads else total
        return grads


def squared_norm(gradients: Tensor) -> Tensor:
    """Squared norms ``[B]`` of ``[B, ...]``, accumulated in float32 or better."""
    flat = widen(gradients).reshape(gradients.shape[0], -1)
    if flat.dtype == torch.float64 or flat.shape[1] <= BLOCK:
        return torch.linalg.vector_norm(flat, dim=1).square()
    # A CPU's float32 norm adds one square after the other, and the sum of millions of them swallows
    # the small ones, so that the norm is understated. Blocks are joined in float64.
    whole = flat.shape[1] - flat.shape[1] % BLOCK
    blocks = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, BLOCK)), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True)
    parts = torch.cat([blocks, rest], 1).double()
    return parts.square().sum(1).to(flat.dtype)
