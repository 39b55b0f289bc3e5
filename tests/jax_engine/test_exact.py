"""Case x method against the float64 oracle: sums and norms, with hostile rows.

What the engine makes of a program does not depend on how a method norms and sums it. So every case is tried
with two methods that between them take every route, and the others on the cases that have most to get
wrong. The whole product is marked slow.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dptrain.jax as dpj
from dptrain.core import methods

from . import oracle
from .cases import CASES

PRIVATE = [row.name for row in methods.TABLE if row.is_private]
TOLERANCE = 1e-9
SIZE = 5
ROUTES = {"auto", "bk-ghost"}
HARD = {"convolutions", "tied_language_model", "loops_within_loops", "sliced_parameters", "scanned_layers"}
#: by which hard cases go as well; the other methods take their parts from these and from ROUTES
PLAIN = {"per-example", "ghost", "mixed-ghost"}
MASK = np.array([True, False, True, True, False])


@functools.cache
def prepared(case):
    """Loss, parameters, batch, a clip norm that clips half of it, and what is right: whole and masked."""
    loss, params, batch = case.make(jax.random.key(0), SIZE)
    _, norms, _ = oracle.clipped_sum(loss, params, batch, 1.0)
    clip_norm = float(jnp.median(norms))
    gradients = oracle.clipped_sum(loss, params, batch, clip_norm)
    masked = oracle.clipped_sum(loss, params, batch, clip_norm, MASK)
    without = oracle.clipped_sum(loss, params, batch, clip_norm, MASK & (np.arange(SIZE) != 2))
    return loss, params, batch, clip_norm, gradients, masked, without


def poisoned(batch, row: int, value: float):
    def poison(x):
        return x.at[row].set(value) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(poison, batch)


def check(out, expected):
    grads, norms, losses = expected
    assert oracle.relative_error(out.grads, grads) < TOLERANCE
    np.testing.assert_allclose(out.norms, norms, rtol=TOLERANCE)
    np.testing.assert_allclose(out.losses, losses, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(
            case,
            method,
            id=f"{case.name}-{method}",
            marks=[] if method in ROUTES or (case.name in HARD and method in PLAIN) else pytest.mark.slow,
        )
        for case in CASES
        for method in PRIVATE
    ],
)
def test_equals_single_examples(case, method):
    """Whole; with masked rows of NaN; and with a real example that is not finite, which loses its own part
    and no other."""
    loss, params, batch, clip_norm, whole, masked, without = prepared(case)
    clipped = dpj.clipped_grad(loss, clip_norm=clip_norm, method=method)
    out = clipped(params, batch)
    check(out, whole)
    assert jax.tree.map(jnp.shape, out.grads) == jax.tree.map(jnp.shape, params)
    check(clipped(params, poisoned(batch, 1, jnp.nan), mask=MASK), masked)
    if any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(batch)):
        out = clipped(params, poisoned(batch, 2, jnp.inf), mask=MASK)
        assert oracle.relative_error(out.grads, without[0]) < TOLERANCE
