"""The steps of a run on the JAX engine.

The PyTorch model owns the weights before and after: it loads, scores and saves them. In between they are JAX
arrays with the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from torch import nn

from dptrain import jax as dpj
from dptrain.core.clip_rules import ClipRule, Flat
from dptrain.core.entropy import Key
from dptrain.core.quantile import FollowedClipNorm, followed, released
from dptrain.core.spec import StepSpec
from dptrain.jax.clipped_sum import PartialSum
from dptrain.jax.release import OfAnyStep
from dptrain.models.jax import translated
from dptrain.optim.averaging import warmed_decay
from dptrain.optim.wire import Wire, wire
from dptrain.optim.with_optax import build_optax
from dptrain.torch.physical_batch import Trial
from dptrain.training.config import ConfigError
from dptrain.training.learner import State, Tensors, put, under
from dptrain.training.loop import BeforeRelease, Step, augmented, pieces, random_state, unprotected
from dptrain.training.prepare import Run

#: the physical batch size of ``auto``: how many of them are computed at once, the engine measures by itself
PHYSICAL_BATCH_SIZE = 32

PRODUCTS = {"fp32": "highest", "tf32": "tensorfloat32", "bf16": "default"}
"""JAX's names for what may be done to float32 products; by default a GPU would take TF32."""


