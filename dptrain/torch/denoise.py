"""DiSK, a Kalman filter over private gradients: equations and privacy are in `dptrain.core.denoising`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dptrain.core import checks
from dptrain.core.denoising import filtered_variance, gain

from .guards import trainable
from .ranks import Ranks
from .release import PrivateGradient
from .shards import is_sharded

Tensors = dict[str, Tensor]


class Denoiser:
    """The filter of one training.

        with denoiser.ahead():                           # the model's weights are those of y_t
            clipped = clipped_grad(...)(batch)
        gradient = denoiser.filtered(privatize(clipped, ...))
        apply(optimizer, model, gradient)                # from x_t

    It keeps two tensors for each parameter, and a third while the weights are moved.

    Args:
        model: whose trainable parameters are filtered.
        kappa: the filter's gain, in (0, 1].

    Raises:
        TypeError, ValueError: kappa is no gain.
    """

    def __init__(self, model: nn.Module, kappa: float):
        self.model, self.kappa = model, gain(kappa)
        self.previous = {name: p.detach().clone() for name, p in self._parameters().items()}
        self.estimate = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self.previous.items()
        }
        self.taken = 0
        self.noise_variance: float | None = None
        self._here: Tensors | None = None
        self._looked: Tensors | None = None

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Within, the weights are those of the look-ahead point; afterwards, bit for bit, what they were."""
        self.put_back()
        here = {name: p.detach().clone() for name, p in self._parameters().items()}
        self._here = here
        try:
            if self.taken:
                with torch.no_grad():
                    for name, p in self._parameters().items():
                        p.copy_(self.previous[name].lerp(p, 1 / self.kappa))  # 1 + gamma = 1 / kappa
            yield
        finally:
            self.put_back()
        self._looked = here

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo a look ahead that was broken off, if one was."""
        if self._here is not None:
            for name, p in self._parameters().items():
                p.copy_(self._here[name])
            self._here = None

    @torch.no_grad()
    def filtered(self, gradient: PrivateGradient) -> PrivateGradient:
        """g_t of p_t, the private gradient at the look-ahead point.

        Raises:
            TypeError: not a private gradient.
            RuntimeError: no gradient was taken `ahead` since the last.
        """
        if not isinstance(gradient, PrivateGradient):
            raise TypeError(
                f"a Denoiser filters a PrivateGradient and was given {type(gradient).__name__}: pass the "
                "clipped sum through privatize first."
            )
        if self._looked is None:
            raise RuntimeError(
                "a Denoiser filters gradients that were taken at its look-ahead point: clip within `with "
                "denoiser.ahead():`."
            )
        kappa = self.kappa if self.taken else 1.0
        variance = gradient.noise_variance
        if self.taken and variance is not None and self.noise_variance is not None:
            variance = filtered_variance(self.noise_variance, variance, kappa)
        elif self.taken:
            variance = None
        self.previous, self._looked = self._looked, None
        self.noise_variance, self.taken = variance, self.taken + 1
        return gradient.map(lambda name, g: self.estimate[name].lerp_(g, kappa).clone(), variance)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, to be saved with model and optimizer."""
        tensors = {"previous": self.previous, "estimate": self.estimate}
        return {**tensors, "taken": self.taken, "noise_variance": self.noise_variance}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            KeyError, TypeError, ValueError: it is incomplete, or of another model.
        """
        taken, variance = checks.whole("taken", state["taken"], minimum=0), state["noise_variance"]
        if variance is not None:
            variance = checks.non_negative("noise_variance", variance)
        own = {"previous": self.previous, "estimate": self.estimate}
        if any(_described(state[kind]) != _described(tensors) for kind, tensors in own.items()):
            raise ValueError("the filter's state is of another model.")
        for kind, tensors in own.items():
            for name, tensor in tensors.items():
                tensor.copy_(state[kind][name])
        self.taken, self.noise_variance = taken, variance

    def check(self, model: nn.Module) -> None:
        """Whether it can filter the gradients of `model`.

        Raises:
            ValueError: it was made for another model, or the model's parameters are sharded.
        """
        if self.model is not model or self.previous.keys() != self._parameters().keys():
            raise ValueError(
                "the Denoiser is of another model, or of other parameters than are trained now: make it "
                "after freezing and moving the model."
            )
        if any(map(is_sharded, self._parameters().values())):
            raise ValueError("a Denoiser is not for models that are sharded by fully_shard: leave it out.")

    def share(self, ranks: Ranks) -> None:
        """Rank 0's state on all ranks. Called by all."""
        ranks.share((*self.previous.values(), *self.estimate.values()))
        self.taken, self.noise_variance = ranks.tell([self.taken, self.noise_variance])

    def _parameters(self) -> Tensors:
        return trainable(self.model)


def _described(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (t.shape, t.dtype) for name, t in tensors.items()}
