"""Rules other than flat clipping against one example at a time."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dptrain.jax as dpj
from dptrain.core.clip_rules import Automatic, ClipRule, Flat, GroupWise, PerLayer, Quantile
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import Sampling, StepSpec, flat_step

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


def loss(params, example):
    x, y = example
    return (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


def some(size: int):
    rng = np.random.default_rng(0)
    params = {"v": jnp.asarray(rng.normal(size=4)), "w": jnp.asarray(rng.normal(size=(3, 4)))}
    return params, (rng.normal(size=(size, 3)), rng.normal(size=size))


@pytest.mark.parametrize("method", PRIVATE)
@pytest.mark.parametrize(
    "made",
    [
        Flat,
        lambda c: Automatic(c, 0.2),
        lambda c: PerLayer((c, c / 2)),
        lambda c: GroupWise((c, 2 * c), ("v", "")),
    ],
)
def test_a_rule_of_the_same_kind_takes_the_place_of_another_and_nothing_is_compiled(method, made):
    params, batch = some(5)
    if isinstance(made(1.0), PerLayer):
        params = {"a": {"v": params["v"]}, "b": {"w": params["w"]}}
        one = lambda p, example: loss({**p["a"], **p["b"]}, example)  # noqa: E731
    else:
        one = loss
    names = named(params)
    engine = dpj.clipped_grad(one, clip_norm=made(1.0), method=method)
    for rule in (made(0.3), made(1e-3), made(50.0)):
        engine.rule = rule
        want = None
        for b in range(5):
            gradient = jax.tree.leaves(jax.grad(one)(params, jax.tree.map(lambda x, b=b: x[b], batch)))
            norm = lambda some: float(jnp.sqrt(sum(jnp.sum(g**2) for g in some)))  # noqa: E731
            scale = min(1.0, rule.clip_norm / norm(gradient)) if isinstance(rule, Flat) else None
            part = [scale * g for g in gradient] if scale else clipped(rule, names, gradient)
            want = part if want is None else [a + b for a, b in zip(want, part)]
        out = engine(params, batch)
        assert (
            oracle.relative_error(out.grads, jax.tree.unflatten(jax.tree.structure(params), want)) < TOLERANCE
        )
        assert out.clip_norm == engine.clip_norm == rule.sensitivity
    assert engine._compiled._cache_size() == 1


def test_a_rule_of_another_kind_is_refused():
    engine = dpj.clipped_grad(loss, clip_norm=1.0)
    for rule in (Automatic(1.0), PerLayer((1.0,))):
        with pytest.raises(ValueError, match="make another clipped_grad"):
            engine.rule = rule
    with pytest.raises(ValueError, match="at least 1e-09"):
        engine.rule = Flat(1e-13)
    with pytest.raises(ValueError, match="make another"):
        dpj.clipped_grad(loss, clip_norm=Automatic(1.0, 0.1)).rule = Automatic(1.0, 0.2)


def test_a_sum_has_the_clip_norm_that_it_was_begun_with():
    params, batch = some(4)
    everyone = np.ones(4, bool)
    accumulator = dpj.Accumulator(dpj.clipped_grad(loss, clip_norm=1.0))
    whole = accumulator(params, [(batch, everyone)] * 2)
    total = accumulator.add(accumulator.zeros(params), params, batch, mask=everyone)
    accumulator.clipped.rule = 0.5
    accumulator.zeros(params)  # another logical batch is begun before that one is finished
    with pytest.raises(ValueError, match="within a logical batch"):
        accumulator.add(total, params, batch, mask=everyone)
    assert accumulator.finish(total).clip_norm == 1.0
    half = accumulator(params, [(batch, everyone)] * 2)
    assert (whole.clip_norm, half.clip_norm) == (1.0, 0.5)
    assert accumulator.compilations == 1
    with pytest.raises(TypeError, match="begun by zeros"):
        accumulator.finish(half.grads)


def quantile(steps: int = 6) -> Mechanism:
    spec = StepSpec(Quantile(5.0, count_noise=2.0), 1.0, Sampling("poisson", 0.5), 20)
    return Mechanism(((spec, steps),))


def changing() -> Mechanism:
    """Clip norm, noise and expected batch size of every step are its own."""
    steps = [
        flat_step(
            noise_multiplier=1 + 0.1 * i, clip_norm=2.0 - 0.3 * i, sample_rate=0.5, expected_batch_size=20
        )
        for i in range(6)
    ]
    return Mechanism(tuple((step, 1) for step in steps))


@pytest.mark.parametrize("mechanism", [quantile, changing])
def test_a_mechanism_whose_clip_norm_changes_is_compiled_once(mechanism):
    params, data = some(40)
    task = dpj.make_private(
        loss, params, optax.adam(0.1), data, mechanism(), physical_batch_size=8, key=Key.from_seed(1)
    )
    norms = [task.clip_norm for _ in task.steps()]
    assert len(set(norms[:5])) == 5
    assert task.accumulator.compilations == task._apply._cache_size() == 1


def test_a_clip_norm_that_follows_a_quantile_goes_on_where_it_was(tmp_path):
    params, data = some(40)
    options = {"physical_batch_size": 8, "key": Key.from_seed(1)}

    def task(params, **more):
        return dpj.make_private(loss, params, optax.sgd(0.1), data, quantile(), **options, **more)

    whole = task(params)
    norms = [whole.clip_norm for _ in whole.steps()]
    assert norms[-1] < 5.0
    with Ledger.create(tmp_path / "ledger", dataset="made up") as ledger:
        first = task(params, ledger=ledger)
        for step in first.steps():
            if step.number == 3:
                break
        again = task(first.params, ledger=ledger, taken=3, clip_norm=first.clip_norm)
        assert [again.clip_norm for _ in again.steps()] == norms[3:]
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    with pytest.raises(ValueError, match="leave clip_norm out"):
        dpj.make_private(loss, params, optax.sgd(0.1), data, changing(), clip_norm=1.0, **options)


def test_kinds_of_rules_that_do_not_mix_are_refused_before_anything_is_spent():
    params, data = some(40)
    first = StepSpec(Flat(1.0), 1.0, Sampling("poisson", 0.5), 20)
    other = StepSpec(Automatic(1.0), 1.0, Sampling("poisson", 0.5), 20)
    with pytest.raises(ValueError, match="make another clipped_grad"):
        dpj.make_private(
            loss, params, optax.sgd(0.1), data, Mechanism(((first, 2), (other, 2))), physical_batch_size=8
        )
