"""Is what is timed exact, and does it train everything? Against single examples, by ordinary autograd.

The oracle is the definition: the sum over examples of min(1, C / ‖g‖) g (Abadi et al. 2016), each g from a
backward pass of its own, at the weights that every contestant starts from.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from dptrain.bench.contestant import Contestant, Unsupported
from dptrain.bench.torch_task import Task

Grads = dict[str, Tensor]

#: relative. In float32 a Gram norm carries the bound on its own rounding, up to 1 % of its
#: square, so that a factor may be half a percent low; a wrong formula is off by far more. In float64 a
#: library may still form its norms in float32.
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
#: as a multiple of the rounding of ordinary autograd
TOLERANCE_ROUNDING = 2.0
#: in float64, what is smaller than this part of the whole is nothing but rounding
FLOOR = 1e-9


def judge(contestant: Contestant, task: Task, n: int) -> dict[str, Any]:
    """What a contestant makes of the first n examples of the task's batch.

    Where it leaves parameters out, the others are compared as if those were frozen. The model must not draw
    random numbers, of dropout say; `in_float64` switches that off.

    Returns:
        ``verdict``: ``exact``; ``WRONG``, also where parameters are left out; ``refused``, where it says so
        itself; ``non-private``. ``error_of_sum``: see `Reference.error`, None where that is no number.
        ``sentence``: what is wrong, or None.

    Raises:
        Exception: whatever else goes wrong within the contestant.
    """
    if contestant.clipped_sum is None:
        return _verdict("non-private")
    try:
        found = contestant.clipped_sum(n)
    except Unsupported as error:
        return _verdict("refused", sentence=str(error))
    if _mixes(task.model()):
        words = "Its examples mix in batch normalisation, and a gradient is given all the same."
        return _verdict("WRONG", sentence=words)
    expected = Reference.of(task, n, contestant.stabiliser, only=_given(found))
    wrong = []
    if expected.skipped:
        wrong.append(f"It skips {expected.skipped} of {expected.parameters} trainable parameters.")
    if expected.skipped == expected.parameters:
        return _verdict("WRONG", sentence=wrong[0])
    of_sum, place = expected.error(found)
    if not of_sum <= expected.tolerance:
        allowed = f"{expected.tolerance:.1e} is allowed"
        wrong.append(f"The relative error of {place} is {of_sum:.1e}, where {allowed}.")
    finite = of_sum if math.isfinite(of_sum) else None
    return _verdict("WRONG" if wrong else "exact", finite, " ".join(wrong) or None)


def trains(contestant: Contestant, task: Task) -> dict[str, Any]:
    """Which parameters a contestant trains, of those that the task asks for.

    Returns:
        ``parameters``: numbers that are trained, ``of``: that should be (each entry of a matrix is one);
        ``skipped``: the names of the parameters that are left out.

    Raises:
        Unsupported: the contestant refuses the model.
    """
    sizes = {name: p.numel() for name, p in _trainable(task.model())}
    given = _given(contestant.clipped_sum(1)) if contestant.clipped_sum else sizes.keys()
    skipped = [name for name in sizes if name not in given]
    asked = sum(sizes.values())
    return {"parameters": asked - sum(sizes[name] for name in skipped), "of": asked, "skipped": skipped}


def median_norm(task: Task, n: int) -> float:
    """The median norm of the first n examples' gradients: with it as C, half of them are clipped.

    1 where batch normalisation leaves no example a gradient of its own.
    """
    model = task.model()
    if _mixes(model):
        return 1.0
    return statistics.median(norm(grads.values()) for grads in single_gradients(task, model, n))


@dataclass(frozen=True)
class Reference:
    """What the first n examples' clipped sum should be.

    Attributes:
        total: by name, of the parameters that are not skipped.
        tolerance: an error up to it is explained by rounding: networks at random weights can amplify it, to
            some percent in BiT-ResNet. The measure is the relative difference between the sum of all single
            gradients and the gradient of the whole batch, both by ordinary autograd.
        skipped, parameters: tensors that were left out, and those that there are.
    """

    total: Grads
    tolerance: float
    skipped: int
    parameters: int

    @classmethod
    def of(
        cls, task: Task, n: int, stabiliser: float = 0.0, only: Collection[str] | None = None
    ) -> Reference:
        """From single examples, of which one at a time is held.

        Args:
            stabiliser: added to each norm before C is divided by it.
            only: parameters beside which all others count as frozen.
        """
        model = task.model()
        trainable = _trainable(model)
        kept = {name: p for name, p in trainable if only is None or name in only}
        clipped, plain = _zeros(kept), _zeros(kept)
        for grads in single_gradients(task, model, n):
            grads = {name: g for name, g in grads.items() if name in kept}
            factor = min(1.0, task.clip_norm / (norm(grads.values()) + stabiliser))
            for name, g in grads.items():
                clipped[name].add_(g, alpha=factor)
                plain[name].add_(g)
        task.loss_fn(model, _rows(task.batch, 0, n)).sum().backward()
        whole = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in kept.items()}
        rounding = distance(whole, plain)
        least = max(TOLERANCE.get(p.dtype, 1e-2) for p in model.parameters())
        tolerance = max(least, TOLERANCE_ROUNDING * rounding)
        return cls(clipped, tolerance, len(trainable) - len(kept), len(trainable))

    def error(self, found: dict[str, Any]) -> tuple[float, str]:
        """‖found − expected‖ / ‖expected‖, and of what.

        Of the whole clipped sum in float32. In float64 of the parameter where it is worst: one whose
        gradients are small, below a layer scale say, is lost in the whole.
        """
        if any(want.dtype != torch.float64 for want in self.total.values()):
            return distance(found, self.total), "the clipped sum"
        floor = FLOOR * norm(self.total.values())
        errors = {name: distance(found, {name: want}, floor) for name, want in self.total.items()}
        worst = max(errors, key=errors.__getitem__)
        return errors[worst], f"{worst} in the clipped sum"


@dataclass(frozen=True)
class InFloat64(Task):
    """A task in float64, where nothing but a wrong formula makes a difference; see `in_float64`."""

    def model(self) -> nn.Module:
        model = super().model().double()
        silence(model)
        wake(model)
        return model

    def batch_of(self, size: int, seed: int = 1) -> Any:
        return tree_map(lambda t: t.double() if t.is_floating_point() else t, super().batch_of(size, seed))


def in_float64(task: Task) -> InFloat64:
    """The task as a library is to be judged by it: in float64, nothing random or constant in the model.

    Its weights are others than those that are timed. A layer scale of 1e-6 or a head of zeros would hide
    whatever goes wrong below it.
    """
    return InFloat64(dataclasses.replace(task.case, precision="fp32"), task.clip_norm)


def silence(model: nn.Module) -> None:
    """Dropout and drop-path off: single examples would draw other masks than a batch."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and (name == "p" or "drop" in name):
                setattr(module, name, 0.0)


