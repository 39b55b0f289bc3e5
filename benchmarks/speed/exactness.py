"""Is what is timed exact? Against single examples, in the same run.

Twice: in float64 on a few examples, where nothing but a wrong formula makes a difference, and the very
contestant that is timed, in its own precision on its own batch, where its own plan is at work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.zoo import engines
from benchmarks.zoo.entry import Case as Judged
from benchmarks.zoo.verdict import SingleExamples, compare, norm

from .cases import Case
from .contestants import Contestant
from .peers import ZOO_NAMES

EXAMPLES = 3
#: of the whole clipped sum in float32. A Gram norm carries the bound on its own rounding, up to 1 % of
#: its square, so that a factor may be half a percent low; a wrong formula is off by far more.
TOLERANCE_FLOAT32 = 1e-2
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


class Reference:
    """Single-example gradients of a case at the weights that every contestant starts from.

    Made before anyone takes a step. ``clip_norm`` is their median norm: half of them are clipped.
    """

    def __init__(self, case: Case, loss_fn, batch: Any, device: str):
        model = case.build(device)
        size = len(tree_leaves(batch)[0])
        gradient = 4 * sum(p.numel() for p in model.parameters())
        self.kept = min(size, max(2, ORACLE_BYTES // gradient))
        self.mask = torch.arange(size, device=device) < self.kept
        some = tree_map(lambda t: t[: self.kept], batch)
        self.oracle = SingleExamples(Judged(model, loss_fn, case.make_batch), some)
        self.clip_norm = float(self.oracle.norms.median())

    def judge(self, contestant: Contestant) -> dict[str, Any] | None:
        """What the contestant that is about to be timed makes of the same examples."""
        if contestant.clipped_sum is None:
            return None
        grads: dict[str, Tensor] = contestant.clipped_sum(self.mask)
        want = self.oracle.clipped_sum(self.clip_norm, 0.0, ())
        wrong = {name: grads[name].to(total.dtype) - total for name, total in want.items()}
        return {"examples": self.kept, "relative_error": float(norm(wrong) / norm(want))}
