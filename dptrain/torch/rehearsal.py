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

from dptrain.core.clip_rules import Flat

from .batch import clip_batch
from .errors import Refused
from .fsdp import Sharding
from .guards import listed
from .planner import Plan
from .probe import Stage
from .shards import local
from .stand_ins import isolated_randomness
from .uses.base import widen


def rehearse(stage: Stage, plan: Plan, sharding: Sharding | None = None) -> None:
    """Run ``plan`` on the stage's rows and compare it with single examples.

    Args:
        sharding: of a model under FSDP2, whose ranks rehearse together: each compares its shards.

    Raises:
        Refused: they differ by more than rounding can explain.
    """
    with isolated_randomness(stage.rows):
        _rehearse(stage, plan, sharding)


def _rehearse(stage: Stage, plan: Plan, sharding: Sharding | None) -> None:
    parameters = stage.understudy.parameters
    rows = lambda: tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, stage.rows)  # noqa: E731
    stage.understudy.reset()
    with torch.enable_grad():
        losses = stage.understudy.loss_fn(stage.understudy.model, rows())
    leaves = list(parameters.values())
    examples = [_example(loss, parameters, sharding) for loss in losses]
    norms = torch.stack([torch.as_tensor(squared) for _, squared in examples]).to(losses.device).sqrt()
    bound = float(norms.median())
    if not bool(norms.isfinite().all()) or bound < 1e-10:
        return  # the probe went on until its rows were conclusive, with other parameters
    task = SimpleNamespace(model=stage.understudy.model, loss_fn=stage.understudy.loss_fn, rule=Flat(bound))
    stage.understudy.reset()
    out = clip_batch(task, plan, parameters, rows(), None, stage.size, sharding=sharding)
    tolerance = _tolerance(leaves, losses)
    if not torch.allclose(out.norms.double(), norms, rtol=tolerance, atol=0):
        raise Refused(
            "the norms of single examples by ordinary autograd differ from those of the plan "
            f"({_worst(out.norms, norms)}): please report this model; method='per-example-loop' "
            "works for it."
        )
    ranks = 1 if sharding is None else sharding.ranks  # with the same examples
    off = []
    for name in parameters:
        want = sum(
            ranks * min(1.0, bound / max(float(n), 1e-300)) * widen(each[name]).double()
            for n, (each, _) in zip(norms, examples)
            if name in each
        )
        off.append(float((local(out.grads[name]).double() - want).norm()) ** 2)
    off = off if sharding is None else sharding.total(*off)
    wrong = [
        n for n, square in zip(parameters, off) if not square**0.5 <= tolerance * bound * stage.size * ranks
    ]
    if wrong:
        raise Refused(
            f"the clipped gradient of {listed(wrong)} differs from that of ordinary autograd: please "
            "report this model; method='per-example-loop' works for it."
        )


def _example(
    loss: Tensor, parameters: dict[str, Tensor], sharding: Sharding | None
) -> tuple[dict[str, Tensor], float | Tensor]:
    """The gradient of one example by ordinary autograd, by name, this rank's rows; its squared norm."""
    found: dict[str, Tensor] = {}
    squares: list[Tensor] = []

    def take(name: str, gradient: Tensor) -> None:
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        squares.append(widen(gradient).double().square().sum())
        found[name] = gradient if sharding is None else sharding.rows(gradient).clone()

    if sharding is not None:
        sharding.differentiate(loss, take, retain_graph=True)
    else:
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(parameters, grads):
            if gradient is not None:
                take(name, gradient)
    return found, sum(squares)


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
