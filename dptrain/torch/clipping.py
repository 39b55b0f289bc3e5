"""``clipped_grad``: the sum of exactly clipped per-example gradients.

One physical batch: probe and plan once per input signature; forward under capture; backward to
the anchor, in which each use settles its norm; clip factors; the sum at the parameter-only values;
one pull-back to the leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from dptrain.core import methods
from dptrain.core.methods import Method

from . import baselines
from .capture import Capture, Use
from .errors import Refused
from .planner import Plan, Route, make_plan
from .probe import CHANGING, Findings, backward, check_losses, probe, trainable
from .pullback import (
    Group,
    Kind,
    pull_back_examples,
    pull_back_sums,
    tied_factors,
    tied_gradients,
    tied_squared_norms,
)
from .uses.base import weighted_sum, widen

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
    if not 0 < clip_norm < float("inf"):
        raise ValueError(f"clip_norm must be positive and finite, and is {clip_norm}.")
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
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
            raise Refused(
                f"no use of the trainable parameter {shown} was seen in the loss: freeze it with "
                "requires_grad_(False), or pass allow_unused=True if its gradient is meant to be "
                "zero (re-entrant checkpointing also hides parameters: pass use_reentrant=False)."
            )

    def _nothing(self, parameters: dict[str, Tensor], batch_size: int) -> ClippedSum:
        grads = {name: torch.zeros_like(widen(p.detach())) for name, p in parameters.items()}
        like = next(iter(grads.values()))
        bound = self.clip_norm if self.method.is_private else float("inf")
        return ClippedSum(grads, like.new_zeros(batch_size), like.new_zeros(batch_size), bound)


# ---------------------------------------------------------------------- checks on what comes in


def check_batch(batch: Any, mask: Tensor | None) -> tuple[int, Tensor | None]:
    """The number of examples in a batch, and its mask on the batch's device."""
    tensors = [t for t in tree_flatten(batch)[0] if isinstance(t, Tensor)]
    if not tensors:
        raise ValueError("the batch holds no tensor.")
    sizes = {t.shape[0] if t.dim() else None for t in tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"every tensor of a batch must lead with the examples; got shapes {shapes}.")
    (batch_size,) = sizes
    if batch_size == 0:
        raise ValueError("the batch has no rows: pad it to a fixed size and mask the padding.")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (batch_size,) or mask.dtype != torch.bool:
            what = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor of shape ({batch_size},), and is {what}.")
        mask = mask.to(tensors[0].device)
    return batch_size, mask


def check_model(model: nn.Module, parameters: dict[str, Tensor], method: Method) -> None:
    if not parameters:
        raise Refused("the model has no trainable parameter: set requires_grad_(True) on some.")
    if hasattr(model, "_orig_mod"):
        raise Refused("the model is compiled: pass the module that was given to torch.compile.")
    if not method.is_private:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            module.training or module.running_mean is None
        ):
            raise Refused(
                f"{name or 'the model'} is a BatchNorm in training mode, which lets one example move "
                "another's gradient: convert it to GroupNorm, or freeze it with .eval()."
            )


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


def clip_factors(squared: Tensor, clip_norm: float) -> Tensor:
    """``min(1, C / ||g_b||)``, a hair less so that rounding never lets a norm exceed C.

    Zero where the norm is not finite (rule 5). Float32 or better (rule 7).
    """
    norms = squared.sqrt()
    shade = 1 - 8 * torch.finfo(squared.dtype).eps
    factors = (clip_norm * shade / norms).clamp(max=1)
    return torch.where(norms.isfinite(), factors, torch.zeros_like(factors))


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


class Settlement:
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
        number, group, route = self.group_of[use.index]
        fact = self.plan.findings.uses[use.index]
        if fact.layout is None or not fact.layout.fits(g, self.batch_size):
            raise Refused(
                f"a gradient of {', '.join(fact.leaves)} came where the probe saw none: its "
                "operations depend on more than the shapes of the batch."
            )
        if group.kind is Kind.ALONE:
            self._settle_alone(use, fact, route, a, g)
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

    def _settle_alone(self, use, fact, route: Route, a, g) -> None:
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
            pulled = pull_back_examples(values, list(members.values()), leaves)
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

    def weighted(self, use: Use, a: Tensor | None, g: Tensor) -> None:
        """The sink of the second backward pass: contract at once, keep nothing."""
        layout = self.plan.findings.uses[use.index].layout
        if self.included is not None:
            a, g = use.rule.zero_rows(a, g, self.included, layout)
        total = use.rule.contract(use.value.shape, a, widen(g), self.factors, layout, self.batch_size)
        self._add_sum(use.value, total)

    def contract(self, capture: Capture) -> None:
        """Sums at the parameter-only values, from what the first backward pass kept."""
        for index, gradient in self.gradients.items():
            self._add_sum(capture.uses[index].value, self._weigh(gradient))
        for index, (a, g) in self.operands.items():
            self.weighted(capture.uses[index], a, g)
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

    def pull_back(self, capture: Capture, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clipped sums by name: one vector-Jacobian product for values that are no leaves."""
        grads = pull_back_sums(list(self.sums.values()), parameters, capture.names)
        for name, gradient in self.leaf_gradients:
            total = self._weigh(gradient)
            grads[name] = grads[name] + total if name in grads else total
        return grads


def squared_norm(gradients: Tensor) -> Tensor:
    """Squared norms ``[B]`` of ``[B, ...]``, accumulated in float32 or better."""
    flat = widen(gradients).reshape(gradients.shape[0], -1)
    return torch.linalg.vector_norm(flat, dim=1).square()
