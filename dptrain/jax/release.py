"""From a clipped sum to a private gradient, and from that to a step. The only door.

What is released is a ``PrivateGradient``, and ``private(optimizer)`` accepts nothing else; only
``privatize`` makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.release import step_to_release
from dptrain.core.spec import StepSpec

from . import hosts
from .clipped_sum import ClippedSum
from .correlated import CorrelatedNoise
from .noise import noisy_mean

_DOOR = object()


@jax.tree_util.register_pytree_node_class
class PrivateGradient:
    """A noisy mean gradient: safe to look at, to store and to post-process.

    A pytree, so that a compiled step may return one.

    Attributes:
        grads: like the parameters, ``(clipped sum + noise) / L``, in float32 or better.
        spec: the step of the mechanism that it spends; None within `OfAnyStep`.
        reproducible: whether its noise can be recomputed from a seed, which voids the guarantee against
            whoever knows the seed.
        noise_variance: of the noise in each coordinate of `grads`, which is public; None where it is not
            known.
    """

    __slots__ = ("grads", "noise_variance", "reproducible", "spec")

    def __init__(
        self,
        grads: Any,
        spec: StepSpec | None,
        reproducible: bool,
        noise_variance: Any = None,
        door: Any = None,
    ):
        if door is not _DOOR:
            raise TypeError("only dptrain.jax.privatize makes a PrivateGradient.")
        for name, value in zip(
            ("grads", "spec", "reproducible", "noise_variance"),
            (grads, spec, reproducible, noise_variance),
            strict=True,
        ):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("a PrivateGradient is not changed: its map method gives a post-processed one.")

    def map(self, function: Callable, noise_variance: float | jax.Array | None = None) -> PrivateGradient:
        """Post-process: ``function(grads) -> grads`` on the whole tree.

        noise_variance: of the result's noise, if you know it; optimizers that must know it refuse it else.
        """
        return PrivateGradient(function(self.grads), self.spec, self.reproducible, noise_variance, _DOOR)

    def on_host(self) -> dict[str, np.ndarray]:
        """By path in the tree, as NumPy arrays; where several processes have shards, all must call it."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.grads)
        return {jax.tree_util.keystr(path): hosts.gathered(leaf) for path, leaf in leaves}

    def tree_flatten(self) -> tuple:
        return (self.grads,), (self.spec, self.reproducible, self.noise_variance)

    @classmethod
    def tree_unflatten(cls, known: tuple, children: tuple) -> PrivateGradient:
        return cls(children[0], *known, door=_DOOR)


@jax.tree_util.register_pytree_node_class
class OfAnyStep:
    """A private gradient on its way into a function that is compiled once for all steps: the variance of its
    noise is an argument, and its step is left out."""

    def __init__(self, gradient: PrivateGradient):
        self._children = gradient.grads, gradient.noise_variance

    def gradient(self) -> PrivateGradient:
        """Inside of the function: what optimizers take."""
        grads, noise_variance = self._children
        return PrivateGradient(grads, None, False, noise_variance, _DOOR)

    def tree_flatten(self) -> tuple:
        return self._children, None

    @classmethod
    def tree_unflatten(cls, known: None, children: tuple) -> OfAnyStep:
        made = object.__new__(cls)
        made._children = tuple(children)
        return made


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
    mechanism's, never the number of examples that were sampled (rule 2).

    Args:
        clipped_sum: of a whole logical batch.
        mechanism: a constant mechanism, or the specification of this step.
        key: this step's own, for example ``run_key.child("noise", step)``: a key that is used twice
            repeats its noise.
        donate: give the sum's buffers away to the gradient; the sum cannot be used afterwards.
        noise: of a mechanism whose noise is correlated: that of its earlier steps, to which this one's is
            added. The gradient has to be used, or the run to end.

    Raises:
        TypeError: not a clipped sum, a mechanism or a key; or it is called inside of ``jax.jit``.
        ValueError: the sum was clipped to another norm than the mechanism says, the mechanism is hardened, or
            its noise is correlated and that of earlier steps is missing.
    """
    if not isinstance(clipped_sum, ClippedSum):
        raise TypeError(f"privatize takes a ClippedSum, and was given {type(clipped_sum).__name__}.")
    if not isinstance(key, Key):
        raise TypeError("privatize needs a dptrain.core.entropy.Key: Key.from_entropy() makes one.")
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(clipped_sum)):
        raise TypeError(
            "privatize takes its key from the host, and a compiled function would draw the same noise each "
            "time: call it outside of jax.jit."
        )
    refuse_what_is_for_torch(mechanism)
    spec = step_to_release(mechanism, clipped_sum.clip_norm)
    if spec.correlation != (None if noise is None else noise.coefficients):
        raise ValueError(
            "a mechanism of correlated noise needs a CorrelatedNoise of its coefficients, and only such one."
        )
    if noise is not None:
        drawn = noise.next(clipped_sum.grads, spec, key)
        mean = (_onto_donated if donate else _onto)(clipped_sum.grads, drawn, spec.expected_batch_size)
        return PrivateGradient(mean, spec, key.reproducible, None, _DOOR)  # its variance changes
    mean = noisy_mean(clipped_sum.grads, spec.noise_stddev, spec.expected_batch_size, key, donate)
    return PrivateGradient(mean, spec, key.reproducible, spec.mean_noise_variance, _DOOR)


def _added(sums: Any, noise: Any, batch_size: Any) -> Any:
    return jax.tree.map(lambda total, z: z + total / batch_size, sums, noise)


_onto = jax.jit(_added)
_onto_donated = jax.jit(_added, donate_argnums=0)


def refuse_what_is_for_torch(mechanism: Mechanism | StepSpec) -> None:
    """Raises ValueError: the mechanism is hardened."""
    steps = [spec for spec, _ in mechanism.segments] if isinstance(mechanism, Mechanism) else [mechanism]
    if any(isinstance(spec, StepSpec) and spec.grid is not None for spec in steps):
        raise ValueError(
            "JAX's sums are in floating point, and this mechanism's on an integer grid: use one that is not "
            "hardened, or dptrain.torch."
        )


def check_noise_is_known(optimizer: optax.GradientTransformation, params: Any) -> None:
    """Refuse an optimizer that must know the noise of each gradient, for a mechanism where that is not known.

    Raises:
        ValueError: it says so.
    """
    gradient = PrivateGradient(params, None, False, None, _DOOR)
    chain = private(optimizer)
    jax.eval_shape(lambda: chain.update(gradient, chain.init(params), params))


def private(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer that takes private gradients and nothing else.

    ``updates, state = private(optax.adam(1e-3)).update(gradient, state, params)``; the gradients are given to
    the optimizer in the parameters' types, with ``noise_variance`` as an extra argument if it takes any.

    Raises (from ``update``):
        TypeError: anything but a ``PrivateGradient``, such as a clipped sum.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(gradient: PrivateGradient, state: Any, params: Any = None, **extra: Any) -> tuple:
        if not isinstance(gradient, PrivateGradient):
            raise TypeError(
                f"a private optimizer takes a PrivateGradient and was given {type(gradient).__name__}: pass "
                "the clipped sum through privatize first."
            )
        grads = gradient.grads
        if params is not None:
            grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), grads, params)
        return inner.update(grads, state, params, noise_variance=gradient.noise_variance, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)
