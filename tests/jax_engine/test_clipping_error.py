"""A search for a gradient that rounding lets through longer than C; hardened mechanisms are refused."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dptrain.jax as dpj
from dptrain.core import clipping_error
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.jax.factors import clip_factors, sum_of_squares


def exact_square(values) -> Fraction:
    """Of float32 numbers, to a relative 2^-53."""
    values = np.asarray(values, np.float64).ravel()
    return Fraction(math.fsum(values * values))


def kinds(size: int):
    """Unit vectors in float32: small squares that vanish beside large ones, equal ones, all sizes, any."""
    rng = np.random.default_rng(size)
    losing = np.full(size, 2.0**-12 * math.sqrt(0.49999))
    losing[::50] = 1.0
    some = (1 + rng.random(1000)).astype(np.float32)
    equal = np.full(size, some[np.argmax(some.astype(float) ** 2 - some * some)])
    decades = 10.0 ** rng.uniform(-4, 4, size)
    for row in (losing, equal, decades, rng.standard_normal(size)):
        yield row / np.linalg.norm(row)


def worst(sizes) -> float:
    found = []

    @jax.jit
    def factors(rows):
        here = jnp.ones(len(rows), bool)
        return [
            clip_factors(sum_of_squares([rows], 1), here, jnp.asarray(c), [rows[0]], 1) for c in (1e-12, 0.7)
        ]

    for size in sizes:
        for row in kinds(size):
            for i, clip_norm in enumerate((1e-12, 0.7)):
                norms = np.array([0.5, 1 - 1e-6, 1.0, 1 + 1e-7, 3.0, 1e6]) * clip_norm
                rows = (norms[:, None] * row).astype(np.float32)
                for c, r in zip(np.asarray(factors(rows)[i]), rows):
                    length = Fraction(float(c)) ** 2 * exact_square(r)
                    found.append(float(length / Fraction(clip_norm) ** 2 - 1) / 2)
    return max(found)


def test_no_gradient_is_longer_than_the_clip_norm():
    assert worst([1, 127, 129, 1000, 100_003]) <= 0


def test_the_search_finds_what_the_margin_prevents(monkeypatch):
    monkeypatch.setattr(clipping_error, "margin", lambda *_: 1.0)
    assert worst([1000]) > 3e-8


def test_sums_of_squares_swallow_nothing():
    """Four million numbers in float32, of any rank."""
    x = jnp.full((2, 4, 1000, 1001), 1.3, jnp.float32)
    exact = float(np.float32(1.3)) ** 2 * x[0].size
    close = partial(np.allclose, b=exact, rtol=clipping_error.shortfall("float32", x[0].size, 2, "levels"))
    assert close(np.asarray(sum_of_squares([x], 1)))
    assert close(float(sum_of_squares([x[0], jnp.zeros((3, 0), jnp.float32)])))
    assert float(sum_of_squares([jnp.float32(3)])) == 9


@pytest.mark.parametrize("method", ["auto", "per-example-loop", "bk-ghost"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_example_moves_the_sum_by_more_than_the_clip_norm(method, dtype):
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((12, 16)).astype(np.float32), "b": np.zeros(16, np.float32)}
    sign = jnp.tile(jnp.array([1.0, -1.0]), 4)[:, None]

    def loss(params, x):
        y = (x.astype(dtype) @ params["w"].astype(dtype) + params["b"].astype(dtype)).astype(jnp.float32)
        return jnp.sum(sign * y) + 1e-3 * jnp.sum(y * y)

    x = rng.standard_normal((4, 1, 12)) + 1e-2 * rng.standard_normal((4, 8, 12))
    x = (x * 10.0 ** np.arange(-1, 3)[:, None, None]).astype(np.float32)
    clipped = dpj.clipped_grad(loss, clip_norm=0.7, method=method)
    for b in range(4):
        out = clipped(params, x, mask=jnp.arange(4) == b)
        length = sum((exact_square(g) for g in jax.tree.leaves(out.grads)), Fraction(0))
        assert 0.99 * 0.49 < length <= Fraction(0.7) ** 2 or b == 0


def test_hardened_mechanisms_are_refused():
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=0.7, sample_rate=0.5, steps=2, expected_batch_size=2
    )
    params, data = {"w": jnp.ones(3)}, np.ones((4, 3), np.float32)
    loss = lambda params, x: jnp.sum(params["w"] * x)  # noqa: E731
    out = dpj.clipped_grad(loss, clip_norm=0.7)(params, data)
    dpj.privatize(out, mechanism, Key.from_seed(0))
    for hardened in (mechanism.hardened(), mechanism.hardened().step(0)):
        with pytest.raises(ValueError, match="one that is not hardened"):
            dpj.privatize(out, hardened, Key.from_seed(0))
    with pytest.raises(ValueError, match="one that is not hardened"):
        dpj.make_private(loss, params, optax.sgd(0.1), data, mechanism.hardened(), physical_batch_size=2)
