"""``clipped_grad``: the sum of exactly clipped per-example gradients.

Probe, plan and rehearse once per input signature, then clip each batch (``batch.py``).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from dptrain.core import methods
from dptrain.core.methods import Method

from . import baselines
from .batch import clip_batch, replace_rows
from .clipped_sum import ClippedSum
from .compile import Compiler
from .errors import Changed, Misfit, Refused, Unforeseen
from .guards import check_batch, check_model, listed, trainable
from .planner import Plan, make_plan
from .probe import probe
from .rehearsal import rehearse
from .trace import Findings
from .uses.base import widen

LossFn = Callable[[nn.Module, Any], Tensor]


def clipped_grad(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    clip_norm: float,
    method: str = "auto",
    allow_unused: bool = False,
    compile: bool = False,
) -> ClippedGrad:
    """A function from a physical batch to the sum of its clipped per-example gradients.

    Args:
        model: any module; nothing is stored on it, and its ``.grad`` fields are not touched.
        loss_fn: ``loss_fn(model, batch) -> [B]``, one loss per example.
        clip_norm: C, the largest l2 norm of an example's gradient over all trainable
            parameters (flat clipping, Abadi et al. 2016, arXiv 1607.00133).
        method: a name or alias of the table in ``dptrain.core.methods``.
        allow_unused: accept trainable parameters that take no part in the losses; their gradient
            is zero and they still receive noise.
        compile: make one graph of the whole step and compile it with Inductor, once per input
            signature; a model for which that cannot be done runs uncompiled, after a warning.

    Raises:
        ValueError: a clip norm below 1e-12 or not finite, or an unknown method.
    """
    row = methods.resolve(method)
    clip_norm = float(clip_norm)
    if not 1e-12 <= clip_norm < float("inf"):  # below, squares of float32 vanish
        raise ValueError(f"clip_norm must be at least 1e-12 and finite, and is {clip_norm}.")
    return ClippedGrad(model, loss_fn, clip_norm, row, allow_unused, compile)


class ClippedGrad:
    """What ``clipped_grad`` returns: call it on batches; ``plans`` holds what it has planned."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        clip_norm: float,
        method: Method,
        allow_unused: bool,
        compile: bool = False,
    ):
        self.model, self.loss_fn = model, loss_fn
        self.clip_norm, self.method, self.allow_unused = clip_norm, method, allow_unused
        self.plans: dict[Any, Plan] = {}
        self.compiler = Compiler(model, loss_fn) if compile else None
        if compile and method.capture in (methods.Capture.VMAP, methods.Capture.LOOP):
            self.compiler = None
            warnings.warn(
                f"compile=True has no effect on method {method.name!r}, which runs uncompiled.", stacklevel=3
            )

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
        if mask is not None and not bool(mask.any()):
            return self._nothing(parameters, batch_size)
        safe = functools.cache(lambda: batch if mask is None else replace_rows(batch, mask))
        if self.method.capture in (methods.Capture.USES, methods.Capture.PLANNED):
            return self._clip(parameters, batch, safe, mask, batch_size)
        return self._compiled(
            signature(self.model, parameters, batch),
            None,
            parameters,
            batch,
            mask,
            batch_size,
            lambda: self._baseline(parameters, safe(), mask, batch_size),
        )

    def _compiled(self, key, plan, parameters, batch, mask, batch_size, eager) -> ClippedSum:
        """By the graph for this signature, where there is one to be had."""
        if self.compiler is None:
            return eager()
        return self.compiler.clip(key, plan, parameters, batch, mask, batch_size, self.clip_norm, eager)

    def _baseline(self, parameters: dict[str, Tensor], batch: Any, mask, batch_size: int) -> ClippedSum:
        """By a method that captures nothing."""
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

    def _clip(
        self,
        parameters: dict[str, Tensor],
        batch: Any,
        safe: Callable[[], Any],
        mask: Tensor | None,
        batch_size: int,
    ) -> ClippedSum:
        """By the plan for this batch, which is made again where the stand-ins had not shown everything.

        ``safe()`` is the batch with masked rows replaced.
        """
        key = signature(self.model, parameters, batch)
        probed_again = False
        while True:
            plan = self.plan(batch, mask)
            eager = functools.partial(_clip_eagerly, self, plan, parameters, safe, mask, batch_size)
            try:
                return self._compiled(key, plan, parameters, batch, mask, batch_size, eager)
            except Misfit as misfit:  # the data decide what this use sees, and by chance it did not show
                self.plans[key] = plan.rerouted(misfit.pattern)
            except Changed as refusal:  # experts or heads to which no stand-in was sent: look again
                again = None if probed_again else self._probe(parameters, safe(), mask, batch_size)
                if again is None or not again.findings.routed:  # a branch is no matter of routing
                    raise refusal
                probed_again = True
                self.plans[key] = again.with_patterns(plan.findings.patterns)
            except Unforeseen:  # these examples move what no stand-in did: probe with them
                if probed_again:
                    raise
                probed_again = True
                self.plans.pop(key, None)

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
            self.plans[key] = self._probe(parameters, batch, mask, batch_size)
        return self.plans[key]

    def _probe(self, parameters: dict[str, Tensor], batch: Any, mask: Tensor | None, batch_size: int) -> Plan:
        """Probe, plan, rehearse."""
        device = next(iter(parameters.values())).device
        findings, stage = probe(self.model, self.loss_fn, batch, mask, batch_size)
        self._check_coverage(findings, parameters)
        plan = make_plan(self.method, findings, batch_size, device)
        rehearse(stage, make_plan(self.method, stage.findings, stage.size, device))
        return plan

    def _check_coverage(self, findings: Findings, parameters: dict[str, Tensor]) -> None:
        missing = [name for name in parameters if name not in findings.covered]
        if findings.routed:  # experts to which no stand-in was sent are seen when one is
            alike = {(p.shape, p.dtype) for n, p in parameters.items() if n in findings.routed_leaves}
            missing = [n for n in missing if (parameters[n].shape, parameters[n].dtype) not in alike]
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


def _clip_eagerly(task, plan: Plan, parameters, safe: Callable[[], Any], mask, batch_size: int) -> ClippedSum:
    return clip_batch(task, plan, parameters, safe(), mask, batch_size)


def signature(model: nn.Module, parameters: dict[str, Tensor], batch: Any) -> tuple:
    """What a plan depends on: shapes and types, train or eval, autocast, the trainable set."""
    leaves, tree = tree_flatten(batch)
    shapes = tuple((tuple(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else repr(t) for t in leaves)
    modes = tuple(module.training for module in model.modules())
    device = next(iter(parameters.values())).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return shapes, str(tree), modes, autocast, tuple((n, p.dtype) for n, p in parameters.items())
