"""``make_private``: a model, an optimizer and a data set, trained under differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dptrain.core import checks
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.release import Step, check_dataset_size
from dptrain.core.releases import NotTheSame, Releases, releases_of
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batches

from .accumulate import Accumulator
from .clipping import clipped_grad
from .release import PrivateGradient, private, privatize, refuse_grid


class PrivateTraining:
    """What ``make_private`` returns. ``steps()`` trains.

    Attributes:
        params, optimizer_state: as they are after the steps taken so far. A step gives their memory to the
            next ones: copy what is to outlive it.
    """

    def __init__(
        self,
        loss_fn: Callable,
        params: Any,
        optimizer: optax.GradientTransformation,
        dataset: Any,
        mechanism: Mechanism,
        physical_batch_size: int,
        method: str,
        masked: bool,
        releases: Releases,
        taken: int,
    ):
        self.params, self.mechanism = jax.tree.map(jax.numpy.array, params), mechanism
        self.physical_batch_size, self.masked = physical_batch_size, masked
        self.accumulator = Accumulator(clipped_grad(loss_fn, clip_norm=mechanism.clip_norm, method=method))
        chain = private(optimizer)
        self.optimizer_state = chain.init(self.params)
        self._data, self._releases, self._taken = dataset, releases, taken

        def apply(params: Any, state: Any, gradient: PrivateGradient) -> tuple:
            updates, state = chain.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self._apply = jax.jit(apply, donate_argnums=(0, 1))

    @property
    def taken(self) -> int:
        """Steps that the parameters have taken; save it with them."""
        return self._taken

    @property
    def epsilon(self) -> float:
        """Spent so far, at the mechanism's delta, by all releases on record."""
        return self.mechanism.epsilon(steps=self._releases.count)

    def steps(self) -> Iterator[Step]:
        """Train: one item per logical step, ends after ``mechanism.steps`` releases."""
        total, known = self.mechanism.steps, self.mechanism.delta is not None
        while self._releases.may_go_on(self._taken):
            spec = self.mechanism.step(self._taken)
            clipped = self.accumulator(self.params, self._batches(spec))
            key = self._releases.key.child("noise", self._taken)
            gradient = privatize(clipped, spec, key, donate=True)
            try:
                self._releases.before(self._taken, spec, gradient.on_host)
            except NotTheSame:  # nothing of it was used
                self._releases.draw_afresh()
                continue
            self._taken += 1
            self.params, self.optimizer_state = self._apply(self.params, self.optimizer_state, gradient)
            spent = self.mechanism.epsilon_so_far(self._releases.count) if known else None
            yield Step(self._taken, total, spent)

    def _batches(self, spec: Any) -> Iterator[tuple[Any, np.ndarray]]:
        sampler = LogicalSampler(examples(self._data), spec.sampling, self._releases.key.child("sampling"))
        for piece in physical_batches(sampler.sample(self._taken), self.physical_batch_size):
            if not self.masked and piece.mask.any():
                piece = PhysicalBatch(piece.indices[piece.mask], piece.mask[piece.mask])
            yield gather(self._data, piece.indices), piece.mask


def examples(dataset: Any) -> int:
    """Their number."""
    return len(jax.tree.leaves(dataset)[0]) if is_tree_of_arrays(dataset) else len(dataset)


def gather(dataset: Any, indices: np.ndarray) -> Any:
    """The examples at these indices, stacked."""
    if is_tree_of_arrays(dataset):
        return jax.tree.map(lambda x: x[indices], dataset)
    return jax.tree.map(lambda *x: np.stack(x), *[dataset[int(i)] for i in indices])


def is_tree_of_arrays(dataset: Any) -> bool:
    """A list is a sequence of examples; a dictionary, a tuple or an array is the whole in arrays."""
    if not isinstance(dataset, Mapping | tuple) and not hasattr(dataset, "dtype"):
        return False
    leaves = jax.tree.leaves(dataset)
    return bool(leaves) and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves)


def make_private(
    loss_fn: Callable,
    params: Any,
    optimizer: optax.GradientTransformation,
    dataset: Any | Sequence,
    mechanism: Mechanism,
    *,
    physical_batch_size: int,
    method: str = "auto",
    masked: bool = True,
    key: Key | None = None,
    ledger: Ledger | None = None,
    taken: int = 0,
) -> PrivateTraining:
    """Train parameters with an optax optimizer under differential privacy.

    Args:
        loss_fn: ``loss_fn(params, example) -> scalar``.
        params: a tree of floating-point arrays, which is copied and not changed.
        optimizer: of optax; it sees private gradients only.
        dataset: a tree of arrays with the examples on the leading axis, or anything with ``len`` whose items
            are examples.
        mechanism: what is promised; its steps are taken and no more.
        physical_batch_size: examples computed at once.
        method: clipping method.
        masked: fill the last physical batch up and mask what is too many, so that one compilation serves the
            whole run. Without, each new size is compiled: the naive way, kept for comparison.
        key: the run's secret; fresh from the operating system's entropy by default.
        ledger: where each release is recorded before it is made: ``dptrain.core.ledger.Ledger.create``, or
            ``Ledger.open`` of a run that was interrupted.
        taken: steps that what is passed has taken already, when it was saved (put the optimizer's state back
            into ``optimizer_state``). What the ledger has beyond them is lost, and paid for: with a key of
            one's own it is repeated if it comes out the same bit for bit, else drawn afresh, and the
            training ends earlier.

    Raises:
        TypeError, ValueError: in one sentence, before any budget is spent.
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError("mechanism must be a dptrain.Mechanism: Mechanism.calibrate(...) makes one.")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; pass one of optax.")
    if not is_tree_of_arrays(dataset) and not (
        hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    ):
        raise TypeError(
            "an iterable data set cannot be Poisson-sampled: use arrays, or one with __getitem__ and __len__."
        )
    sizes = {len(x) for x in jax.tree.leaves(dataset)} if is_tree_of_arrays(dataset) else {len(dataset)}
    if len(sizes) != 1:
        raise ValueError(f"the arrays of the data set hold different numbers of examples: {sorted(sizes)}.")
    (size,) = sizes
    refuse_grid(mechanism)
    check_dataset_size(mechanism, size)
    # No batch is ever larger.
    physical_batch_size = min(checks.whole("physical_batch_size", physical_batch_size), size)
    releases = releases_of(mechanism, ledger, key, taken)
    return PrivateTraining(
        loss_fn, params, optimizer, dataset, mechanism, physical_batch_size, method, masked, releases, taken
    )
