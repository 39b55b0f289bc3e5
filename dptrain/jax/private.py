"""``make_private``: a model, an optimizer and a data set, trained under differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dptrain.core import checks
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.release import Step, check_dataset_size
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batches

from .accumulate import Accumulator
from .clipping import clipped_grad
from .release import PrivateGradient, private, privatize


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
        key: Key,
        masked: bool,
    ):
        self.params, self.mechanism = jax.tree.map(jax.numpy.array, params), mechanism
        self.physical_batch_size, self.masked = physical_batch_size, masked
        self.accumulator = Accumulator(clipped_grad(loss_fn, clip_norm=mechanism.clip_norm, method=method))
        chain = private(optimizer)
        self.optimizer_state = chain.init(self.params)
        self._data, self._key, self._taken = dataset, key, 0

        def apply(params: Any, state: Any, gradient: PrivateGradient) -> tuple:
            updates, state = chain.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self._apply = jax.jit(apply, donate_argnums=(0, 1))

    @property
    def epsilon(self) -> float:
        """Spent so far, at the mechanism's delta."""
        return self.mechanism.epsilon(steps=self._taken)

    def steps(self) -> Iterator[Step]:
        """Train: one item per logical step, ends after ``mechanism.steps``."""
        total = self.mechanism.steps
        while self._taken < total:
            spec = self.mechanism.step(self._taken)
            clipped = self.accumulator(self.params, self._batches(spec))
            key = self._key.child("noise", self._taken)
            gradient = privatize(clipped, spec, key, donate=True)
            self._taken += 1  # the budget is spent when the noisy gradient exists
            self.params, self.optimizer_state = self._apply(self.params, self.optimizer_state, gradient)
            known = self.mechanism.delta is not None
            yield Step(self._taken, total, self.mechanism.epsilon_so_far(self._taken) if known else None)

    def _batches(self, spec: Any) -> Iterator[tuple[Any, np.ndarray]]:
        sampler = LogicalSampler(examples(self._data), spec.sampling, self._key.child("sampling"))
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
    check_dataset_size(mechanism, size)
    # No batch is ever larger.
    physical_batch_size = min(checks.whole("physical_batch_size", physical_batch_size), size)
    if key is not None and not isinstance(key, Key):
        raise TypeError("key must be a dptrain.core.entropy.Key: Key.from_entropy() makes one.")
    key = key or Key.from_entropy()
    return PrivateTraining(
        loss_fn, params, optimizer, dataset, mechanism, physical_batch_size, method, key, masked
    )
