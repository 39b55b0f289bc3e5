"""Is what is timed exact? Against single examples, in the same run.

Twice: in float64 on a few examples, where nothing but a wrong formula makes a difference, and the very
contestant that is timed, in its own precision on its own batch, where its own plan is at work.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.zoo import engines
from benchmarks.zoo.entry import Case as Judged
from benchmarks.zoo.verdict import SingleExamples, compare, norm

from .cases import Case
from .contestants import Contestant, Task
from .peers import ZOO_NAMES

EXAMPLES = 3
#: of the whole clipped sum in float32. A Gram norm carries the bound on its own rounding, up to 1 % of
#: its square, so that a factor may be half a percent low; a wrong formula is off by far more.
TOLERANCE_FLOAT32 = 1e-2
#: as a multiple of the rounding of ordinary autograd
TOLERANCE_ROUNDING = 2.0
#: single-example gradients are held up to this
ORACLE_BYTES = 4 * 2**30


def in_float64(case: Case, name: str, method: str, device: str) -> dict[str, Any]:
    """The zoo's verdict on a method of dptrain or a peer, on a few examples of the full model."""
    engine = engines.engine_named(ZOO_NAMES.get(name) or f"dptrain:{method}")
    model = case.build(device).double()
    batch = widened(case.make_batch(EXAMPLES), device)
    judged = engine.prepare(Judged(model, case.loss_fn, case.make_batch))
    oracle = SingleExamples(judged, batch)
    clip_norm = float(oracle.norms.median())
    try:
        answer = engine.clipped_sum(judged, batch, clip_norm)
    except Exception as error:
        return {"verdict": "refused" if engine.is_refusal(error) else "raises", "sentence": str(error)[:300]}
    return compare(answer, oracle, clip_norm, engine.tolerance)


def widened(batch: Any, device: str) -> Any:
    return tree_map(lambda t: t.to(device).double() if t.is_floating_point() else t.to(device), batch)


def is_close(as_timed: dict[str, Any]) -> bool:
    """Whether a contestant in float32 is off by no more than rounding explains."""
    allowed = max(TOLERANCE_FLOAT32, TOLERANCE_ROUNDING * as_timed["rounding"])
    return as_timed["relative_error"] <= allowed


class Reference:
    """Single-example gradients of a case at the weights that every contestant starts from.

    ``clip_norm`` is their median norm: half of them are clipped. ``rounding`` is the relative difference
    between the sum of all of them and the gradient of the whole batch, both by ordinary autograd: networks
    at random weights can amplify rounding, BiT-ResNet to some percent where channels lie last.
    """

    def __init__(self, case: Case, loss_fn, batch: Any, device: str, channels_last: bool = False):
        task = Task(case, loss_fn, batch, len(tree_leaves(batch)[0]), device, clip_norm=1.0)
        model = task.model(channels_last)
        gradient = 4 * sum(p.numel() for p in model.parameters())
        self.kept = min(task.batch_size, max(2, ORACLE_BYTES // gradient))
        self.mask = torch.arange(task.batch_size, device=device) < self.kept
        examples = task.examples(channels_last)
        some = tree_map(lambda t: t[: self.kept], examples)
        self.oracle = SingleExamples(Judged(model, loss_fn, case.make_batch), some)
        self.clip_norm = float(self.oracle.norms.median())
        loss_fn(model, examples)[self.mask].sum().backward()
        self.rounding = self._error({n: p.grad for n, p in model.named_parameters()}, math.inf)

    def judge(self, contestant: Contestant, clip_norm: float) -> dict[str, Any] | None:
        """What the contestant that is about to be timed makes of the same examples."""
        if contestant.clipped_sum is None:
            return None
        error = self._error(contestant.clipped_sum(self.mask), clip_norm)
        return {"examples": self.kept, "relative_error": error, "rounding": self.rounding}

    def _error(self, grads: dict[str, Tensor], clip_norm: float) -> float:
        want = self.oracle.clipped_sum(clip_norm, 0.0, ())
        wrong = {name: grads[name].to(total.dtype) - total for name, total in want.items()}
        return float(norm(wrong) / norm(want))
