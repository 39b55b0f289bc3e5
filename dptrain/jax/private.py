"""``make_private``: a model, an optimizer and a data set, trained under differential privacy."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dptrain.core import checks
from dptrain.core.clip_rules import ClipRule, Flat
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.quantile import FollowedClipNorm, followed, released
from dptrain.core.release import Step, check_dataset_size
from dptrain.core.releases import NotTheSame, Releases, releases_of
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batches
from dptrain.core.shared_releases import SharedReleases
from dptrain.core.spec import StepSpec

from .accumulate import Accumulator
from .clipping import clipped_grad
from .correlated import CorrelatedNoise
from .hosts import Processes, check_the_same, own_rows
from .placement import Placement, placement
from .release import OfAnyStep, check_noise_is_known, private, privatize, refuse_what_is_for_torch


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
        releases: Releases | SharedReleases,
        taken: int,
        place: Placement | None = None,
        follow: FollowedClipNorm | None = None,
    ):
        self.mechanism, self.physical_batch_size, self.masked = mechanism, physical_batch_size, masked
        options = {} if place is None else {"mesh": place.mesh, "shard_params": place.shard_params}
        self._follow = follow
        rules = [self._rule(spec) for spec, _ in mechanism.segments]
        clipped = clipped_grad(loss_fn, clip_norm=rules[0], method=method, **options)
        for rule in rules:
            clipped.rule = rule  # one that cannot take the first one's place is refused now
        self.accumulator = Accumulator(clipped)
        chain = private(optimizer)
        self._data, self._releases, self._taken, self._place = dataset, releases, taken, place

        def apply(params: Any, state: Any, gradient: OfAnyStep) -> tuple:
            updates, state = chain.update(gradient.gradient(), state, params)
            return optax.apply_updates(params, updates), state

        if place is None:
            self.params = jax.tree.map(jax.numpy.array, params)
            self.optimizer_state = chain.init(self.params)
            self._apply = jax.jit(apply, donate_argnums=(0, 1))
        else:
            self.params = place.copied(params)
            shards = place.on_mesh(place.shards(jax.eval_shape(chain.init, self.params)))
            self.optimizer_state = jax.jit(chain.init, out_shardings=shards)(self.params)
            where = place.on_mesh(place.params(self.params)), shards
            self._apply = jax.jit(apply, donate_argnums=(0, 1), out_shardings=where)

    @property
    def taken(self) -> int:
        """Steps that the parameters have taken; save it with them."""
        return self._taken

    @property
    def clip_norm(self) -> float:
        """Of the next step. Where it follows a quantile, save it with the parameters: it is public."""
        if self._follow is not None:
            return self._follow.clip_norm
        return self.mechanism.step(min(self._taken, self.mechanism.steps - 1)).sensitivity

    def _rule(self, spec: StepSpec) -> ClipRule:
        """By which a step's gradients are clipped."""
        return Flat(self._follow.clip_norm) if self._follow else spec.clip_rule

    @property
    def epsilon(self) -> float:
        """Spent so far, at the mechanism's delta, by all releases on record."""
        return self.mechanism.epsilon(steps=self._releases.count)

    def steps(self) -> Iterator[Step]:
        """Train: one item per logical step, ends after ``mechanism.steps`` releases."""
        total, known = self.mechanism.steps, self.mechanism.delta is not None
        if self._place is not None:  # what was saved may have been put in place of the first ones
            self.params = self._place.put_params(self.params)
            self.optimizer_state = self._place.put_shards(self.optimizer_state)
        noise, taken = self._correlated(), self._taken
        while self._releases.may_go_on(taken):
            if taken != self._taken:  # this loop's correlated noise would be that of other steps
                raise RuntimeError("another loop has taken steps of this training: begin a new one to go on.")
            spec, follow = self.mechanism.step(taken), self._follow
            self.accumulator.clipped.rule = self._rule(spec)
            sums, centred = self.accumulator.zeros(self.params), 0.0
            for batch, mask in self._batches(spec):
                sums = self.accumulator.add(sums, self.params, batch, mask=mask)
                if follow:
                    centred += follow.centred(own_rows(sums.norms)[mask])
            key = self._releases.key.child("noise", self._taken)
            sum_spec = follow.step(spec) if follow else spec
            gradient = privatize(self.accumulator.finish(sums), sum_spec, key, donate=True, noise=noise)
            moved = self._moved(follow, centred, spec, key) if follow else None
            try:
                self._releases.before(self._taken, spec, released(gradient.on_host, moved))
            except NotTheSame:  # nothing of it was used
                self._releases.draw_afresh()
                continue
            if follow:
                follow.clip_norm = moved
            self._taken = taken = taken + 1
            self.params, self.optimizer_state = self._apply(
                self.params, self.optimizer_state, OfAnyStep(gradient)
            )
            spent = self.mechanism.epsilon_so_far(self._releases.count) if known else None
            yield Step(self._taken, total, spent)

    def _moved(self, follow: FollowedClipNorm, centred: float, spec: StepSpec, key: Key) -> float:
        """The clip norm of the next step. `centred` is of this process's rows, and a multiple of 1/2."""
        if self._place is not None and self._place.has_others:
            centred = Processes().total(round(2 * centred)) / 2
        return follow.moved(centred, spec, key)

    def _correlated(self) -> CorrelatedNoise | None:
        """The noise of the steps so far, of a mechanism whose noise is correlated."""
        spec = self.mechanism.step(0)
        if spec.correlation is None:
            return None
        key = self._releases.key
        return CorrelatedNoise(spec.correlation, self._taken, lambda index: key.child("noise", index))

    def _batches(self, spec: StepSpec) -> Iterator[tuple[Any, np.ndarray]]:
        sampler = LogicalSampler(examples(self._data), spec.sampling, self._releases.key.child("sampling"))
        place, size = self._place, self.physical_batch_size
        if place is not None:
            size *= place.devices
        for piece in physical_batches(sampler.sample(self._taken), size):
            if place is not None:
                own = place.own_rows(size)
                piece = PhysicalBatch(piece.indices[own], piece.mask[own])
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
    mesh: Mesh | None = None,
    shard_params: bool = False,
    clip_norm: float | None = None,
) -> PrivateTraining:
    """Train parameters with an optax optimizer under differential privacy.

    Args:
        loss_fn: ``loss_fn(params, example) -> scalar``.
        params: a tree of floating-point arrays, which is copied and not changed.
        optimizer: of optax; it sees private gradients only.
        dataset: a tree of arrays with the examples on the leading axis, or anything with ``len`` whose items
            are examples.
        mechanism: what is promised; its steps are taken and no more.
        physical_batch_size: examples computed at once, by each device.
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
        mesh: on whose devices to train. The sample and its noise do not depend on their number. Noisy
            gradients and the optimizer's state lie in shards, parameters on each device. In several processes
            (``jax.distributed``), each passes the same, but the ledger, and the key that counts, are
            those of process 0: the others learn the key from it and pass no ledger. Each reads the
            examples of its own devices.
        shard_params: the parameters lie in shards as well.
        clip_norm: of a mechanism whose clip norm follows a quantile: what ``PrivateTraining.clip_norm`` was
            when the parameters were saved.

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
    refuse_what_is_for_torch(mechanism)
    check_dataset_size(mechanism, size)
    if mesh is not None and not masked:
        raise ValueError("masked=False is for one device: on a mesh all have batches of one shape.")
    if mechanism.is_correlated:
        check_noise_is_known(optimizer, params)
    place, follow = placement(mesh, shard_params), followed(mechanism, clip_norm)
    # No batch is ever larger.
    most = size if place is None else -(-size // place.devices)
    physical_batch_size = min(checks.whole("physical_batch_size", physical_batch_size), most)
    releases: Releases | SharedReleases
    if place is not None and place.has_others:
        said = zlib.crc32(repr((mechanism, method, shard_params)).encode())
        check_the_same(
            "sizes of data set and physical batch, steps taken and mechanism (a checksum of it)",
            (size, physical_batch_size, taken, said),
        )
        if follow is not None:
            follow.clip_norm = Processes().tell(follow.clip_norm)
        releases = SharedReleases(lambda: releases_of(mechanism, ledger, key, taken), Processes())
    else:
        releases = releases_of(mechanism, ledger, key, taken)
    return PrivateTraining(
        loss_fn,
        params,
        optimizer,
        dataset,
        mechanism,
        physical_batch_size,
        method,
        masked,
        releases,
        taken,
        place,
        follow,
    )
