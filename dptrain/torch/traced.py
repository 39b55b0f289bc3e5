"""The private physical step as one function of tensors, without a branch on data.

Forward, backward, norms, clip factors, contraction and pull-back are run once on fake tensors, and what
they do is the graph. Where the eager engine looks at the data and goes another way (a gradient that is
not finite, a Gram norm in doubt, a gradient that the probe never saw), the graph computes whether
it would: such a batch is not ``ordinary``, what the graph made of it is thrown away, and the eager
engine takes it. So the graph need handle the ordinary case alone, and every guarantee is the eager engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dptrain.core.clip_rules import ClipRule
from dptrain.core.clipping_error import BLOCK

from . import products
from .bookkeeping import Bookkeeping
from .capture import Capture, Use, ignore
from .guards import backward, check_losses
from .planner import Plan
from .trace import match
from .uses import gram
from .uses.base import squared_norm, widen
from .uses.convolution import Convolution
from .uses.linear import Linear
from .workspace import Workspace


class Untraceable(Exception):
    """A step that cannot be one graph; the message, half a sentence, says why."""


@dataclass(frozen=True)
class Inputs:
    """What the inputs of the model's graph are, by position: the name of a trainable parameter, or else
    whether it is a tensor of the batch."""

    parameters: tuple[str | None, ...]
    examples: tuple[bool, ...]

    def parameters_among(self, tensors) -> dict[str, Tensor]:
        return {name: t for name, t in zip(self.parameters, tensors) if name is not None}


def private_step(
    forward: Callable[..., Any],
    inputs: Inputs,
    names: tuple[str, ...],
    plan: Plan,
    batch_size: int,
    rule: ClipRule,
) -> Callable[..., list[Tensor]]:
    """A function to be traced: ``(mask [B], *tensors) -> [*sums, norms [B], losses [B], ordinary []]``.

    Args:
        forward: from the model's inputs to a tuple with the losses ``[B]``.
        inputs: what each of ``tensors`` is.
        names: trainable parameters, in the order in which their sums are returned.

    The function raises:
        Untraceable: a step of this model is more than a function of its inputs.
        Refused: it does other than what the probe saw.
    """

    def step(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
        parameters = _all_parameters(inputs, names, tensors)
        before = [t._version for t in tensors]
        capture = Capture(parameters, batch_size, ignore, plan.findings.layouts, tensors)
        rows = replacements(mask)
        entered = [
            capture.mark_data(t.detach()[rows]) if example else t
            for t, example in zip(tensors, inputs.examples)
        ]
        capture.results = plan.results
        with torch.enable_grad(), capture:
            returned = forward(*entered)
        losses = _losses_alone(returned, batch_size, [t._version for t in tensors] != before)
        if capture.scattered or plan.findings.routed:
            raise Untraceable("its data decide which rows an operation sees")
        if capture.hooked or capture.checkpointed:
            raise Untraceable("it hooks gradients or recomputes activations")
        with torch.autocast(losses.device.type, enabled=False):
            return _clip(plan, capture, losses, parameters, names, mask, batch_size, rule)

    return step


def ordinary_step(
    forward: Callable[..., Any], inputs: Inputs, names: tuple[str, ...], batch_size: int
) -> Callable[..., list[Tensor]]:
    """The same for the method without privacy, whose norms are not known."""

    def step(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
        parameters = _all_parameters(inputs, names, tensors)
        before = [t._version for t in tensors]
        rows = replacements(mask)
        entered = [t[rows] if example else t for t, example in zip(tensors, inputs.examples)]
        with torch.enable_grad():
            returned = forward(*entered)
        losses = _losses_alone(returned, batch_size, [t._version for t in tensors] != before)
        total = torch.where(mask, losses, 0.0).sum()
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        sums = [
            torch.zeros_like(widen(p.detach())) if g is None else widen(g)
            for p, g in zip(parameters.values(), found)
        ]
        losses = torch.where(mask, losses.detach(), 0.0)
        norms = torch.where(mask, torch.full_like(widen(losses), float("nan")), 0.0)
        return [*sums, norms, losses, mask.any()]

    return step


def replacements(mask: Tensor) -> Tensor:
    """Row indices ``[B]`` in which masked rows are replaced by one that is not masked."""
    stand_in = mask.to(torch.int8).argmax()
    return torch.where(mask, torch.arange(len(mask), device=mask.device), stand_in)


def _losses_alone(returned: tuple[Any, ...], batch_size: int, written: bool) -> Tensor:
    """The losses, if the forward pass does nothing else: a batch may be computed twice."""
    if written or len(returned) != 1:
        raise Untraceable("its forward pass leaves something behind, in a buffer or an attribute")
    check_losses(returned[0], batch_size)
    return returned[0]


def _all_parameters(inputs: Inputs, names: tuple[str, ...], tensors) -> dict[str, Tensor]:
    found = inputs.parameters_among(tensors)
    return {name: found[name] for name in names}


def _clip(plan, capture, losses, parameters, names, mask, batch_size, rule) -> list[Tensor]:
    match(plan.findings, capture, parameters)
    books = BranchFree(plan, parameters, batch_size, NoMemory(), rule)
    capture.sink = books.norms
    total = torch.where(mask, losses, 0.0).sum()
    backward(capture, total, parameters, retain_graph=plan.second_backward)
    by_part = books.finish(capture)
    squared = books.whole(by_part)
    finite = squared.isfinite() & losses.detach().isfinite()
    books.factors = [torch.where(finite & mask, each, 0.0) for each in books.clip_factors(by_part)]
    books.contract(capture)
    if plan.second_backward:
        capture.sink = books.second_pass
        backward(capture, total, parameters, retain_graph=False)
    found = books.pull_back(capture)
    sums = [
        found[name].detach().reshape(p.shape) if name in found else torch.zeros_like(widen(p.detach()))
        for name, p in parameters.items()
    ]
    ordinary = finite.all()
    for doubt in books.doubts:
        ordinary = ordinary & ~doubt
    norms = torch.where(mask, squared.sqrt(), 0.0)
    return [*sums, norms, torch.where(mask, losses.detach(), 0.0), ordinary]


class BranchFree(Bookkeeping):
    """Book-keeping that notes its doubts where the other looks at the data and decides.

    A doubt is a bool tensor ``[]``: this batch is for the eager engine.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.doubts: list[Tensor] = []

    def _record(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        if self.plan.findings.uses[use.index].layout is None:
            self.doubts.append((g.ne(0) & g.isfinite()).any())
        else:
            super()._record(use, a, g)

    def _settle(self) -> None:
        for squared, bound, _, part in self.bounded:
            self.doubts.append(gram.doubtful(squared, bound).any())
            self.parts.append((part, squared + bound))
        self.bounded.clear()

    def _record_alone(self, use, fact, route, a, g) -> None:
        if route.norm == "gram":
            super()._record_alone(use, fact, route, a, g)
            return
        gradient = self._example_gradients(use, fact, a, g, use.index)
        self.parts.append((self._part(fact), _squared_norm(gradient)))
        if route.keeps_gradients:
            self.gradients[use.index] = gradient

    def _example_gradients(self, use, fact, a, g, name) -> Tensor:
        rule = use.rule
        # patches that do not overlap are no larger than the image
        disjoint = isinstance(rule, Convolution) and rule.kernel == rule.stride and not rule.transposed
        if not (disjoint or isinstance(rule, Linear)):
            return super()._example_gradients(use, fact, a, g, name)
        factors = rule.factors(a, g, fact.layout, self.batch_size)
        groups = factors.rows.shape[1]
        rows, cols = (t.flatten(0, 1) for t in factors)  # groups as if they were examples
        # A product is faster whose longer side is the contiguous one: its transpose, if need be.
        if groups == 1 and rows.shape[-1] > cols.shape[-1]:
            gradients = products.each(cols, rows).mT
        else:
            gradients = products.each(rows, cols)
        return gradients.reshape(self.batch_size, *use.value.shape)

    def _weigh(self, gradient: Tensor, part: int, into: Tensor | None = None) -> Tensor:
        # A reduction reads it once, in the order of memory; a product with a vector is a call for each.
        weights = self.factors[part].to(gradient.dtype)
        if _is_transposed(gradient):
            total = (gradient.flatten(2).mT * weights[:, None, None]).sum(0).mT
            return total.reshape(gradient.shape[1:])
        return (gradient * weights.reshape(-1, *[1] * (gradient.dim() - 1))).sum(0)


class NoMemory(Workspace):
    """The graph's compiler sees to its memory."""

    def take(self, name, shape, like) -> None:
        return None


def _is_transposed(gradients: Tensor) -> bool:
    """Whether gradients ``[B, R, ...]`` are the transposes of matrices ``[B, C, R]``."""
    return gradients.dim() > 2 and not gradients.is_contiguous() and gradients.flatten(2).mT.is_contiguous()


def _squared_norm(gradients: Tensor) -> Tensor:
    """``squared_norm`` of ``[B, ...]`` in blocks that divide it, which one pass over memory reads."""
    if _is_transposed(gradients):
        gradients = gradients.flatten(2).mT
    flat = widen(gradients).reshape(gradients.shape[0], -1)
    block = next(b for b in range(min(BLOCK, flat.shape[1]), 0, -1) if flat.shape[1] % b == 0)
    if flat.shape[1] > BLOCK and block < BLOCK // 16:
        return squared_norm(gradients)
    parts = flat.unflatten(1, (-1, block)).square().sum(2)
    return parts.double().sum(1).to(flat.dtype)
