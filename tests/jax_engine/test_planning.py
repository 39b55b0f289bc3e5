"""What is measured, what is remembered, and what a plan says."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dptrain.jax as dpj
from dptrain.core.methods import Capture
from dptrain.jax import gram, planner, stopwatch
from dptrain.jax.bookkeeping import Route

from . import oracle
from .cases import CASES


def wide(positions: int, k: int, n: int, size: int = 4):
    def loss(p, e):
        return jnp.sum(jnp.tanh(e["x"] @ p["w"]))

    keys = jax.random.split(jax.random.key(0))
    params = {"w": jax.random.normal(keys[0], (k, n))}
    return loss, params, {"x": jax.random.normal(keys[1], (size, positions, k))}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Everything is worth a measurement, and remembered in a folder of its own."""
    monkeypatch.setattr(planner, "WORTH_MEASURING", 0)
    monkeypatch.setenv("DPTRAIN_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("way", ["whole", "loop", "rows 2"])
def test_takes_the_fastest_way_and_remembers_it(measured, monkeypatch, way):
    loss, params, batch = wide(3, 5, 6)
    tried = []

    def pretend(ways, shapes):
        tried.extend(ways)
        return {name: (1000.0, 1.0 if name == way else 2.0) for name in ways}

    monkeypatch.setattr(stopwatch, "_measured", pretend)
    monkeypatch.setattr("dptrain.jax.clipping.parts_to_try", lambda size: [2])
    clipped = dpj.clipped_grad(loss, clip_norm=0.1)
    plan = clipped.plan(params, batch)
    assert (plan.capture, plan.rows) == {
        "whole": (Capture.USES, 4), "loop": (Capture.LOOP, 1), "rows 2": (Capture.USES, 2),
    }[way]  # fmt: skip
    assert len(tried) == 3
    expected, _, _ = oracle.clipped_sum(loss, params, batch, 0.1)
    assert oracle.relative_error(clipped(params, batch).grads, expected) < 1e-9
    assert len(tried) == 3, "what is remembered is not measured again"
    (file,) = measured.iterdir()
    assert sorted(json.loads(file.read_text()).values()) == sorted([1000.0] * 3 + [1.0, 2.0, 2.0])


@pytest.mark.slow
def test_measures_on_stand_ins_of_every_type(measured):
    loss, params, batch = next(c for c in CASES if c.name == "scanned_layers").make(jax.random.key(0), 4)
    expected, _, _ = oracle.clipped_sum(loss, params, batch, 0.1)
    out = dpj.clipped_grad(loss, clip_norm=0.1)(params, batch)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    (file,) = measured.iterdir()
    assert len(json.loads(file.read_text())) == 6  # whole, loop, two rows: bytes and seconds of each


def test_within_a_budget(measured, monkeypatch):
    sizes = {"whole": (900.0, 1.0), "loop": (100.0, 3.0), "rows 2": (300.0, 2.0)}
    monkeypatch.setattr(stopwatch, "_measured", lambda ways, shapes: {way: sizes[way] for way in ways})
    monkeypatch.setattr("dptrain.jax.clipping.parts_to_try", lambda size: [2])
    loss, params, batch = wide(3, 5, 6)

    def rows(budget):
        return dpj.clipped_grad(loss, clip_norm=0.1, memory_budget=budget).plan(params, batch).rows

    assert [rows(b) for b in (1000, 500, 200, 1)] == [4, 2, 1, 1]


def test_what_does_not_fit_the_device_is_not_chosen(measured, monkeypatch):
    def exhausted(step, shapes):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(stopwatch, "_seconds", exhausted)
    ways, shapes = {"whole": lambda x: x + 1}, [jax.ShapeDtypeStruct((3,), jnp.float32)]
    assert stopwatch._measured(ways, shapes)["whole"][1] == float("inf")

    def broken(step, shapes):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(stopwatch, "_seconds", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        stopwatch._measured(ways, shapes)


def test_ways_take_turns(measured, monkeypatch):
    """What is slow for a while is so for all of them, and nobody is chosen by chance."""
    slow = {"one": [9, 1, 9, 9, 9, 9], "other": [9, 9, 9, 2, 9, 9], "long": [99]}
    asked = []

    def seconds(step, arguments):
        name = ["one", "other", "long"][int(step(*arguments))]
        asked.append(name)
        return float(slow[name].pop(0))

    monkeypatch.setattr(stopwatch, "_seconds", seconds)
    monkeypatch.setattr(stopwatch, "LONG", 10)
    shapes = [jax.ShapeDtypeStruct((), jnp.int32)]
    ways = {"one": lambda x: x, "other": lambda x: x + 1, "long": lambda x: x + 2}
    assert {way: s for way, (_, s) in stopwatch._measured(ways, shapes).items()} == {
        "one": 1, "other": 2, "long": 99,
    }  # fmt: skip
    assert asked == ["one", "other", "long"] + ["one", "other"] * stopwatch.REPEATS


def test_a_loss_over_values_of_an_outer_function(measured):
    """Nothing can be timed while they are unknown; the result is the same."""
    loss, params, batch = wide(3, 5, 6)

    @jax.jit
    def outer(params, batch, scale):
        return dpj.clipped_grad(lambda p, e: scale * loss(p, e), clip_norm=0.1)(params, batch).grads

    expected, _, _ = oracle.clipped_sum(lambda p, e: 2.0 * loss(p, e), params, batch, 0.1)
    assert oracle.relative_error(outer(params, batch, 2.0), expected) < 1e-9


@pytest.mark.parametrize(
    ("positions", "k", "n", "route"), [(2, 300, 400, Route.GRAM), (300, 8, 8, Route.KEEP)]
)
def test_routes_by_cost(positions, k, n, route):
    loss, params, batch = wide(positions, k, n)
    (part,) = dpj.clipped_grad(loss, clip_norm=0.1).plan(params, batch).parts
    assert part.route is route


@pytest.mark.parametrize("positions", [1, 2, 7, 40])
def test_gram_norms_are_within_their_bound(positions):
    """In float32, with positions that cancel; against float64. And the bound is no larger than need be."""
    numbers = np.random.default_rng(positions)
    for scale in (1.0, 1e-2, 1e-4):
        rows = numbers.standard_normal((64, 2, positions, 300)).astype(np.float32)
        cols = np.broadcast_to(numbers.standard_normal((64, 2, 1, 50)), (64, 2, positions, 50))
        cols = (cols + scale * numbers.standard_normal(cols.shape)).astype(np.float32)
        if positions > 1:
            rows[:, :, positions // 2 :] = -rows[:, :, : positions - positions // 2]
        true = np.einsum("betr,betc->berc", rows.astype(float), cols.astype(float))
        true = np.square(true).sum((1, 2, 3))
        squared, bound = (np.asarray(x) for x in gram.squared_norms(jnp.asarray(rows), jnp.asarray(cols)))
        assert squared.dtype == np.float32
        assert (np.abs(squared - true) <= bound).all()
        worst = np.square(rows).sum((1, 2, 3)) * np.square(cols).sum((1, 2, 3))
        assert (bound <= 1e-3 * worst).all()


def test_what_is_repeated_is_tapped_where_it_is_small():
    def loss(p, e):
        return jnp.sum(jnp.tanh(e["x"] + p["b"]) * jnp.broadcast_to(p["s"].reshape(1, 1, 3), (2, 5, 3)))

    params, batch = {"b": jnp.ones(3), "s": jnp.ones((3, 1))}, {"x": jnp.ones((4, 2, 5, 3))}
    plan = dpj.clipped_grad(loss, clip_norm=0.1).plan(params, batch)
    assert [v.aval.size for part in plan.parts for v in part.group.values] == [3, 3]


def test_routes_of_methods():
    loss, params, batch = wide(2, 30, 40)
    expected = {
        "per-example": Route.KEEP,
        "fast-gradient": Route.DROP,
        "ghost": Route.GRAM,
        "mixed-ghost": Route.GRAM,
        "bk-ghost": Route.GRAM,
        "bk-mixed-ghost": Route.GRAM,
        "bk-mix-opt": Route.GRAM,
    }
    for method, route in expected.items():
        plan = dpj.clipped_grad(loss, clip_norm=0.1, method=method).plan(params, batch)
        assert plan.parts[0].route is route
        assert plan.second_backward == (method in ("fast-gradient", "ghost", "mixed-ghost"))


def test_plans_take_shapes():
    loss, params, batch = wide(2, 30, 40)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
    assert dpj.clipped_grad(loss, clip_norm=0.1).plan(*shapes).rows == 4


def test_layers_of_a_scan_are_uses_on_slices():
    loss, params, batch = next(c for c in CASES if c.name == "scanned_layers").make(jax.random.key(0), 4)
    plan = dpj.clipped_grad(loss, clip_norm=0.1, method="bk-ghost").plan(params, batch)
    stacked = [use.stacking for part in plan.parts for use in part.uses if use.stacking.lengths]
    assert stacked and all(s.lengths == (3,) and s.sliced == (True,) for s in stacked)
    assert all(part.group.alone for part in plan.parts if len(part.group.values) == 1)
    np.testing.assert_array_equal([s.slices * s.turns for s in stacked], 3)
