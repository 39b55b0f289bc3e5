"""``clipped_grad``: the sum of exactly clipped per-example gradients.

One physical batch: probe and plan once per input signature; forward under capture; backward to
the anchor, in which each use settles its norm; clip factors; the sum at the parameter-only values;
one pull-back to the leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dptrain.core import methods
from dptrain.core.methods import Method

from . import baselines
from .capture import Capture
from .errors import Refused
from .guards import backward, check_batch, check_losses, check_model, listed, trainable
from .planner import Plan, make_plan
from .probe import CHANGING, Findings, probe
from .settlement import Settlement, clip_factors
from .uses.base import widen

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class ClippedSum:
    """A sum of clipped per-example gradients: bounded, but not private until noise is added.

    Attributes:
        grads: by parameter name, the sum over examples of clipped gradients, shaped like the
            parameter, in float32 or better.
        norms: ``[B]``, per-example norms before clipping, 0 where masked. Unprotected.
        losses: ``[B]``, per-example losses, 0 where masked. Unprotected.
        clip_norm: C, the bound on each example's part; infinite for the non-private method.
    """

    grads: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    clip_norm: float

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Accumulate physical batches. Only sums of the same parameters and clip norm add."""
        if not isinstance(other, ClippedSum):
            return NotImplemented
        if self.clip_norm != other.clip_norm or self.grads.keys() != other.grads.keys():
            raise ValueError(
                "these clipped sums have different clip norms or parameters: accumulate only "
                "batches of one logical step."
            )
        return ClippedSum(
            {name: g + other.grads[name] for name, g in self.grads.items()},
            torch.cat([self.norms, other.norms]),
            torch.cat([self.losses, other.losses]),
            self.clip_norm,
        )

    def add_(self, other: ClippedSum) -> ClippedSum:
        """Accumulate in place: the buffers of ``self`` are reused and returned."""
        whole = self.clip_norm == other.clip_norm and self.grads.keys() == other.grads.keys()
        if not whole:
            return self + other
        mine = list(self.grads.values())
        if mine:
            torch._foreach_add_(mine, [other.grads[name] for name in self.grads])
        return ClippedSum(
            self.grads,
            torch.cat([self.norms, other.norms]),
            torch.cat([self.losses, other.losses]),
            self.clip_norm,
        )


def clipped_grad(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    clip_norm: float,
    method: str = "auto",
    allow_unused: bool = False,
) -> ClippedGrad:
    """A function from a physical batch to the sum of its clipped per-example gradients.

    Args:
        model: any module; nothing is stored on it, and its ``.grad`` fields are not touched.
        loss_fn: ``loss_fn(model, batch) -> [B]``, one loss per example.
        clip_norm: C > 0, the largest l2 norm of an example's gradient over all trainable
            parameters (flat clipping, Abadi et al. 2016, arXiv 1607.00133).
        method: a name or alias of the table in ``dptrain.core.methods``.
        allow_unused: accept trainable parameters that take no part in the losses; their gradient
            is zero and they still receive noise.

    Raises:
        ValueError: a clip norm that is not positive and finite, or an unknown method.
    """
    row = methods.resolve(method)
    clip_norm = float(clip_norm)
    if not 1e-12 <= clip_norm < float("inf"):  # below, squares of float32 vanish
        raise ValueError(f"clip_norm must be at least 1e-12 and finite, and is {clip_norm}.")
    return ClippedGrad(model, loss_fn, clip_norm, row, allow_unused)


