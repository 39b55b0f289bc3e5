"""The rules of privacy, for the JAX engine. Each test fails when its rule is broken."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dptrain.jax as dpj
from dptrain import Mechanism
from dptrain.core import methods
from dptrain.core.entropy import Key
from dptrain.jax import noise

from . import oracle
from .cases import CASES

PRIVATE = [row.name for row in methods.TABLE if row.is_private]
METHODS = pytest.mark.parametrize("method", PRIVATE)


def named(name: str, size: int = 6):
    return next(c for c in CASES if c.name == name).make(jax.random.key(3), size)


def linear(p, e):
    return jnp.sum(p["w"] * e["x"])


@pytest.mark.parametrize(
    ("case", "method"),
    [("convolutions", m) for m in PRIVATE]
    + [(c, "auto") for c in ("vit", "tied_language_model", "loops_within_loops")],
)
def test_neighbours_differ_by_at_most_the_clip_norm(case, method):
    loss, params, batch = named(case)
    clipped = dpj.clipped_grad(loss, clip_norm=0.01, method=method)
    whole = clipped(params, batch)
    without = clipped(params, batch, mask=jnp.arange(6) != 2)
    difference = jax.tree.map(jnp.subtract, whole.grads, without.grads)
    norm = float(optax.tree.norm(difference))
    assert norm <= 0.01 * (1 + 1e-9)
    assert norm > 0.0099  # it was clipped, so the bound is reached


def test_rule_2_divides_by_the_public_batch_size():
    mechanism = Mechanism.constant(
        noise_multiplier=0.0, clip_norm=1.0, sample_rate=0.5, steps=1, expected_batch_size=10, delta=1e-5
    )
    clipped = dpj.clipped_grad(linear, clip_norm=1.0)
    x = jnp.eye(4)
    out = clipped({"w": jnp.zeros(4)}, {"x": x})
    gradient = dpj.privatize(out, mechanism, Key.from_entropy())
    np.testing.assert_allclose(gradient.grads["w"], 0.1)


@METHODS
def test_rule_4_an_empty_batch_is_zero_and_still_gets_noise(method):
    loss, params, batch = named("mlp")
    batch = batch | {"x": jnp.full_like(batch["x"], jnp.nan)}
    out = dpj.clipped_grad(loss, clip_norm=1.0, method=method)(params, batch, mask=jnp.zeros(6, bool))
    assert all((g == 0).all() for g in jax.tree.leaves(out.grads))
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, steps=1, expected_batch_size=10, delta=1e-5
    )
    gradient = dpj.privatize(out, mechanism, Key.from_entropy())
    assert all((g != 0).all() for g in jax.tree.leaves(gradient.grads))


def test_rule_6_parameters_without_a_part_in_the_loss_are_refused_by_name():
    params = {"w": jnp.zeros(3), "never": {"used": jnp.zeros(2)}}
    batch = {"x": jnp.ones((4, 3))}
    with pytest.raises(dpj.Refused, match=r"never\.used"):
        dpj.clipped_grad(linear, clip_norm=1.0)(params, batch)
    out = dpj.clipped_grad(linear, clip_norm=1.0, allow_unused=True)(params, batch)
    assert (out.grads["never"]["used"] == 0).all()


@METHODS
def test_rule_7_float32_whatever_the_compute_type(method):
    """Parameters in float32 that are cast to bfloat16: no example's part exceeds C, and sums are float32."""

    def loss(p, e):
        w = jax.tree.map(lambda x: x.astype(jnp.bfloat16), p)
        h = jax.nn.gelu(e["x"].astype(jnp.bfloat16) @ w["a"] + w["c"])
        return jnp.sum((h @ w["b"]).astype(jnp.float32) ** 2)

    k = jax.random.split(jax.random.key(0), 4)
    params = {
        "a": jax.random.normal(k[0], (40, 30), jnp.float32),
        "b": jax.random.normal(k[1], (30, 20), jnp.float32),
        "c": jax.random.normal(k[3], (30,), jnp.float32),
    }
    batch = {"x": jax.random.normal(k[2], (8, 12, 40), jnp.float32)}
    clipped = dpj.clipped_grad(loss, clip_norm=1.0, method=method)
    for b in range(8):
        out = clipped(params, batch, mask=jnp.arange(8) == b)
        assert {g.dtype for g in jax.tree.leaves(out.grads)} == {jnp.dtype("float32")}
        norm = float(optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float64), out.grads)))
        assert norm <= 1 + 1e-5, b
        assert norm > 0.98, b


