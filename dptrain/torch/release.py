"""From a clipped sum to a private gradient, and from that to a step. The only door.

What is released is a ``PrivateGradient``, and an optimizer step accepts nothing else; only
``privatize`` makes one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.noise import Span
from dptrain.core.release import step_to_release
from dptrain.core.spec import StepSpec

from .clipped_sum import ClippedSum
from .correlated import CorrelatedNoise
from .fsdp import reshard
from .guards import trainable
from .noise import noisy_mean, noisy_mean_on_grid
from .ranks import lost_ranks
from .reduction import Reduction
from .sections import section
from .shards import is_sharded, like, local, span_of

_DOOR = object()


class PrivateGradient:
    """A noisy mean gradient: safe to look at, to store and to post-process.

    Attributes:
        grads: by parameter name, ``(clipped sum + noise) / L``, in float32 or better; of a model under FSDP
            sharded as its parameters are.
        spec: the step of the mechanism that it spends.
        reproducible: whether its noise can be recomputed from a seed, which voids the guarantee
            against whoever knows the seed.
        noise_variance: of the noise in each coordinate of `grads`, which is public; None where it is not
            known.
    """

    __slots__ = ("grads", "noise_variance", "reproducible", "spec")

    def __init__(
        self,
        grads: dict[str, Tensor],
        spec: StepSpec,
        reproducible: bool,
        noise_variance: float | None = None,
        door: Any = None,
    ):
        if door is not _DOOR:
            raise TypeError("only dptrain.torch.privatize makes a PrivateGradient.")
        self.grads, self.spec, self.reproducible = grads, spec, reproducible
        self.noise_variance = noise_variance

    def on_host(self) -> dict[str, np.ndarray]:
        """By parameter name, as NumPy arrays; of sharded ones this rank's part."""
        return {name: local(g).detach().cpu().numpy() for name, g in self.grads.items()}

    def map(self, function, noise_variance: float | None = None) -> PrivateGradient:
        """Post-process each gradient: ``function(name, gradient) -> gradient``.

        noise_variance: of the result's noise, if you know it; optimizers that must know it refuse it else.
        """
        grads = {name: function(name, g) for name, g in self.grads.items()}
        return PrivateGradient(grads, self.spec, self.reproducible, noise_variance, _DOOR)


def privatize(
    clipped_sum: ClippedSum,
    mechanism: Mechanism | StepSpec,
    key: Key,
    *,
    donate: bool = False,
    noise: CorrelatedNoise | None = None,
) -> PrivateGradient:
    """Add the step's noise to a clipped sum and divide by the public expected batch size.

    ``(sum_b clip(g_b) + N(0, (sigma C)^2 I)) / L``: Abadi et al. 2016, algorithm 1. L is the
    mechanism's, never the number of examples that were sampled (rule 2). Of a hardened mechanism, sum
    and noise are integers, and the result is float32.

    Args:
        clipped_sum: of a whole logical batch, or this rank's share of it; its buffers are not changed, unless
            donated.
        mechanism: a constant mechanism, or the specification of this step.
        key: this step's own, for example ``run_key.child("noise", step)``: a key that is used
            twice repeats its noise.
        donate: give the sum's buffers away to the gradient, which saves the time and the memory of
            new ones; the sum is empty afterwards.
        noise: of a mechanism whose noise is correlated: that of its earlier steps, to which this one's is
            added. The gradient has to be used, or the run to end.

    Raises:
        TypeError: not a clipped sum, a mechanism or a key.
        ValueError: the sum was clipped to another norm or lies on another grid than the mechanism says, or
            was given away; or its noise is correlated and that of earlier steps is missing.
    """
    if not isinstance(clipped_sum, ClippedSum):
        raise TypeError(f"privatize takes a ClippedSum, and was given {type(clipped_sum).__name__}.")
    if not isinstance(key, Key):
        raise TypeError("privatize needs a dptrain.core.entropy.Key: Key.from_entropy() makes one.")
    spec = step_to_release(mechanism, clipped_sum.clip_norm, clipped_sum.grid)
    sums = clipped_sum.grads
    if not sums:
        raise ValueError("the sum is empty: it was given away to an earlier gradient, or its step failed.")
    if spec.correlation != (None if noise is None else noise.coefficients):
        raise ValueError(
            "a mechanism of correlated noise needs a CorrelatedNoise of its coefficients, and only such one."
        )
    draw = _Draw(spec, key, noise)
    if clipped_sum.reduction is not None:
        mean = _shared_mean(clipped_sum.reduction, sums, draw)
    elif any(map(is_sharded, sums.values())):
        mean = _sharded_mean(sums, draw, donate)
    else:
        mean = draw(sums, _separate(sums) if donate and spec.grid is None else None)
    if donate:
        sums.clear()
        if clipped_sum.reduction is not None:
            clipped_sum.reduction.give_back()
    variance = spec.mean_noise_variance if noise is None else None  # it changes with the steps
    return PrivateGradient(mean, spec, key.reproducible, variance, _DOOR)


