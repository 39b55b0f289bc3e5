"""The JAX engine, by ``make_private``: the loop that its users call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

import dptrain.jax as dpj
from dptrain.audit.subjects import Problem, Training, Weights
from dptrain.bench.contestant import Unsupported
from dptrain.core.entropy import Key
from dptrain.core.sampling import LogicalSampler, physical_batches


class Engine:
    """One clipping method."""

    def __init__(self, method: str):
        self.method, self.name = method, f"jax {method}"

    def train(self, problem: Problem, how: Training) -> Iterator[Weights]:
        private = dpj.make_private(
            problem.jax_loss,
            jax.device_put(dict(problem.jax_params()), device(how.device)),
            optax.sgd(how.learning_rate),
            (Lazily(problem.inputs, problem.size), Lazily(problem.targets, problem.size)),
            how.mechanism,
            physical_batch_size=how.physical_batch_size,
            method=self.method,
        )
        yield weights(private.params)
        for _ in private.steps():
            yield weights(private.params)

    def for_many_trainings(self) -> Repeated:
        return Repeated(self.method)


class Repeated:
    """The loop of ``make_private`` from its public parts, which are compiled for the first training alone."""

    def __init__(self, method: str):
        self.name = f"jax {method}"
        self._accumulator = functools.cache(functools.partial(_accumulator, method))

    def train(self, problem: Problem, how: Training) -> Iterator[Weights]:
        mechanism, key = how.mechanism, Key.from_entropy()
        accumulator = self._accumulator(problem, mechanism.clip_norm)
        optimizer = dpj.private(optax.sgd(how.learning_rate))
        params = jax.device_put(dict(problem.jax_params()), device(how.device))
        state = optimizer.init(params)
        yield weights(params)
        for step in range(mechanism.steps):
            spec = mechanism.step(step)
            sampler = LogicalSampler(problem.size, spec.sampling, key.child("sampling"))
            pieces = physical_batches(sampler.sample(step), how.physical_batch_size)
            batches = (((problem.inputs(p.indices), problem.targets(p.indices)), p.mask) for p in pieces)
            gradient = dpj.privatize(
                accumulator(params, batches), spec, key.child("noise", step), donate=True
            )
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            yield weights(params)

    def for_many_trainings(self) -> Repeated:
        return self


def _accumulator(method: str, problem: Problem, clip_norm: float) -> dpj.Accumulator:
    return dpj.Accumulator(dpj.clipped_grad(problem.jax_loss, clip_norm=clip_norm, method=method))


class Lazily:
    """An array of examples that are made when they are asked for."""

    def __init__(self, rows: Callable[[Any], np.ndarray], size: int):
        self._rows = rows
        one = rows([0])
        self.shape, self.dtype = (size, *one.shape[1:]), one.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        return self._rows(indices)


def device(name: str) -> Any:
    """JAX's device of PyTorch's name.

    Raises:
        Unsupported: there is none.
    """
    kind, _, number = name.partition(":")
    try:
        return jax.devices("gpu" if kind == "cuda" else kind)[int(number or 0)]
    except (RuntimeError, IndexError) as error:
        raise Unsupported(f"JAX has no device {name!r} here.") from error


def weights(params: Any) -> Weights:
    """A copy, on the host."""
    return {name: np.array(p) for name, p in params.items()}