class ClippedGrad:
    """What ``clipped_grad`` returns: call it on batches; ``plans`` holds what it has planned."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        clip_norm: float,
        method: Method,
        allow_unused: bool,
    ):
        self.model, self.loss_fn = model, loss_fn
        self.clip_norm, self.method, self.allow_unused = clip_norm, method, allow_unused
        self.plans: dict[Any, Plan] = {}

    def __call__(self, batch: Any, mask: Tensor | None = None) -> ClippedSum:
        """The clipped sum of one physical batch.

        Args:
            batch: a tensor or a tree of tensors with the examples on the leading axis.
            mask: ``[B]`` bool; examples where it is False contribute exactly nothing.

        Raises:
            Refused: no exact result can be promised; says why, and what to do.
            ValueError: the batch or the mask has the wrong shape.
        """
        batch_size, mask = check_batch(batch, mask)
        parameters = trainable(self.model)
        check_model(self.model, parameters, self.method)
        if mask is not None:
            if not bool(mask.any()):
                return self._nothing(parameters, batch_size)
            batch = _replace_rows(batch, mask)
        if self.method.capture in (methods.Capture.USES, methods.Capture.PLANNED):
            plan = self.plan(batch, mask)
            return _physical_batch(self, plan, parameters, batch, mask, batch_size)
        grads, norms, losses = baselines.run(
            self.method,
            self.model,
            self.loss_fn,
            parameters,
            batch,
            mask,
            batch_size,
            self.clip_norm,
        )
        bound = self.clip_norm if self.method.is_private else float("inf")
        return ClippedSum(grads, norms, losses, bound)

    def plan(self, batch: Any, mask: Tensor | None = None) -> Plan:
        """The plan for batches like this one; probes the model the first time.

        Raises:
            Refused: see ``__call__``.
        """
        batch_size, mask = check_batch(batch, mask)
        parameters = trainable(self.model)
        check_model(self.model, parameters, self.method)
        key = signature(self.model, parameters, batch)
        if key not in self.plans:
            findings = probe(self.model, self.loss_fn, batch, mask, batch_size)
            self._check_coverage(findings, parameters)
            device = next(iter(parameters.values())).device
            self.plans[key] = make_plan(self.method, findings, batch_size, device)
        return self.plans[key]

    def _check_coverage(self, findings: Findings, parameters: dict[str, Tensor]) -> None:
        missing = [name for name in parameters if name not in findings.covered]
        if missing and not self.allow_unused:
            raise Refused(
                f"no use of the trainable parameter {listed(missing)} was seen in the loss: freeze it with "
                "requires_grad_(False), or pass allow_unused=True if its gradient is meant to be "
                "zero (re-entrant checkpointing also hides parameters: pass use_reentrant=False)."
            )

    def _nothing(self, parameters: dict[str, Tensor], batch_size: int) -> ClippedSum:
        grads = {name: torch.zeros_like(widen(p.detach())) for name, p in parameters.items()}
        like = next(iter(grads.values()))
        bound = self.clip_norm if self.method.is_private else float("inf")
        return ClippedSum(grads, like.new_zeros(batch_size), like.new_zeros(batch_size), bound)


def signature(model: nn.Module, parameters: dict[str, Tensor], batch: Any) -> tuple:
    """What a plan depends on: shapes and types, train or eval, autocast, the trainable set."""
    leaves, tree = tree_flatten(batch)
    shapes = tuple((tuple(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else repr(t) for t in leaves)
    modes = tuple(module.training for module in model.modules())
    device = next(iter(parameters.values())).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return shapes, str(tree), modes, autocast, tuple((n, p.dtype) for n, p in parameters.items())


def _replace_rows(batch: Any, keep: Tensor) -> Any:
    """Masked rows become copies of a row that is not masked, whatever they hold (NaN, say)."""
    stand_in = int(keep.to(torch.int8).argmax())
    index = torch.arange(len(keep), device=keep.device)
    index = torch.where(keep, index, torch.full_like(index, stand_in))
    return tree_map(lambda t: t[index.to(t.device)] if isinstance(t, Tensor) else t, batch)


# ---------------------------------------------------------------------- one physical batch


def _physical_batch(
    owner: ClippedGrad,
    plan: Plan,
    parameters: dict[str, Tensor],
    batch: Any,
    mask: Tensor | None,
    batch_size: int,
) -> ClippedSum:
    settle = Settlement(plan, batch_size)
    capture, losses = _forward(owner, plan, parameters, batch, batch_size, settle.norms)
    total = losses.sum() if mask is None else torch.where(mask, losses, 0.0).sum()
    backward(capture, total, parameters, retain_graph=plan.second_backward)
    squared = settle.finish(capture, parameters)
    finite = squared.isfinite() & losses.detach().isfinite()
    everything_finite = bool(finite.all())  # masked rows too: one that overflowed must be zeroed
    included = finite if mask is None else finite & mask
    factors = torch.where(included, clip_factors(squared, owner.clip_norm), 0.0)
    settle.factors, settle.included = factors, None if everything_finite else included
    if plan.second_backward:
        # The same loss again, not a weighted one: every gradient has the bits of the first pass,
        # whose norms were taken, and clip factors are applied in float32 where it is contracted.
        capture.sink = settle.weighted
        backward(capture, total, parameters, retain_graph=False)
    else:
        settle.contract(capture)
    grads = settle.pull_back(capture, parameters)
    for name, p in parameters.items():
        if name not in grads:
            grads[name] = torch.zeros_like(widen(p.detach()))
    grads = {name: grads[name].detach().reshape(p.shape) for name, p in parameters.items()}
    keep = torch.ones_like(included) if mask is None else mask
    return ClippedSum(
        grads,
        torch.where(keep, squared.sqrt(), 0.0),
        torch.where(keep, losses.detach(), 0.0),
        owner.clip_norm,
    )


def _forward(owner, plan: Plan, parameters, batch, batch_size, sink) -> tuple[Capture, Tensor]:
    capture = Capture(parameters, batch_size, sink, plan.findings.layouts)
    alias = lambda t: capture.mark_data(t.detach().view_as(t)) if isinstance(t, Tensor) else t  # noqa: E731
    entered = tree_map(alias, batch)
    with torch.enable_grad(), capture:
        losses = owner.loss_fn(owner.model, entered)
    check_losses(losses, batch_size)
    facts = plan.findings.uses
    trace = [(use.operation, use.rule, use.value.shape) for use in capture.uses]
    if trace != [fact.trace for fact in facts]:
        raise Refused(CHANGING)
    return capture, losses