@torch.no_grad()
def wake(model: nn.Module) -> None:
    """Move parameters that start constant: a zero-initialised head hides every gradient below it."""
    for p in model.parameters():
        if p.numel() and p.is_floating_point() and p.std(correction=0) < 1e-3:
            p += 0.1 * torch.randn_like(p)


def single_gradients(task: Task, model: nn.Module, n: int) -> Iterator[Grads]:
    """The gradient of each of the first n examples, by name, of parameters that got one."""
    for row in range(min(n, len(tree_leaves(task.batch)[0]))):
        task.loss_fn(model, _rows(task.batch, row, row + 1)).sum().backward()
        yield {name: p.grad for name, p in _trainable(model) if p.grad is not None}
        model.zero_grad(set_to_none=True)


def norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all of them, in float64."""
    return sum(float(t.square().sum(dtype=torch.float64)) for t in tensors) ** 0.5


def distance(found: dict[str, Any], expected: Grads, floor: float = 0.0) -> float:
    """‖found − expected‖ / max(‖expected‖, floor); infinite where it is no number."""
    difference = norm(found[name].to(want) - want for name, want in expected.items())
    size = max(norm(expected.values()), floor)
    error = difference / size if size else difference
    return error if error == error else math.inf


def _verdict(verdict: str, error: float | None = None, sentence: str | None = None) -> dict[str, Any]:
    return {"verdict": verdict, "error_of_sum": error, "sentence": sentence}


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _mixes(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.training for module in model.modules())


def _given(found: dict[str, Any]) -> set[str]:
    return {name for name, total in found.items() if total is not None}


def _zeros(parameters: dict[str, nn.Parameter]) -> Grads:
    return {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}


def _rows(batch: Any, start: int, end: int) -> Any:
    return tree_map(lambda t: t[start:end], batch)
