"""Exactness: clipped sums and norms by a plan against single examples, in float64, on a copy.

Rounding through a deep network in float64 leaves relative errors of 1e-15 to 1e-11; a term that is
left out, a row that is taken for another example's or a bias in a norm shows above 1e-6. The
tolerance of 1e-9 lies well between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from dptrain.core.clip_rules import Flat

from .batch import clip_batch
from .clipped_sum import ClippedSum
from .clipping import ClippedGrad
from .errors import Refused, is_final
from .guards import trainable
from .planner import Plan
from .randomness import drawing_modules
from .stand_ins import isolated_randomness, seed
from .understudy import Understudy
from .widened import float64_only, widened_rows

TOLERANCE = 1e-9
#: a parameter whose gradient is by nature zero (a key's bias) is measured against this much of the
#: whole gradient, because its own norm is nothing but rounding
SMALLEST_SHARE = 1e-3
#: which strength of the probe's noise: a twentieth of a usual initialisation. A zero-initialised head,
#: LoRA factor or last scale of a block would leave most gradients zero, and nothing to compare.
SLIGHTLY = 2


@dataclass(frozen=True)
class Exactness:
    """How far the plan is from single examples, in float64.

    Attributes:
        examples: how many were compared.
        clip_norm: C; by default about the first example's norm, so that some are clipped.
        norm_error: largest relative error of an example's norm.
        gradient_errors: relative error of the clipped sum by parameter, the largest first.
        stilled: modules that draw random numbers and were put into evaluation mode for this.
        one_by_one: whether each example was run by itself; else, because the model draws random
            numbers in evaluation too, its loss was taken from a run of all under the same draws.
    """

    examples: int
    clip_norm: float
    norm_error: float
    gradient_errors: tuple[tuple[str, float], ...]
    stilled: tuple[str, ...]
    one_by_one: bool
    tolerance: float

    @property
    def worst(self) -> float:
        errors = [self.norm_error, *(error for _, error in self.gradient_errors)]
        return max(e if math.isfinite(e) else math.inf for e in errors)

    @property
    def exact(self) -> bool:
        return self.worst < self.tolerance


def measure(
    task: ClippedGrad, plan: Plan, batch: Any, clip_norm: float | None, tolerance: float
) -> Exactness:
    """Run ``plan`` on a float64 copy of the model and compare it with its examples one by one.

    One gradient and one sum are held besides the plan's own, whatever the number of examples.

    Raises:
        Refused: the comparison cannot be made.
    """
    with isolated_randomness(batch):
        return _Comparison(task, plan, batch).run(clip_norm, tolerance)


class _Comparison:
    def __init__(self, task: ClippedGrad, plan: Plan, batch: Any):
        self.plan, self.loss_fn, self.allow_unused = plan, task.loss_fn, task.allow_unused
        self.size = plan.batch_size
        understudy = Understudy(task.model, task.loss_fn, batch, None, self.size)
        understudy.randomise(SLIGHTLY)
        self.model = understudy.model.double()
        self.rows = widened_rows(batch)
        self.parameters = trainable(self.model)
        self.device = next(iter(self.parameters.values())).device
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}

    def run(self, clip_norm: float | None, tolerance: float) -> Exactness:
        with float64_only(self.device):
            try:
                stilled, one_by_one = self._still()
                norms, want, bound = self._oracle(one_by_one, clip_norm)
                found = self._by_plan(bound)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                if is_final(error):
                    raise
                reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error)
                raise Refused(
                    f"exactness cannot be shown, because the model does not run in float64 ({reason}): let "
                    "its types follow those of its inputs and parameters."
                ) from error
        errors = self._errors(found, want)
        norm_error = float((found.norms.detach().double() - norms).abs().div(norms.clamp_min(1e-300)).max())
        return Exactness(self.size, bound, norm_error, errors, stilled, one_by_one, tolerance)

    def reset(self) -> None:
        """Buffers (power iterations, counters) and draws as at the start."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])
        seed(7)

    def losses(self, rows: Any) -> Tensor:
        self.reset()
        return self._forward(rows)

    def _forward(self, rows: Any) -> Tensor:
        rows = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, rows)
        with torch.enable_grad():
            return self.loss_fn(self.model, rows)

    def example(self, b: int) -> Any:
        return tree_map(lambda t: t[b : b + 1] if isinstance(t, Tensor) else t, self.rows)

    def _still(self) -> tuple[tuple[str, ...], bool]:
        """Put what draws into evaluation mode: alone, an example would be dropped out otherwise."""
        stilled: list[str] = []
        for _ in range(3):  # a module may draw only where another one is quiet
            self.reset()
            found, outside = drawing_modules(self.model, lambda: self._forward(self.example(0)))
            training = {name: m for name, m in found.items() if m.training}
            if not training:
                return tuple(sorted(stilled)), not found and not outside
            for name, module in training.items():
                module.training = False
                stilled.append(name)
        return tuple(sorted(stilled)), False

    def _each(self, one_by_one: bool) -> Iterator[Tensor]:
        if not one_by_one:
            yield from self.losses(self.rows)
            return
        for b in range(self.size):
            yield self.losses(self.example(b)).sum()

    def _oracle(self, one_by_one: bool, clip_norm: float | None) -> tuple[Tensor, dict[str, Tensor], float]:
        """(norms, clipped sum, C) by ordinary autograd."""
        total = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        leaves = list(self.parameters.values())
        norms, bound = [], clip_norm
        for loss in self._each(one_by_one):
            grads = torch.autograd.grad(loss, leaves, retain_graph=not one_by_one, allow_unused=True)
            norm = float(sum(g.square().sum() for g in grads if g is not None)) ** 0.5
            if not 0 < norm < float("inf"):
                raise Refused(
                    "exactness cannot be shown, because an example's gradient is zero or not finite: "
                    "give other examples."
                )
            bound = norm if bound is None else bound
            for sums, g in zip(total.values(), grads):
                if g is not None:
                    sums.add_(g, alpha=min(1.0, bound / norm))
            norms.append(norm)
        return torch.tensor(norms, dtype=torch.float64, device=self.device), total, bound

    def _by_plan(self, bound: float) -> ClippedSum:
        twin = SimpleNamespace(model=self.model, loss_fn=self.loss_fn, rule=Flat(bound))
        self.reset()
        try:
            return clip_batch(twin, self.plan, self.parameters, self.rows, None, self.size)
        except Refused:  # in evaluation some modules compute otherwise: the copy gets its own plan
            own = ClippedGrad(self.model, self.loss_fn, Flat(bound), self.plan.method, self.allow_unused)
            own.plan(self.rows)
            self.reset()
            return own(self.rows)

    def _errors(self, found: ClippedSum, want: dict[str, Tensor]) -> tuple[tuple[str, float], ...]:
        whole = float(sum(w.square().sum() for w in want.values())) ** 0.5
        errors = []
        for name, expected in want.items():
            scale = max(float(expected.norm()), SMALLEST_SHARE * whole)
            errors.append((name, float((found.grads[name].double() - expected).norm()) / scale))
        return tuple(sorted(errors, key=lambda pair: -pair[1]))
