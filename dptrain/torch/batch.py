"""One physical batch: forward under capture, norms, clip factors, clipped sum.

The forward pass and the backward pass to the anchor, in which each use gives its part of the norm; clip
factors; the sum at the parameter-only values; one pull-back to the leaves.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dptrain.core.clip_rules import ClipRule, Flat

from . import routing
from .bookkeeping import Bookkeeping
from .capture import Capture, ignore
from .clipped_sum import ClippedSum, owned
from .fsdp import Sharding
from .guards import backward, check_buffers, check_losses, parameters_untouched, precision_untouched
from .on_grid import GridSums
from .planner import Plan, make_plan
from .pullback import group_uses
from .sections import profiled, section
from .sharded_sums import ShardedSums, Trouble
from .trace import match
from .uses.base import widen
from .workspace import Workspace


class Task(Protocol):
    """What is to be clipped, and how."""

    model: nn.Module
    rule: ClipRule

    def loss_fn(self, model: nn.Module, batch: Any, /) -> Tensor: ...


def replace_rows(batch: Any, keep: Tensor) -> Any:
    """Masked rows become copies of a row that is not masked, whatever they hold (NaN, say)."""
    stand_in = int(keep.to(torch.int8).argmax())
    index = torch.arange(len(keep), device=keep.device)
    index = torch.where(keep, index, torch.full_like(index, stand_in))
    return tree_map(lambda t: t[index.to(t.device)] if isinstance(t, Tensor) else t, batch)


def clip_batch(
    task: Task,
    plan: Plan,
    parameters: dict[str, Tensor],
    batch: Any,
    mask: Tensor | None,
    batch_size: int,
    into: ClippedSum | None = None,
    workspace: Workspace | None = None,
    last: bool = False,
    sharding: Sharding | None = None,
) -> ClippedSum:
    """The clipped sum of one batch whose masked rows have been replaced, by a plan made for it.

    Args:
        mask: ``[B]`` bool, or None for all.
        into: of earlier batches, to whose buffers this one is added.
        workspace: memory that may be used again from step to step.
        last: whether ``into`` is complete then.
        sharding: of a model under FSDP2, of which ``parameters`` are the full ones: the sum is then one over
            all ranks, in shards.

    Raises:
        Refused: the model does other than what the probe saw.
    """
    with section("forward"):
        everything = task.model.parameters() if sharding is None else sharding.everything
        capture, losses = _forward(task, plan, parameters, list(everything), batch, batch_size)
    with torch.autocast(losses.device.type, enabled=False):  # what comes now is not the model's
        return _clipped_sum(
            task, plan, capture, losses, parameters, mask, batch_size, into, workspace, last, sharding
        )


def _clipped_sum(
    task: Task,
    plan: Plan,
    capture: Capture,
    losses: Tensor,
    parameters: dict[str, Tensor],
    mask: Tensor | None,
    batch_size: int,
    into: ClippedSum | None,
    workspace: Workspace | None,
    last: bool,
    sharding: Sharding | None,
) -> ClippedSum:
    """Backward passes, norms, clip factors and the sum."""
    trouble = Trouble(sharding)
    with trouble:
        plan = _settled(plan, task.rule, capture, losses, mask, parameters, batch_size)
    books = Bookkeeping(plan, parameters, batch_size, workspace, task.rule)
    if sharding is not None:
        books.at_hand = lambda values: sharding.gathered(sharding.behind(values))
    capture.sink = _within("norms", trouble.withheld(books.norms))
    with section("backward"), trouble, precision_untouched(losses.device):
        total = losses.sum() if mask is None else torch.where(mask, losses, 0.0).sum()
        backward(capture, total, parameters, retain_graph=plan.second_backward)
    sums = None if sharding is None else ShardedSums(books, capture, sharding, into)
    trouble.share("" if sums is None else sums.way)
    with section("norms"):
        by_part = books.finish(capture)
    squared = books.whole(by_part)
    finite = squared.isfinite() & losses.detach().isfinite()
    everything_finite = bool(finite.all())  # masked rows too: one that overflowed must be zeroed
    included = finite if mask is None else finite & mask
    keep = torch.ones_like(included) if mask is None else mask
    norms, values = torch.where(keep, squared.sqrt(), 0.0), torch.where(keep, losses.detach(), 0.0)
    with section("clip and accumulate"), _adding_to(into, books, last, sharding):
        if plan.grid is None:
            books.factors = [torch.where(included, each, 0.0) for each in books.clip_factors(by_part)]
            books.included = None if everything_finite else included
            if sums is None:
                grads = _sums(plan, books, capture, total, parameters)
            else:
                grads = _sharded_sums(sums, plan, capture, total, parameters)
        else:
            on_grid = GridSums(parameters, task.rule.sensitivity, plan.grid, into and into.grads)
            (factors,) = books.clip_factors(by_part, Flat(on_grid.aim))
            on_grid.add(dict(books.leaf_gradients), factors, included)
            grads = on_grid.sums
    if into is not None:
        return into.extended(norms, values)
    bound = task.rule.sensitivity
    return ClippedSum(owned(grads) if sharding is None else grads, norms, values, bound, plan.grid)


def _within(name: str, sink: Callable[..., None]) -> Callable[..., None]:
    """What is done with a use in the middle of a backward pass, as a section of its own."""
    if not profiled():
        return sink

    def named(*args: Any) -> None:
        with section(name):
            sink(*args)

    return named


@contextlib.contextmanager
def _adding_to(
    into: ClippedSum | None, books: Bookkeeping, last: bool, sharding: Sharding | None
) -> Iterator[None]:
    """Add to an earlier sum in place; one that was only partly written is of no use any more."""
    if into is None:
        yield
        return
    if sharding is None:
        books.add_to(into.grads)
    if last and into.reduction is not None:
        books.settled = into.reduction.settled
    try:
        yield
    except BaseException:
        into.spoil()
        raise


def _sums(plan: Plan, books: Bookkeeping, capture: Capture, total: Tensor, parameters) -> dict[str, Tensor]:
    """The clipped sums by name."""
    books.contract(capture)
    if plan.second_backward:
        # The same loss again, not a weighted one: every gradient has the bits of the first pass,
        # whose norms were taken, and clip factors are applied in float32 where it is contracted.
        capture.sink = _within("clip and accumulate", books.second_pass)
        with section("backward"):
            backward(capture, total, parameters, retain_graph=False)
    grads = books.pull_back(capture)
    for name, p in parameters.items():
        if name not in grads:
            grads[name] = torch.zeros_like(widen(p.detach()))
    return {name: grads[name].detach().reshape(p.shape) for name, p in parameters.items()}


def _sharded_sums(
    sums: ShardedSums, plan: Plan, capture: Capture, total: Tensor, parameters
) -> dict[str, Tensor]:
    """The clipped sums over all ranks by name, in shards."""
    if plan.second_backward:
        capture.sink = _within("clip and accumulate", sums.arrive)
        with section("backward"):
            backward(capture, total, parameters, retain_graph=False)
    return sums.finish()


def _forward(task, plan: Plan, parameters, everything, batch, batch_size) -> tuple[Capture, Tensor]:
    capture = Capture(parameters, batch_size, ignore, plan.findings.layouts, everything)
    capture.results = plan.results
    alias = lambda t: capture.mark_data(t.detach().view_as(t)) if isinstance(t, Tensor) else t  # noqa: E731
    entered = tree_map(alias, batch)
    with parameters_untouched(everything), torch.enable_grad(), capture:
        losses = task.loss_fn(task.model, entered)
    check_losses(losses, batch_size)
    check_buffers(task.model, capture)
    return capture, losses


def _settled(plan: Plan, rule: ClipRule, capture: Capture, losses, mask, parameters, batch_size: int) -> Plan:
    """The plan for this batch: another one only where the data decide what an operation sees.

    Raises:
        Refused: the step does other than what the probe saw.
    """
    facts = match(plan.findings, capture, parameters)
    if not plan.findings.routed and not capture.scattered:
        return plan
    facts = routing.settle(facts, capture, losses, mask, parameters, batch_size)
    if not plan.findings.routed:
        return plan
    groups = tuple(group_uses(capture.uses, capture.names, parameters))
    findings = dataclasses.replace(plan.findings, uses=facts, groups=groups)
    if plan.grid is not None:
        findings = findings.at_leaves()
    else:
        findings = findings.within(dict(zip(parameters, rule.partition(list(parameters)), strict=True)))
    made = make_plan(plan.method, findings, batch_size, losses.device, plan.options)
    return dataclasses.replace(made, grid=plan.grid)