@METHODS
def test_rule_7_gram_norms_do_not_cancel(method):
    """Products whose terms are large beside their sum: in float32 the Gram form alone would be off."""
    k = jax.random.split(jax.random.key(5), 3)
    g = jax.random.normal(k[0], (1, 8, 300), jnp.float32)
    # Two halves of positions cancel up to one part in ten thousand.
    x = jnp.concatenate([g, -g + 1e-4 * jax.random.normal(k[1], g.shape, jnp.float32)], 1)
    weights = jax.random.normal(k[2], (300, 40), jnp.float32)

    def loss(p, e):
        return jnp.sum((e["x"] @ p["w"]) * jnp.tile(weights[:1] * 0 + weights[:1], (16, 1)))

    params, batch = {"w": jnp.zeros((300, 40), jnp.float32)}, {"x": x}
    wide = jax.tree.map(lambda t: t.astype(jnp.float64), (params, batch))
    _, norms, _ = oracle.clipped_sum(loss, *wide, 1.0)
    out = dpj.clipped_grad(loss, clip_norm=1e-3, method=method)(params, batch)
    assert float(out.norms[0]) >= float(norms[0]) * (1 - 1e-3)
    assert float(out.norms[0]) <= float(norms[0]) * 1.01


def test_rule_8_noise_is_gaussian_and_new_each_time():
    mechanism = Mechanism.constant(
        noise_multiplier=2.0, clip_norm=3.0, sample_rate=0.5, steps=3, expected_batch_size=6, delta=1e-5
    )
    out = dpj.clipped_grad(linear, clip_norm=3.0)({"w": jnp.zeros(40_001)}, {"x": jnp.zeros((2, 40_001))})
    key = Key.from_entropy()
    drawn = [dpj.privatize(out, mechanism, key.child(i)).grads["w"] for i in range(3)]
    for z in drawn:
        assert abs(float(z.std()) - 1.0) < 0.02
        assert abs(float(z.mean())) < 0.03
    assert abs(float(jnp.corrcoef(drawn[0], drawn[1])[0, 1])) < 0.03
    again = dpj.privatize(out, mechanism, key.child(0)).grads["w"]
    np.testing.assert_array_equal(again, drawn[0])
    assert dpj.privatize(out, mechanism, Key.from_seed(1)).reproducible


def test_rule_8_no_two_parameters_share_their_noise():
    """Even where their paths look the same."""
    params = {"x": {"b": jnp.zeros(50)}, "x.b": jnp.zeros(50), "y": [jnp.zeros(50)] * 2, "y.0": jnp.zeros(50)}
    for spread in (
        noise.noisy_mean,
        lambda s, *rest: noise._drawn(s, noise.noise_words(rest[-1]), *rest[:2]),
    ):
        drawn = jax.tree.leaves(spread(params, 1.0, 1.0, Key.from_seed(0)))
        assert len({tuple(np.asarray(z)) for z in drawn}) == 5


def test_on_a_cpu_noise_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    from dptrain.torch.noise import noisy_mean

    sums = {"layer.weight": np.ones((30, 7), np.float32), "layer.bias": np.ones(7, np.float32)}
    key = Key.from_seed(3)
    theirs = noisy_mean({n: torch.from_numpy(x) for n, x in sums.items()}, 2.0, 5.0, key)
    nested = {"layer": {n.removeprefix("layer."): jnp.asarray(x) for n, x in sums.items()}}
    ours = noise.noisy_mean(nested, 2.0, 5.0, key)
    for name in sums:
        np.testing.assert_array_equal(ours["layer"][name.removeprefix("layer.")], theirs[name].numpy())


def test_noise_reaches_beyond_what_float32_generators_give(monkeypatch):
    z = jax.jit(lambda k: noise.gaussian(k, (2**24,), jnp.dtype("float32")))(jax.random.key(0))
    counted = [int(jnp.sum(jnp.abs(z) > t)) for t in (3.0, 4.0, 5.0)]
    for found, expected in zip(counted, (2**24 * 2.6998e-3, 2**24 * 6.334e-5, 2**24 * 5.733e-7)):
        assert abs(found - expected) < 5 * expected**0.5 + 1
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.zeros(shape, dtype))
    largest = noise.gaussian(jax.random.key(0), (2,), jnp.dtype("float32"))
    assert float(largest[0]) == pytest.approx((130 * math.log(2)) ** 0.5)