class JaxLearner:
    """The JAX engine: one physical step, compiled once for the run, and one logical step.

    Raises ModelError for a model that there is no function for JAX of, ConfigError for a device that is not
    there.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run, self.taken, self.is_whole, self.size = run, 0, True, 0
        self.forward = translated(run.learner, config.model, run.train.num_classes, run.train.input_shape)
        own = dict(run.learner.named_parameters())
        devices = _devices(config.device, config.devices)
        self.device = devices[0]
        if config.precision == "tf32" and self.device.platform != "gpu":
            raise ConfigError(
                f"--precision tf32 is for a GPU, and JAX runs on {self.device.device_kind} here."
            )
        with self._settings():
            arrays = {name: jnp.asarray(p.detach().cpu().numpy()) for name, p in own.items()}
        self.params = {name: x for name, x in arrays.items() if own[name].requires_grad}
        self.frozen = {name: x for name, x in arrays.items() if not own[name].requires_grad}
        steps = run.mechanism.steps
        built = (
            config.optimizer,
            config.lr,
            config.weight_decay,
            config.lr_schedule,
            steps,
            config.adam_floor,
        )
        self.optimizer = dpj.private(build_optax(*built))
        with self._settings():
            self.optimizer_state = self.optimizer.init(self.params)
            if config.denoise:
                self.optimizer_state = self.optimizer_state, dpj.denoise.begin(self.params)
            self.average = jax.tree.map(jnp.copy, self.params) if config.weight_average else None
        mesh = Mesh(np.array(devices), ("devices",)) if len(devices) > 1 else None
        self.follow = followed(run.mechanism) if run.is_private else None
        clipped = dpj.clipped_grad(
            self._loss,
            clip_norm=self._rule(run.mechanism.step(0)),
            method=run.method,
            batch_argnums=(1, 2),
            mesh=mesh,
        )
        self.accumulator = dpj.Accumulator(clipped)
        self.devices = len(devices)
        self._place = None if clipped.on_mesh is None else clipped.on_mesh.placement
        self._put_where_they_belong()
        where = None
        if self._place is not None:
            kept = self.params, self.optimizer_state, self.average
            where = jax.tree.map(lambda x: x.sharding, kept)
            self.frozen = self._place.put(self.frozen, jax.tree.map(lambda _: PartitionSpec(), self.frozen))
        self._ahead = jax.jit(
            partial(dpj.denoise.ahead, kappa=config.denoise), out_shardings=where and where[0]
        )
        self._apply = jax.jit(self._updated, donate_argnums=(0, 1, 2), out_shardings=where)

    def _loss(self, params: dict, image: Array, label: Array, frozen: dict) -> Array:
        everything = {**params, **frozen}
        if self.run.config.precision == "bf16":
            everything = jax.tree.map(lambda p: p.astype(jnp.bfloat16), everything)
            image = image.astype(jnp.bfloat16)
        one = lambda view: self.forward(everything, view).astype(jnp.float32)  # noqa: E731
        if self.run.config.augmentations:  # the mean over the views [K, ...]
            return -jnp.mean(jax.nn.log_softmax(jax.vmap(one)(image))[:, label])
        return -jax.nn.log_softmax(one(image))[label]

    def _updated(self, params: Any, state: Any, average: Any, of_any_step: OfAnyStep, decay: Array) -> tuple:
        gradient = of_any_step.gradient()
        if kappa := self.run.config.denoise:
            state, kept = state
            gradient, kept = dpj.denoise.filtered(gradient, params, kept, kappa)
        updates, state = self.optimizer.update(gradient, state, params)
        if kappa:
            state = state, kept
        params = optax.apply_updates(params, updates)
        if average is not None:
            average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
        return params, state, average

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Where things are computed, and how exactly."""
        precision = PRODUCTS[self.run.config.precision]
        with jax.default_device(self.device), jax.default_matmul_precision(precision):
            yield

    def get_ready(self, compiles: Callable[[], None]) -> tuple[int, list[Trial]]:
        run, size = self.run, self.run.config.physical_batch_size
        if size == "auto":
            smallest = min(spec.expected_batch_size for spec, _ in run.mechanism.segments)
            size = min(PHYSICAL_BATCH_SIZE, max(1, int(smallest)))
        compiles()
        self.size = size
        with self._settings():
            stand_in = _arrays(augmented(run, run.train.stand_in(size * self.devices)))
            zeros, everyone = self.accumulator.zeros(self.params), np.ones(size * self.devices, bool)
            self._add(zeros, self._point(), stand_in, everyone)
        return size, []

    def steps(self, key: Key, before_release: BeforeRelease) -> Iterator[Step]:
        taken = self._steps(key, before_release)
        while True:
            with self._settings():  # but not while the caller does something else
                step = next(taken, None)
            if step is None:
                return
            yield step

    def _steps(self, key: Key, before_release: BeforeRelease) -> Iterator[Step]:
        run = self.run
        batches = pieces(run, self.size * self.devices, key, self.taken)
        correlated = self._correlated(key)
        for index in range(self.taken, run.mechanism.steps):
            spec, follow = run.mechanism.step(index), self.follow
            self.accumulator.clipped.rule = self._rule(spec)
            total, parts, point = self.accumulator.zeros(self.params), [], self._point()
            centred = 0.0
            drawn = key.child("forward", index)
            for number, (batch, mask, is_last) in enumerate(batches):
                with random_state(drawn.child(number), torch.device("cpu")):
                    batch = augmented(run, batch)
                total = self._add(total, point, _arrays(batch), mask.cpu().numpy())
                if follow:
                    centred += follow.centred(np.asarray(total.norms)[mask.cpu().numpy()])
                if run.config.show_unprotected:
                    parts.append((_tensor(total.losses), _tensor(total.norms), mask.cpu()))
                if is_last:
                    break
            clipped = self.accumulator.finish(total)
            noise, sum_spec = key.child("noise", index), follow.step(spec) if follow else spec
            gradient = dpj.privatize(clipped, sum_spec, noise, donate=True, noise=correlated)
            moved = follow.moved(centred, spec, noise) if follow else None
            before_release(index, spec, released(gradient.on_host, moved))
            self.is_whole = False
            if follow:
                follow.clip_norm = moved
            # As torch's average: it begins with the weights after the first step.
            decay = jnp.float32(warmed_decay(run.config.weight_average, index) if index else 0.0)
            self.params, self.optimizer_state, self.average = self._apply(
                self.params, self.optimizer_state, self.average, OfAnyStep(gradient), decay
            )
            self.taken, self.is_whole = index + 1, True
            yield Step(self.taken, unprotected(parts, spec) if parts else None)

    def _correlated(self, key: Key) -> dpj.CorrelatedNoise | None:
        """The noise of the steps so far, of a mechanism whose noise is correlated."""
        spec = self.run.mechanism.step(0)
        if spec.correlation is None:
            return None
        return dpj.CorrelatedNoise(spec.correlation, self.taken, lambda index: key.child("noise", index))

    def _rule(self, spec: StepSpec) -> ClipRule:
        """By which a step's gradients are clipped."""
        return Flat(self.follow.clip_norm) if self.follow else spec.clip_rule

    def state(self) -> State:
        """Of what optax keeps, the leaves in the order of its tree."""
        tensors = {f"weights/{name}": _tensor(x) for name, x in self.params.items()}
        leaves = jax.tree.leaves(self.optimizer_state)
        tensors |= {f"optimizer/{number}": _tensor(x) for number, x in enumerate(leaves)}
        if self.average is not None:
            tensors |= {f"average/{name}": _tensor(x) for name, x in self.average.items()}
        return State(tensors, {} if self.follow is None else {"clip_norm": self.follow.clip_norm})

    def restore(self, taken: int, state: State) -> None:
        with self._settings():
            self.params = _put(self.params, under("weights", state.tensors))
            leaves, tree = jax.tree.flatten(self.optimizer_state)
            numbered = {str(number): x for number, x in enumerate(leaves)}
            restored = _put(numbered, under("optimizer", state.tensors))
            self.optimizer_state = jax.tree.unflatten(tree, [restored[name] for name in numbered])
            if self.average is not None:
                self.average = _put(self.average, under("average", state.tensors))
        self._put_where_they_belong()
        if self.follow is not None:
            self.follow = FollowedClipNorm(self.follow.rule, state.numbers.get("clip_norm"))
        self.taken = taken

    def _put_where_they_belong(self) -> None:
        """On a mesh: weights on each device, the optimizer's state in shards."""
        if self._place is not None:
            self.params = self._place.put_params(self.params)
            self.optimizer_state = self._place.put_shards(self.optimizer_state)
            if self.average is not None:
                self.average = self._place.put_params(self.average)

    def _point(self) -> dict:
        """The weights at which gradients are taken."""
        return self._ahead(self.params, self.optimizer_state[1]) if self.run.config.denoise else self.params

    def _add(self, total: Any, params: dict, batch: tuple, mask: np.ndarray) -> PartialSum:
        return self.accumulator.add(total, params, *batch, self.frozen, mask=mask)

    @torch.no_grad()
    def model(self) -> nn.Module:
        self.settle()
        return self.run.learner

    @torch.no_grad()
    def settle(self) -> None:
        kept = self.params if self.average is None else self.average
        for name, parameter in self.run.learner.named_parameters():
            if name in kept:
                parameter.copy_(_tensor(kept[name]))

    def wire(self) -> Wire:
        return wire({name: x.shape for name, x in self.params.items()}, None, known=True)


def _devices(name: str, number: int) -> list[jax.Device]:
    """So many devices from that called `name` on, as for torch; `auto` is what JAX takes by itself."""
    kind, _, first = name.partition(":")
    try:
        if kind == "auto":
            found = jax.devices()
        else:
            found = jax.devices("gpu" if kind == "cuda" else kind)[int(first or 0) :]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"JAX has no device {name!r} here; try --device auto.") from error
    if len(found) < number:
        raise ConfigError(f"JAX has {len(found)} devices of {name!r} here: --devices cannot be {number}.")
    return found[:number]


def _arrays(batch: tuple) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = batch
    return inputs.cpu().numpy(), labels.cpu().numpy().astype(np.int32)


def _put(own: dict[str, Array], saved: Tensors) -> dict[str, Array]:
    """`saved` as arrays, in the order of `own`; raises CheckpointError if they are not of its kind."""
    like = {name: _tensor(x) for name, x in own.items()}
    put(like, saved)
    return {name: jnp.array(x.numpy()) for name, x in like.items()}


def _tensor(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))
