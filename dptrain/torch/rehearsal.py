"""The rehearsal: before a method is used on a model, it must agree with ordinary autograd.

On a copy of the model with a few stand-in rows, norms and the clipped sum are compared with those
of single examples differentiated the ordinary way. Whatever a rule gets wrong is refused and not
released.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .batch import clip_batch
from .errors import Refused
from .guards import listed, trainable
from .planner import Plan
from .probe import Stage
from .stand_ins import isolated_randomness
from .uses.base import widen


def rehearse(stage: Stage, plan: Plan) -> None:
    """Run ``plan`` on the stage's rows and compare it with single examples.

    Raises:
        Refused: they differ by more than rounding can explain.
    """
    with isolated_randomness(stage.rows):
        _rehearse(stage, plan)


def _rehearse(stage: Stage, plan: Plan) -> None:
    parameters = trainable(stage.understudy.model)
    rows = lambda: tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, stage.rows)  # noqa: E731
    stage.understudy.reset()
    with torch.enable_grad():
        losses = stage.understudy.loss_fn(stage.understudy.model, rows())
    leaves = list(parameters.values())
    examples = [
        torch.autograd.grad(losses[b], leaves, retain_graph=True, allow_unused=True)
        for b in range(stage.size)
    ]
    examples = [[g.to_dense() if g is not None and g.is_sparse else g for g in each] for each in examples]
    norms = torch.stack(
        [sum(widen(g).double().square().sum() for g in each if g is not None) for each in examples]
    ).sqrt()
    bound = float(norms.median())
    if not bool(norms.isfinite().all()) or bound < 1e-10:
        return  # the probe went on until its rows were conclusive, with other parameters
    task = SimpleNamespace(model=stage.understudy.model, loss_fn=stage.understudy.loss_fn, clip_norm=bound)
    stage.understudy.reset()
    out = clip_batch(task, plan, parameters, rows(), None, stage.size)
    tolerance = _tolerance(leaves, losses)
    if not torch.allclose(out.norms.double(), norms, rtol=tolerance, atol=0):
        raise Refused(
            "the norms of single examples by ordinary autograd differ from those of the plan "
            f"({_worst(out.norms, norms)}): please report this model; method='per-example-loop' "
            "works for it."
        )
    wrong = []
    for i, name in enumerate(parameters):
        want = sum(
            min(1.0, bound / max(float(n), 1e-300)) * widen(each[i]).double()
            for n, each in zip(norms, examples)
            if each[i] is not None
        )
        if float((out.grads[name].double() - want).norm()) > tolerance * bound * stage.size:
            wrong.append(name)
    if wrong:
        raise Refused(
            f"the clipped gradient of {listed(wrong)} differs from that of ordinary autograd: please "
            "report this model; method='per-example-loop' works for it."
        )


def _tolerance(leaves: list[Tensor], losses: Tensor) -> float:
    """Rounding of the forward and backward pass, and the error that Gram norms carry."""
    device = losses.device.type
    narrow = any(p.dtype not in (torch.float32, torch.float64) for p in leaves)
    if narrow or losses.dtype not in (torch.float32, torch.float64):
        return 0.1
    return 1e-6 if all(p.dtype == torch.float64 for p in leaves) and device == "cpu" else 0.03


def _worst(found: Tensor, expected: Tensor) -> str:
    ratio = (found.double() / expected - 1).abs().max()
    return f"by {100 * float(ratio):.2g} %"