def test_rule_11_only_private_gradients_reach_an_optimizer():
    optimizer = dpj.private(optax.adam(1e-3))
    params = {"w": jnp.zeros(3)}
    out = dpj.clipped_grad(linear, clip_norm=1.0)(params, {"x": jnp.ones((4, 3))})
    state = optimizer.init(params)
    for wrong in (out, out.grads):
        with pytest.raises(TypeError, match="takes a PrivateGradient"):
            optimizer.update(wrong, state, params)
    with pytest.raises(TypeError, match=r"only dptrain\.jax\.privatize"):
        dpj.PrivateGradient(out.grads, None, False)
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=2.0, sample_rate=0.5, steps=1, expected_batch_size=4, delta=1e-5
    )
    with pytest.raises(ValueError, match=r"clipped to 1\.0"):
        dpj.privatize(out, mechanism, Key.from_entropy())
    with pytest.raises(TypeError, match="ClippedSum"):
        dpj.privatize(out.grads, mechanism, Key.from_entropy())
    free = dpj.clipped_grad(linear, clip_norm=1.0, method="non-private")(params, {"x": jnp.ones((4, 3))})
    with pytest.raises(ValueError, match="not clipped"):
        dpj.privatize(free, mechanism, Key.from_entropy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": float("nan")}, "clip_norm"),
        ({"clip_norm": 1.0, "method": "magic"}, "unknown"),
        ({"clip_norm": 1.0, "argnums": 1}, "argnums"),
        ({"clip_norm": 1.0, "rows": 0}, "rows"),
        ({"clip_norm": 1.0, "rows": 2, "method": "ghost"}, "rows"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpj.clipped_grad(linear, **options)


@pytest.mark.parametrize(
    ("loss", "params", "batch", "mask", "message"),
    [
        (linear, {"w": jnp.zeros(3)}, {"x": jnp.ones((4, 3)), "y": jnp.ones(3)}, None, "leading axis"),
        (linear, {"w": jnp.zeros(3)}, {"x": jnp.ones(())}, None, "leading axis"),
        (linear, {"w": jnp.zeros(3)}, {"x": jnp.ones((0, 3))}, None, "at least one row"),
        (linear, {"w": jnp.zeros(3, int)}, {"x": jnp.ones((4, 3))}, None, "no gradient"),
        (linear, {}, {"x": jnp.ones((4, 3))}, None, "no parameters"),
        (linear, {"w": jnp.zeros(3)}, {"x": jnp.ones((4, 3))}, jnp.ones(3, bool), "mask"),
        (linear, {"w": jnp.zeros(3)}, {"x": jnp.ones((4, 3))}, jnp.ones(4), "mask"),
        (lambda p, e: p["w"] * e["x"], {"w": jnp.zeros(3)}, {"x": jnp.ones((4, 3))}, None, "scalar"),
    ],
)
def test_bad_calls_are_refused(loss, params, batch, mask, message):
    with pytest.raises(ValueError, match=message):
        dpj.clipped_grad(loss, clip_norm=1.0)(params, batch, mask=mask)


def test_arguments_by_number_and_what_the_loss_returns_besides():
    def loss(temperature, x, params, y):
        z = x @ params["w"] / temperature
        return jnp.sum((z - y) ** 2), {"z": z, "label": y.astype(int)}

    k = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(k[0], (3, 2))}
    x, y = jax.random.normal(k[1], (5, 3)), jax.random.normal(k[2], (5, 2))
    clipped = dpj.clipped_grad(loss, clip_norm=1.0, argnums=2, batch_argnums=(1, 3), has_aux=True)
    out = clipped(2.0, x, params, y)

    def plain(params, e):
        return loss(2.0, e[0], params, e[1])[0]

    expected, norms, _ = oracle.clipped_sum(plain, params, (x, y), 1.0)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    np.testing.assert_allclose(out.norms, norms)
    np.testing.assert_allclose(out.aux["z"], x @ params["w"] / 2)
    assert out.aux["label"].shape == (5, 2)


def test_second_call_compiles_nothing():
    loss, params, batch = named("mlp")
    clipped = dpj.clipped_grad(loss, clip_norm=1.0)
    clipped(params, batch)
    clipped(params, batch, mask=jnp.arange(6) < 3)
    clipped(params, batch, mask=jnp.arange(6) < 1)
    assert clipped._compiled._cache_size() == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_parts_of_a_batch(rows):
    loss, params, batch = named("vit")
    mask = jnp.array([True, True, False, True, False, False])
    expected, norms, _ = oracle.clipped_sum(loss, params, batch, 0.5, mask)
    out = dpj.clipped_grad(loss, clip_norm=0.5, rows=rows)(params, batch, mask=mask)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    np.testing.assert_allclose(out.norms, norms)
    with pytest.raises(ValueError, match="rows must divide"):
        dpj.clipped_grad(loss, clip_norm=0.5, rows=4)(params, batch)


def test_accumulates_buffers_and_streams():
    loss, params, batch = named("mlp", 12)
    mask = jnp.array([True, False, False] + [False] * 3 + [True] * 3 + [False] * 3)
    expected, norms, _ = oracle.clipped_sum(loss, params, batch, 0.5, mask)
    clipped = dpj.clipped_grad(loss, clip_norm=0.5)
    summed = jax.jit(lambda p, b, m: dpj.accumulate(clipped, p, b, m, physical_batch_size=3))
    out = summed(params, batch, mask)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    np.testing.assert_allclose(out.norms, norms)
    summed(params, batch, ~mask)
    assert summed._cache_size() == 1
    with pytest.raises(ValueError, match="multiple"):
        dpj.accumulate(clipped, params, batch, mask, physical_batch_size=5)
    pieces = [jax.tree.map(lambda x: x[i : i + 3], (batch, mask)) for i in range(0, 12, 3)]  # noqa: B023
    accumulator = dpj.Accumulator(clipped)
    streamed = accumulator(params, pieces)
    assert oracle.relative_error(streamed.grads, expected) < 1e-9
    assert accumulator.compilations == 1
    one, two = (clipped(params, b, mask=m) for b, m in (pieces[0], pieces[2]))
    assert oracle.relative_error((one + two).grads, expected) < 1e-9
    with pytest.raises(ValueError, match="clip norms"):
        _ = one + dpj.clipped_grad(loss, clip_norm=1.0)(params, batch)


def _mechanism(size: int, **options):
    given = {
        "noise_multiplier": 0.5, "clip_norm": 1.0, "sample_rate": 0.25, "steps": 50,
        "expected_batch_size": 0.25 * size,
    }  # fmt: skip
    return Mechanism.constant(**(given | options))


def test_a_poisson_run_is_compiled_once():
    loss, params, batch = named("mlp", 40)
    mechanism = _mechanism(40)
    task = dpj.make_private(
        loss, params, optax.adam(1e-2), jax.tree.map(np.asarray, batch), mechanism, physical_batch_size=4
    )
    steps = list(task.steps())
    assert [s.number for s in steps] == list(range(1, 51))
    assert steps[-1].epsilon is None  # without a delta
    assert task.accumulator.compilations == 1
    assert not list(task.steps())
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), params, task.params)
    assert all(jax.tree.leaves(changed))


