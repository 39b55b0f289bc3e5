"""Rules other than flat clipping against one example at a time."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dptrain.jax as dpj
from dptrain.core.clip_rules import Automatic, ClipRule, GroupWise, PerLayer

from . import oracle
from .cases import CASES
from .test_exact import MASK, PRIVATE, SIZE, TOLERANCE, poisoned

#: of which each has values made of several parameters, loops, or one parameter in several places
QUICK = {("low_rank", 2)}
SOME = {"auto", "ghost", "per-example-loop", "per-example-vmap"}
CHOSEN = {"tied_language_model", "low_rank", "scanned_layers", "sliced_parameters"}


def rules(names: list[str]) -> list[ClipRule]:
    """The last one's groups run through layers, and through values made of several parameters."""
    first = "|".join(f"^{re.escape(name)}$" for name in names[::2])
    return [Automatic(0.5, 0.2), PerLayer.evenly(0.5, names), GroupWise((0.3, 0.1), (first, ""))]


def clipped(rule: ClipRule, names: list[str], gradient: list[jax.Array]) -> list[jax.Array]:
    """By the text of the rule."""
    norm = lambda some: float(jnp.sqrt(sum(jnp.sum(g**2) for g in some)))  # noqa: E731
    if isinstance(rule, Automatic):
        return [g * rule.clip_norm / (norm(gradient) + rule.stability) for g in gradient]
    part = rule.partition(names)
    norms = [norm([g for g, its in zip(gradient, part) if its == k]) for k in range(len(rule.clip_norms))]
    return [g * min(1.0, rule.clip_norms[k] / max(norms[k], 1e-300)) for g, k in zip(gradient, part)]


def named(params) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]


@pytest.mark.parametrize(
    ("case", "number"),
    [
        pytest.param(c, n, id=f"{c.name}-{n}", marks=() if (c.name, n) in QUICK else pytest.mark.slow)
        for c in CASES
        if c.name in CHOSEN
        for n in range(3)
    ],
)
def test_every_method_follows_every_rule(case, number):
    loss, params, batch = case.make(jax.random.key(0), SIZE)
    names = named(params)
    rule = rules(names)[number]
    want = None
    for b in np.flatnonzero(MASK):
        one = jax.grad(loss)(params, jax.tree.map(lambda x, b=b: x[b], batch))
        part = clipped(rule, names, jax.tree.leaves(one))
        want = part if want is None else [a + b for a, b in zip(want, part)]
    hostile = poisoned(batch, 1, jnp.nan)
    for method in PRIVATE if number == 2 else ("auto", "per-example-vmap"):
        if (case.name, number) in QUICK and method not in SOME:
            continue
        out = dpj.clipped_grad(loss, clip_norm=rule, method=method)(params, hostile, mask=jnp.asarray(MASK))
        want_tree = jax.tree.unflatten(jax.tree.structure(params), want)
        assert oracle.relative_error(out.grads, want_tree) < TOLERANCE, method
        assert out.clip_norm == rule.sensitivity


def test_a_layer_is_what_stands_side_by_side():
    names = ["a.w", "a.b", "c.0.w", "c.1.w", "scale"]
    assert PerLayer((1.0,) * 4).partition(names) == (0, 0, 1, 2, 3)
    assert PerLayer((1.0,) * 3).partition(["0.weight", "0.bias", "head.weight", "token"]) == (0, 0, 1, 2)
