"""What a run leaves out of its gradients: before clipping, what is public; after the noise, anything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dptrain.core.entropy import Key
from dptrain.data import Batch
from dptrain.optim.compression import ErrorFeedback, projected, top_k
from dptrain.optim.wire import Wire, wire
from dptrain.torch import PrivateGradient
from dptrain.torch.guards import trainable
from dptrain.torch.noise import noisy_mean
from dptrain.torch.projections import Projection, at_random, first_axes, largest, principal, whole
from dptrain.torch.public import mean_gradient, single_gradients
from dptrain.torch.ranks import ALONE
from dptrain.torch.subspace import LossFn, Restricted
from dptrain.training.config import KNOWN_BEFORE, LEAKY, PUBLIC_GRADIENT, PUBLIC_SUBSPACE, RANDOM
from dptrain.training.prepare import Run

PIECE = 256
"""Public examples that are computed at once."""


class Compressor:
    """The compression of one run.

    Attributes:
        loss: what is to be clipped: the run's loss, restricted to the step's projections if they act before
            clipping.
        ranks: that must agree on what is kept.
        memory: by parameter name, what error feedback remembers; empty without it.
    """

    def __init__(self, run: Run, loss: LossFn, views: Callable[[Batch], Batch]) -> None:
        """views: makes of a batch what the loss takes."""
        self._views = views
        self.run, self.name, self.ranks = run, run.config.compress, ALONE
        self._plain = loss
        self._projections: dict[str, Projection] = self._stand_ins()
        self._restricted = (
            Restricted(loss, self._projections) if run.config.compress_before_clipping else None
        )
        self._feedback = ErrorFeedback(trainable(run.learner)) if run.config.error_feedback else None
        self.memory: dict[str, Tensor] = self._feedback.memory if self._feedback else {}

    @property
    def loss(self) -> LossFn:
        return self._restricted or self._plain

    @property
    def decides_before(self) -> bool:
        """Whether it is known before a step what that keeps."""
        return self.name in KNOWN_BEFORE

    def try_out(self) -> None:
        """Meet what cannot be done with the public examples before a run begins.

        Raises Refused for a model that gives no gradients of single examples.
        """
        if self.name == PUBLIC_SUBSPACE:
            with torch.random.fork_rng():
                single_gradients(self.run.learner, self._plain, itertools.islice(self._public(), 1))

    def before(self, key: Key) -> None:
        """Decide what this step keeps, where that is public. Called by all ranks, with the weights of the
        step.

        key: the step's own.
        """
        if self.name in PUBLIC_GRADIENT:
            gradient = mean_gradient(self.run.learner, self._plain, self._public())
            self.ranks.share(gradient.values())  # the same bits, hence the same masks
            of_all = self.name == "public-global-topk"
            self._projections = {**largest(gradient, self.run.config.keep, of_all=of_all)}
        elif self.name == PUBLIC_SUBSPACE:
            each = single_gradients(self.run.learner, self._plain, self._public())
            found = principal(each, self.run.config.subspace_rank, key.child("subspace"))
            self.ranks.share(one.basis for one in found.values())
            self._projections = {**found}
        elif self.name == RANDOM:
            like = trainable(self.run.learner)
            self._projections = {**at_random(like, self.run.config.keep, key.child("random-k"))}
        if self._restricted is not None:
            self._restricted.projections = self._projections

    def after(self, gradient: PrivateGradient, index: int, key: Key) -> PrivateGradient:
        """What the optimizer gets of the gradient of step `index`, which has been released.

        key: as for `before`.
        """
        if self.name == "none":
            return gradient
        if self.name == LEAKY:
            return self._leaked(gradient, index, key.child("leaky"))
        if self._feedback is not None:
            return self._feedback(gradient, self._compressed)
        return self._compressed(gradient)

    def wire(self) -> Wire:
        """What a step sends."""
        shapes = {name: tuple(p.shape) for name, p in trainable(self.run.learner).items()}
        if self.name == "none":
            return wire(shapes, None, known=True)
        kept = sum(p.size for p in self._stand_ins(counting=True).values())
        return wire(shapes, kept, known=self.decides_before, remembers=self._feedback is not None)

    def _compressed(self, gradient: PrivateGradient) -> PrivateGradient:
        if self.name in ("topk", "global-topk"):
            return top_k(gradient, self.run.config.keep, of_all=self.name == "global-topk")
        return projected(gradient, self._projections)

    def _leaked(self, gradient: PrivateGradient, index: int, key: Key) -> PrivateGradient:
        """The mask of the private gradient itself, on a noisy copy of it: no guarantee whatever the noise.

        The gradient was released without noise, as its ledger says; what is done to it here, for the sake of
        the comparison, protects nothing.
        """
        assert self.run.in_vain is not None
        spec = self.run.in_vain.step(index)
        noisy = noisy_mean(gradient.grads, spec.noise_stddev / spec.expected_batch_size, 1.0, key)
        masks = largest(gradient.grads, self.run.config.keep)
        return projected(gradient.map(lambda name, _: noisy[name]), masks)

    def _public(self) -> Iterator[Batch]:
        """All public examples, a few at a time."""
        assert self.run.public is not None
        for piece in torch.arange(len(self.run.public)).split(PIECE):
            yield self._views(self.run.public.gather(piece))

    def _stand_ins(self, counting: bool = False) -> dict[str, Projection]:
        """Projections of the kind that each step will have; of its size too, if they are to be counted."""
        like = {name: p.detach() for name, p in trainable(self.run.learner).items()}
        if self.name == PUBLIC_SUBSPACE:
            rank = min(self.run.config.subspace_rank, len(self.run.public or ()))
            return {**first_axes(like, rank)}
        if counting:
            of_all = self.name.endswith("global-topk")
            return {**largest(like, self.run.config.keep, of_all=of_all)}
        return {**whole(like)}