def test_steps_tell_what_is_spent():
    loss, params, batch = named("mlp", 40)
    mechanism = _mechanism(40, steps=2, noise_multiplier=2.0, delta=1e-5)
    data = jax.tree.map(np.asarray, batch)
    task = dpj.make_private(loss, params, optax.sgd(0.1), data, mechanism, physical_batch_size=16)
    first, second = (step.epsilon for step in task.steps())
    assert first < second == pytest.approx(mechanism.epsilon()) == pytest.approx(task.epsilon)


def test_the_naive_way_compiles_each_size():
    loss, params, batch = named("mlp", 40)
    options = {"physical_batch_size": 64, "key": Key.from_seed(3)}
    data = jax.tree.map(np.asarray, batch)
    mechanism = _mechanism(40, steps=6, noise_multiplier=1e-9)
    naive = dpj.make_private(loss, params, optax.sgd(0.1), data, mechanism, masked=False, **options)
    masked = dpj.make_private(loss, params, optax.sgd(0.1), data, mechanism, **options)
    list(naive.steps()), list(masked.steps())
    assert naive.accumulator.compilations > 1 == masked.accumulator.compilations
    assert oracle.relative_error(naive.params, masked.params) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mechanism": None}, "Mechanism"),
        ({"optimizer": "adam"}, "optax"),
        ({"dataset": iter(())}, "iterable"),
        ({"dataset": {"x": np.ones((40, 2)), "y": np.ones(3)}}, "different numbers"),
        ({"mechanism": _mechanism(80)}, "expects batches of"),
        ({"physical_batch_size": 0}, "at least 1"),
    ],
)
def test_make_private_refuses(change, message):
    loss, params, batch = named("mlp", 40)
    given = {
        "loss_fn": loss, "params": params, "optimizer": optax.sgd(0.1), "mechanism": _mechanism(40),
        "dataset": jax.tree.map(np.asarray, batch), "physical_batch_size": 4,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        dpj.make_private(**(given | change))