@dataclass(frozen=True)
class _Draw:
    """The noise of one step, added to a part of its sum."""

    spec: StepSpec
    key: Key
    correlated: CorrelatedNoise | None

    def __call__(
        self,
        sums: dict[str, Tensor],
        out: dict[str, Tensor] | None = None,
        spans: dict[str, Span] | None = None,
    ) -> dict[str, Tensor]:
        """The noisy means, in ``out`` or new tensors."""
        spec, key = self.spec, self.key
        stddev, batch_size = spec.noise_stddev, spec.expected_batch_size
        with section("noise"):
            if self.correlated is not None:
                drawn = self.correlated.next(sums, spec, key, spans)
                return {name: torch.add(drawn[name], g, alpha=1 / batch_size) for name, g in sums.items()}
            if spec.grid is not None:
                return noisy_mean_on_grid(sums, stddev, spec.grid, batch_size, key, spans)
            return noisy_mean(sums, stddev, batch_size, key, out, spans)


def _shared_mean(reduction: Reduction, sums: dict[str, Tensor], draw: _Draw) -> dict[str, Tensor]:
    """Each rank draws the noise of its part, of the sum over all ranks."""
    with section("reduce"):
        shares = reduction.reduced(sums)
    own = {name: part for share in shares for name, part in share.sums.items()}
    spans = {name: span for share in shares for name, span in share.spans.items()}
    means = draw(own, own if draw.spec.grid is None else None, spans)
    with section("reduce"):
        return reduction.gathered([{name: means[name] for name in share.sums} for share in shares])


def _sharded_mean(sums: dict[str, Tensor], draw: _Draw, donate: bool) -> dict[str, Tensor]:
    """Each rank draws the noise of its shards."""
    own = {name: local(total) for name, total in sums.items()}
    drawn = {name: part for name, part in own.items() if part.numel()}
    spans = {name: span_of(sums[name]) for name in drawn}
    means = own | draw(drawn, drawn if donate and draw.spec.grid is None else None, spans)
    return {name: like(total, means[name]) for name, total in sums.items()}


def _separate(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums, and a new tensor instead of each that may share memory with another or with itself."""
    users = Counter(total.untyped_storage().data_ptr() for total in sums.values())
    return {
        name: total
        if total.is_contiguous() and users[total.untyped_storage().data_ptr()] == 1
        else torch.empty_like(total)
        for name, total in sums.items()
    }


def apply(optimizer: torch.optim.Optimizer, model: nn.Module, gradient: PrivateGradient) -> None:
    """Take an optimizer step with a private gradient; ``.grad`` fields are empty afterwards.

    An optimizer whose parameter groups have a ``noise_variance`` is told that of the gradient, for this step
    alone (`dptrain.optim.adam_bc`).

    Raises:
        TypeError: anything but a ``PrivateGradient``.
        ValueError: the gradient is for other parameters than the model's trainable ones.
        RankLost: the optimizer shares its state among ranks, and one has ended.
    """
    if not isinstance(gradient, PrivateGradient):
        raise TypeError(
            f"an optimizer step takes a PrivateGradient and was given {type(gradient).__name__}: "
            "pass the clipped sum through privatize first."
        )
    reshard(model)
    parameters = trainable(model)
    if parameters.keys() != gradient.grads.keys():
        raise ValueError("the private gradient is for other parameters than the model's trainable ones.")
    informed = [group for group in optimizer.param_groups if "noise_variance" in group]
    for name, p in parameters.items():
        p.grad = _like(p, gradient.grads[name])
    try:
        for group in informed:
            group["noise_variance"] = gradient.noise_variance
        with section("optimizer step"), lost_ranks():  # ZeroRedundancyOptimizer sends weights around
            optimizer.step()
    finally:
        for p in parameters.values():
            p.grad = None
        for group in informed:
            group["noise_variance"] = None


def _like(p: Tensor, gradient: Tensor) -> Tensor:
    """The gradient itself where type and strides are the parameter's: torch's fused SGD on a CPU takes
    both for equal without a look."""
    if gradient.dtype == p.dtype and gradient.stride() == p.stride():
        return gradient
    return torch.empty_like(p, requires_grad=False).copy_(gradient)
