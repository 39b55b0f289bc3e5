"""JAX: ``make_private``, and a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dptrain.jax as dpj
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.sampling import LogicalSampler

from .problems import Arrays, Autoencoder, Problem
from .subjects import Run, Task, secret


def loss_fn(params: Any, example: Any) -> jax.Array:
    """``Autoencoder`` in JAX: the loss of one example."""
    x = example["x"]
    out = jnp.tanh(x @ params["w"] + params["b"]) @ params["w"].T + params["c"]
    of_one = jnp.sum((out - x) ** 2) + jnp.sum((x @ params["s"]) ** 2)
    return of_one / 2 + example["t"] * jnp.sum(params["r"])


def _arrays(tree: Any) -> Arrays:
    return {name: np.array(x) for name, x in tree.items()}


def recorder() -> optax.GradientTransformation:
    """An optimizer whose state is what it was given last, and that moves nothing."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (zeros(updates), updates))


class JaxLoop:
    """``accumulate`` over a buffer that holds the whole logical batch, and ``privatize``."""

    slack = 1.005  #: which make_private lets pass

    def problem(self) -> Autoencoder:
        return Autoencoder()

    def run(self, task: Task) -> Run:
        mechanism, rows = task.mechanism, task.physical_batch_size
        data, key, run = task.problem.data, secret(task), Run()
        size = len(data["x"])
        params = jax.tree.map(jnp.asarray, task.problem.weights)
        clipped = dpj.clipped_grad(loss_fn, clip_norm=mechanism.clip_norm)
        step_sum = jax.jit(
            lambda p, batch, mask: dpj.accumulate(clipped, p, batch, mask, physical_batch_size=rows)
        )
        for step in range(mechanism.steps):
            spec = mechanism.step(step)
            drawn = LogicalSampler(size, spec.sampling, key.child("sampling")).sample(step)
            buffer = np.zeros(-(-size // rows) * rows, np.int64)
            buffer[: len(drawn)] = drawn
            batch = {name: x[buffer] for name, x in data.items()}
            total = step_sum(params, batch, np.arange(len(buffer)) < len(drawn))
            gradient = dpj.privatize(total, spec, key.child("noise", step))
            run.weights.append(task.problem.weights)
            run.releases.append(_arrays(gradient.grads))
            run.told.append(step + 1)
        run.epsilon = None if mechanism.delta is None else mechanism.epsilon()
        return run

    def clipped(self, problem: Problem, clip_norm: float) -> Callable[[np.ndarray], Arrays]:
        clipped = dpj.clipped_grad(loss_fn, clip_norm=clip_norm)
        return lambda mask: _arrays(clipped(problem.weights, problem.data, mask=mask).grads)

    def release(self, problem: Problem, clip_norm: float, method: str, mechanism: Mechanism) -> Arrays:
        clipped = dpj.clipped_grad(loss_fn, clip_norm=clip_norm, method=method)
        total = clipped(problem.weights, problem.data)
        return _arrays(dpj.privatize(total, mechanism, Key.from_entropy()).grads)


class JaxPrivate(JaxLoop):
    """``make_private``."""

    def run(self, task: Task) -> Run:
        run = Run()
        private = dpj.make_private(
            loss_fn,
            task.problem.weights,
            recorder(),
            task.problem.data,
            task.mechanism,
            physical_batch_size=task.physical_batch_size,
            key=secret(task),
        )
        for step in private.steps():
            run.weights.append(task.problem.weights)
            run.releases.append(_arrays(private.optimizer_state))
            run.told.append((step.number, step.steps))
        run.epsilon = None if task.mechanism.delta is None else private.epsilon
        return run
