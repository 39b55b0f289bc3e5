"""``clipped_grad``: the sum of exactly clipped per-example gradients.

Probe, plan and rehearse once per input signature, then clip each batch (``batch.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from dptrain.core import checks, methods
from dptrain.core.clip_rules import ClipRule, Flat, rule_of
from dptrain.core.grid import checked as checked_grid
from dptrain.core.methods import Method

from . import baselines, on_grid
from .batch import clip_batch, replace_rows
from .clipped_sum import ClippedSum
from .compile import Compiler, Eager
from .errors import Changed, Misfit, Refused, Unforeseen
from .fsdp import Sharding, fsdp_modules
from .guards import check_batch, check_callables, check_model, listed, trainable
from .planner import Options, Plan, make_plan
from .probe import Stage, probe
from .ranks import ALONE, Ranks, all_ranks
from .reduction import Reductions
from .rehearsal import rehearse
from .stopwatch import stopwatch
from .trace import Findings
from .uses.base import widen
from .workspace import Workspace

LossFn = Callable[[nn.Module, Any], Tensor]
Change = Callable[[Any], Any]
#: routes that can be asked for
ROUTES = ("materialise+reuse", "materialise+contract", "gram+contract")


def clipped_grad(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    clip_norm: float | ClipRule,
    method: str = "auto",
    allow_unused: bool = False,
    memory_budget: int | None = None,
    routes: Mapping[str, str] | None = None,
    compile: bool = False,
    grid: float | None = None,
    ranks: Ranks | None = None,
) -> ClippedGrad:
    """A function from a physical batch to the sum of its clipped per-example gradients.

    Args:
        model: any module; nothing is stored on it, and its ``.grad`` fields are not touched.
        loss_fn: ``loss_fn(model, batch) -> [B]``, one loss per example.
        clip_norm: C, the largest l2 norm of an example's gradient over all trainable
            parameters (flat clipping, Abadi et al. 2016, arXiv 1607.00133); or a rule of
            ``dptrain.core.clip_rules``: ``Automatic``, ``PerLayer``, ``GroupWise``.
        method: a name or alias of the table in ``dptrain.core.methods``.
        allow_unused: accept trainable parameters that take no part in the losses; their gradient
            is zero and they still receive noise.
        memory_budget: of ``auto``: bytes that per-example gradients and recorded operands may hold until
            the clip factors are known. Other routes are taken or fewer examples at a time, whichever costs
            less; where nothing fits, a second backward pass replaces them.
        routes: of ``auto``: ``{pattern of parameter names: route}``, the first that matches, in place of
            what is fastest: "materialise+reuse", "materialise+contract" or "gram+contract".
        compile: make one graph of the whole step and compile it with Inductor, once per input
            signature; a model for which that cannot be done runs uncompiled, after a warning.
        grid: the spacing of a hardened mechanism's grid (``Mechanism.grid``): each clipped gradient is
            rounded to it, towards zero, and they are summed in integers. For methods that form and keep the
            gradient of each example; ``auto`` is then "per-example".
        ranks: that train the model together, each on its own examples of every logical batch: their sums are
            added up by ``privatize``. By default all of torch.distributed's default group, where it is
            initialised; ``Ranks()`` for this process alone.

    Raises:
        TypeError: no module, no function, or no number where one is needed.
        ValueError: a clip norm below 1e-9 or not finite, a rule that does not suit the parameters, an
            unknown method, options of ``auto`` that it or another method cannot follow, or a method or rule
            that cannot sum on a grid.
    """
    check_callables(model, loss_fn)
    row = methods.resolve(method)
    rule = rule_of(clip_norm)
    rule.partition(list(trainable(model)))
    options = _options(row, memory_budget, routes)
    if grid is not None:
        if not isinstance(rule, Flat):
            raise ValueError(
                f"on a grid gradients are clipped as a whole: give a clip norm, not {rule.name}."
            )
        grid, row = checked_grid(grid, rule.clip_norm), _on_a_grid(row, options)
    return ClippedGrad(
        model,
        loss_fn,
        rule,
        row,
        allow_unused,
        options,
        compile,
        grid,
        all_ranks() if ranks is None else ranks,
    )


def _on_a_grid(method: Method, options: Options) -> Method:
    """The method that sums on a grid in place of this one."""
    if method.capture is methods.Capture.PLANNED and options == Options():
        return methods.resolve("per-example")
    if method.sum not in (methods.Sum.REUSE, methods.Sum.RUNNING_SUM):
        raise ValueError(
            f"method {method.name!r} does not keep the gradient of each example, which a grid needs: use "
            "'per-example', 'per-example-vmap' or 'per-example-loop', without options of 'auto'."
        )
    return method


def _options(method: Method, memory_budget: int | None, routes: Mapping[str, str] | None) -> Options:
    if (memory_budget is not None or routes is not None) and method.capture is not methods.Capture.PLANNED:
        raise ValueError(f"memory_budget and routes are for method='auto', and not for {method.name!r}.")
    if memory_budget is not None:
        memory_budget = int(checks.non_negative("memory_budget", memory_budget))
    if not isinstance(routes, Mapping | None) or not all(isinstance(name, str) for name in routes or ()):
        raise TypeError("routes must be a dictionary from patterns of parameter names to routes.")
    for name in (routes or {}).values():
        if name not in ROUTES:
            raise ValueError(f"route {name!r} is unknown; choose one of: {', '.join(ROUTES)}.")
    return Options(memory_budget, tuple((routes or {}).items()))


class ClippedGrad:
    """What ``clipped_grad`` returns: call it on batches; ``plans`` holds what it has planned."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        rule: ClipRule,
        method: Method,
        allow_unused: bool,
        options: Options | None = None,
        compile: bool = False,
        grid: float | None = None,
        ranks: Ranks = ALONE,
    ):
        #: with whom sums are shared; may be set until the first sum is begun
        self.ranks = ranks
        self._reductions: Reductions | None = None
        self.model, self.loss_fn = model, loss_fn
        self.rule, self.method, self.allow_unused = rule, method, allow_unused
        self.options, self.grid = options or Options(), grid
        self.plans: dict[Any, Plan] = {}
        self._workspace = Workspace()
        self._sharded: Any = None
        self.compiler = Compiler(model, loss_fn) if compile else None
        if compile and (grid is not None or method.capture in (methods.Capture.VMAP, methods.Capture.LOOP)):
            self.compiler = None
            what = f"method {method.name!r}" + ("" if grid is None else " on a grid")
            warnings.warn(f"compile=True has no effect on {what}, which runs uncompiled.", stacklevel=3)

    def __call__(
        self,
        batch: Any,
        mask: Tensor | None = None,
        into: ClippedSum | None = None,
        *,
        last: bool = False,
    ) -> ClippedSum:
        """The clipped sum of one physical batch.

        Args:
            batch: a tensor or a tree of tensors with the examples on the leading axis.
            mask: ``[B]`` bool; examples where it is False contribute exactly nothing.
            into: the sum over earlier batches of this logical one: this batch is added to its buffers in
                place, which saves a pass over all parameters. Should the step fail half-way, it is emptied.
            last: nothing will be added to the sum any more: of several ranks, it is sent to the others part
                by part as it gets ready.

        Raises:
            Refused: no exact result can be promised; says why, and what to do.
            ValueError: the batch or the mask has the wrong shape.
        """
        batch_size, mask = check_batch(batch, mask)
        if fsdp_modules(self.model):
            return self._on_shards(batch, mask, batch_size, into)
        parameters = trainable(self.model)
        check_model(self.model, parameters, self.method)
        if into is None and not self.ranks.alone:
            into = self._begin(parameters)
        self.check_into(into, parameters)
        included = batch_size if mask is None else int(mask.sum())
        if not included:
            nothing = self._nothing(parameters, batch_size)
            return nothing if into is None else into.extended(nothing.norms, nothing.losses)
        whole = mask is None or included == batch_size
        safe = functools.cache(lambda: batch if whole else replace_rows(batch, mask))
        if self.method.capture in (methods.Capture.USES, methods.Capture.PLANNED):
            return self._clip(parameters, batch, safe, mask, batch_size, into, last)
        key = signature(self.model, parameters, batch)

        def eager(to: ClippedSum | None, change: Change | None = None) -> ClippedSum:
            return self._baseline(parameters, change(safe()) if change else safe(), mask, to)

        return self._compiled(into, eager, key, None, parameters, batch, mask)

    def _on_shards(self, batch: Any, mask: Tensor | None, batch_size: int, into) -> ClippedSum:
        from .sharded import ShardedGrad

        if self._sharded is None:
            self._sharded = ShardedGrad(self)
        return self._sharded(batch, mask, batch_size, into)

    def _compiled(self, into: ClippedSum | None, eager: Eager, *step: Any) -> ClippedSum:
        """By the graph for a step (the first arguments of ``Compiler.clip``), if there is one to be had."""
        if self.compiler is None:
            return eager(into)
        return self.compiler.clip(*step, self.rule, into, eager)

    def _baseline(self, parameters: dict[str, Tensor], batch: Any, mask, into) -> ClippedSum:
        """By a method that captures nothing."""
        batch_size, _ = check_batch(batch, mask)
        grads, norms, losses = baselines.run(
            self.method,
            self.model,
            self.loss_fn,
            parameters,
            batch,
            mask,
            batch_size,
            self.rule,
            self.grid,
        )
        part = ClippedSum(grads, norms, losses, self.bound, self.grid)
        return part if into is None else into.add_(part)

    def check_into(self, into: ClippedSum | None, parameters: dict[str, Tensor]) -> None:
        """Raises ValueError: the sum is not one of these parameters, this clip norm and this grid."""
        if into is None:
            return
        shapes = {name: p.shape for name, p in parameters.items()}
        alike = (into.clip_norm, into.grid) == (self.bound, self.grid)
        if not alike or {name: g.shape for name, g in into.grads.items()} != shapes:
            raise ValueError(
                "the sum to add to has another clip norm, another grid or other parameters: pass only one of "
                "this logical batch, and none that a failed step has emptied."
            )

    def _clip(
        self,
        parameters: dict[str, Tensor],
        batch: Any,
        safe: Callable[[], Any],
        mask: Tensor | None,
        batch_size: int,
        into: ClippedSum | None,
        last: bool,
    ) -> ClippedSum:
        """By the plan for this batch, which is made again where the stand-ins had not shown everything.

        ``safe()`` is the batch with masked rows replaced.
        """
        key = signature(self.model, parameters, batch)
        probed_again = False
        while True:
            plan = self._plan(key, parameters, batch, mask, batch_size)
            if plan.parts > 1:
                return self._in_parts(plan.part_size, batch, mask, batch_size, into, last)

            def eager(to: ClippedSum | None, change: Change | None = None, plan: Plan = plan) -> ClippedSum:
                examples = change(safe()) if change else safe()
                return clip_batch(
                    self, plan, parameters, examples, mask, batch_size, to, self._workspace, last
                )

            try:
                return self._compiled(into, eager, key, plan, parameters, batch, mask)
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

    def _in_parts(
        self,
        size: int,
        batch: Any,
        mask: Tensor | None,
        batch_size: int,
        into: ClippedSum | None,
        last: bool,
    ) -> ClippedSum:
        """A few examples at a time, for want of memory; the last part is padded with masked rows."""
        device = next(t.device for t in tree_leaves(batch) if isinstance(t, Tensor))
        mask = torch.ones(batch_size, dtype=torch.bool, device=device) if mask is None else mask
        before = 0 if into is None else len(into.norms)
        total, start = into, 0
        try:
            for start in range(0, batch_size, size):
                rows = torch.arange(start, start + size, device=device)
                real = rows < batch_size
                rows = torch.where(real, rows, torch.zeros_like(rows))
                part = tree_map(lambda t: t[rows.to(t.device)] if isinstance(t, Tensor) else t, batch)  # noqa: B023
                total = self(part, mask[rows] & real, into=total, last=last and start + size >= batch_size)
        except BaseException:
            if start and total is not None:  # some parts are in it
                total.spoil()
            raise
        assert total is not None
        end = before + batch_size
        return dataclasses.replace(total, norms=total.norms[:end], losses=total.losses[:end])

    def _begin(self, parameters: dict[str, Tensor]) -> ClippedSum:
        """An empty sum that is shared with other ranks."""
        if self._reductions is None:
            self._reductions = Reductions(parameters, self.ranks, on_grid=self.grid is not None)
        return self._reductions.begin(self.bound, self.grid)

    @property
    def clip_norm(self) -> float:
        """C: the largest norm of an example's clipped gradient, by the rule."""
        return self.rule.sensitivity

    @property
    def bound(self) -> float:
        """On the norm of each example's part of the sum: infinite for the method that does not clip."""
        return self.clip_norm if self.method.is_private else float("inf")

    @property
    def workspace_bytes(self) -> int:
        """Memory for per-example gradients that is kept from step to step."""
        return self._workspace.held_bytes

    def plan(self, batch: Any, mask: Tensor | None = None) -> Plan:
        """The plan for batches like this one; probes the model the first time.

        Raises:
            Refused: see ``__call__``.
        """
        batch_size, mask = check_batch(batch, mask)
        if fsdp_modules(self.model):
            raise Refused(
                "the ranks of a model under FSDP plan at their first batch: clip one and see plans."
            )
        parameters = trainable(self.model)
        check_model(self.model, parameters, self.method)
        key = signature(self.model, parameters, batch)
        return self._plan(key, parameters, batch, mask, batch_size)

    def _plan(
        self, key: Any, parameters: dict[str, Tensor], batch: Any, mask: Tensor | None, batch_size: int
    ) -> Plan:
        if key not in self.plans:
            self.plans[key] = self._probe(parameters, batch, mask, batch_size)
        return self.plans[key]

    def _probe(self, parameters: dict[str, Tensor], batch: Any, mask: Tensor | None, batch_size: int) -> Plan:
        """Probe, plan, rehearse."""
        findings, stage = probe(self.model, self.loss_fn, batch, mask, batch_size)
        return self.planned(findings, stage, parameters, batch_size)

    def planned(
        self,
        findings: Findings,
        stage: Stage,
        parameters: dict[str, Tensor],
        batch_size: int,
        sharding: Sharding | None = None,
    ) -> Plan:
        """From what the probe found to a plan that has been rehearsed; under FSDP one for all ranks."""
        device = next(iter(parameters.values())).device
        self._check_coverage(findings, parameters)
        if self.grid is not None:
            findings = findings.at_leaves()
            stage = dataclasses.replace(stage, findings=stage.findings.at_leaves())
        else:
            parts = dict(zip(parameters, self.rule.partition(list(parameters)), strict=True))
            findings = findings.within(parts)
            stage = dataclasses.replace(stage, findings=stage.findings.within(parts))
        dtype = next(iter(parameters.values())).dtype
        watch = stopwatch(device, dtype if dtype == torch.float64 else torch.float32)
        measures = sharding is None or sharding.rank == 0
        plan = make_plan(self.method, findings, batch_size, device, self.options, watch if measures else None)
        if sharding is not None:
            plan = dataclasses.replace(plan, routes=sharding.from_rank(0, plan.routes))
        if len(stage.findings.groups) == len(plan.routes):  # the very routes that will be taken
            rehearsed = dataclasses.replace(plan, findings=stage.findings, batch_size=stage.size)
        else:  # the data decide which uses there are
            rehearsed = make_plan(self.method, stage.findings, stage.size, device, self.options)
        rehearse(stage, rehearsed, sharding)
        return dataclasses.replace(plan, grid=self.grid)  # rehearsed in floating point, to other norms

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
        like = widen(next(iter(parameters.values())).detach())
        if self.grid is None:
            grads = {name: torch.zeros_like(widen(p.detach())) for name, p in parameters.items()}
        else:
            grads = on_grid.zeros(parameters)
        nothing = like.new_zeros(batch_size)
        return ClippedSum(grads, nothing, nothing.clone(), self.bound, self.grid)


def signature(model: nn.Module, parameters: dict[str, Tensor], batch: Any) -> tuple:
    """What a plan depends on: shapes and types, train or eval, autocast, the trainable set."""
    leaves, tree = tree_flatten(batch)
    shapes = tuple((tuple(t.shape), t.dtype, t.device) if isinstance(t, Tensor) else repr(t) for t in leaves)
    modes = tuple(module.training for module in model.modules())
    device = next(iter(parameters.values())).device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return shapes, str(tree), modes, autocast, tuple((n, p.dtype) for n, p in parameters.items())
