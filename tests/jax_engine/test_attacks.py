"""Losses that once were silently wrong, or crashed where a right result is due."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dptrain.jax as dpj
from dptrain import Mechanism
from dptrain.core.entropy import Key

from . import oracle

METHODS = pytest.mark.parametrize("method", ["auto", "bk-ghost", "per-example"])


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def check(loss, params, batch, method, clip_norm=1.0, tolerance=1e-9):
    expected, norms, _ = oracle.clipped_sum(loss, params, batch, clip_norm)
    out = dpj.clipped_grad(loss, clip_norm=clip_norm, method=method)(params, batch)
    assert oracle.relative_error(out.grads, expected) < tolerance
    np.testing.assert_allclose(out.norms, norms, rtol=tolerance * 10)


@METHODS
def test_parameters_behind_complex_values(method):
    """As in linear recurrent units, or a filter in the frequency domain."""

    def loss(p, e):
        eigenvalue = jnp.exp(-jnp.exp(p["nu"]) + 1j * p["theta"])
        h = jnp.fft.ifft(jnp.fft.fft(e["x"]) * jnp.fft.fft(p["filter"])).real
        return jnp.sum(jnp.abs(h * eigenvalue) ** 2) + jnp.sum(e["x"] @ p["w"])

    params = {"nu": normal(0, 4), "theta": normal(1, 4), "filter": normal(2, 4), "w": normal(3, 4, 2)}
    check(loss, params, {"x": normal(4, 5, 4)}, method)
    only = {"filter": params["filter"]}
    check(lambda p, e: jnp.sum(jnp.abs(jnp.fft.fft(p["filter"]) * e) ** 2), only, normal(4, 5, 4), method)


@METHODS
@pytest.mark.parametrize("positions", [1, 3])
def test_squares_that_vanish_beside_large_ones(method, positions):
    """Data of 1e18 and a gradient of 1e-20: their product counts, though the square of one is zero."""

    def loss(p, e):
        return jnp.sum((e @ p["w"]) * jnp.float32(1e-20))

    params = {"w": jnp.zeros((300, 100), jnp.float32)}
    batch = jnp.full((2, positions, 300), 1e18, jnp.float32)
    clip_norm = 1e-3
    out = dpj.clipped_grad(loss, clip_norm=clip_norm, method=method)(params, batch)
    part = float(optax.tree.norm(out.grads)) / 2
    assert 0.99 * clip_norm < part <= clip_norm * (1 + 1e-5)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"])
@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_indices_of_narrow_types(dtype, mode):
    high = min(120, np.iinfo(dtype).max)

    def loss(p, e):
        return jnp.sum(jnp.take(p, e, axis=0, mode=mode, fill_value=0) ** 2)

    for rows in (100, 300):
        ids = np.random.default_rng(0).integers(0, high, (4, 6)).astype(dtype)
        check(loss, normal(0, rows, 3), jnp.asarray(ids), "bk-ghost")


def test_keys_that_vmap_draws_together():
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 4)

    def loss(p, e):
        return jnp.sum(p * e["x"] * jax.random.normal(e["key"], (3,)))

    batch = {"x": normal(0, 4, 3), "key": keys}
    check(loss, normal(1, 3), batch, "auto")
    assert dpj.clipped_grad(loss, clip_norm=1.0).plan(normal(1, 3), batch).rows == 1
    with pytest.raises(dpj.Refused, match="rbg"):
        dpj.clipped_grad(loss, clip_norm=1.0, method="bk-ghost")(normal(1, 3), batch)


def test_what_is_returned_besides_is_no_part_of_the_loss():
    def loss(p, e):
        return jnp.sum(e @ p["w"]), {"norm": jnp.sum(p["w"] ** 2), "other": p["b"] * e[0]}

    params, batch = {"w": normal(0, 3, 2), "b": jnp.ones(3)}, normal(1, 4, 3)
    with pytest.raises(dpj.Refused, match="does not depend on b"):
        dpj.clipped_grad(loss, clip_norm=1.0, has_aux=True)(params, batch)
    clipped = dpj.clipped_grad(loss, clip_norm=1.0, has_aux=True, allow_unused=True)
    assert not clipped.plan(params, batch).parts[0].direct
    out = clipped(params, batch)
    expected, _, _ = oracle.clipped_sum(lambda p, e: loss(p, e)[0], params, batch, 1.0)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    np.testing.assert_allclose(out.aux["other"], jnp.ones(3) * batch[:, :1])


def test_loops_that_stopped_gradients_enter():
    def loss(p, e):
        still = jax.lax.stop_gradient(p["w"])
        steps = jax.lax.while_loop(lambda s: s[1] < 5, lambda s: (s[0] @ still, s[1] + 1), (e, 0))[0]
        return jnp.sum(jax.lax.stop_gradient(steps) * (e @ p["w"]))

    check(loss, {"w": 0.1 * normal(0, 3, 3)}, normal(1, 4, 3), "auto")


@METHODS
def test_bfloat16_with_calls_inside(method):
    def loss(p, e):
        w = jax.nn.softplus(p["w"].astype(jnp.bfloat16))
        h = jax.nn.relu(e.astype(jnp.bfloat16) @ w) @ w.T
        return jnp.sum(h.astype(jnp.float32))

    params, batch = {"w": normal(0, 5, 6, dtype=jnp.float32)}, normal(1, 4, 3, 5, dtype=jnp.float32)
    if method != "auto":  # which takes one example after another
        with pytest.raises(dpj.Refused, match="custom_jvp_call in a type narrower"):
            dpj.clipped_grad(loss, clip_norm=1.0, method=method)(params, batch)
        return
    for b in range(4):
        out = dpj.clipped_grad(loss, clip_norm=1.0, method=method)(params, batch, mask=jnp.arange(4) == b)
        assert 0.98 < float(optax.tree.norm(out.grads)) <= 1 + 1e-5


@METHODS
def test_single_and_double_precision_together(method):
    def loss(p, e):
        return jnp.sum(jnp.tanh(e @ p["w"].astype(jnp.float64)) * p["s"])

    params = {"w": normal(0, 3, 2, dtype=jnp.float32), "s": normal(1, 2)}
    check(loss, params, normal(2, 4, 5, 3), method, tolerance=1e-5)


@METHODS
def test_nothing_to_look_at(method):
    """No tokens, no layers, no features."""

    def loss(p, e):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), e["x"], p["layers"])
        return jnp.sum(h @ p["w"]) + jnp.sum(e["none"] @ p["w"])

    params = {"layers": jnp.zeros((0, 3, 3)), "w": normal(0, 3, 2)}
    batch = {"x": normal(1, 4, 3), "none": jnp.zeros((4, 0, 3))}
    check(loss, params, batch, method)


def test_callbacks_are_not_timed(monkeypatch, tmp_path, capfd):
    from dptrain.jax import planner

    monkeypatch.setattr(planner, "WORTH_MEASURING", 0)
    monkeypatch.setenv("DPTRAIN_CACHE", str(tmp_path))

    def loss(p, e):
        jax.debug.print("seen {}", e[0])
        return jnp.sum(e @ p["w"])

    dpj.clipped_grad(loss, clip_norm=1.0)({"w": normal(0, 3, 2)}, jnp.arange(12.0).reshape(4, 3))
    jax.effects_barrier()
    seen = capfd.readouterr().out.split("\n")
    assert {line for line in seen if line} <= {f"seen {x}" for x in ("0.0", "3.0", "6.0", "9.0")}


def test_the_door_stays_shut():
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, steps=1, expected_batch_size=4
    )
    clipped = dpj.clipped_grad(lambda p, e: jnp.sum(p * e), clip_norm=1.0)
    gradient = dpj.privatize(clipped(jnp.ones(3), jnp.ones((4, 3))), mechanism, Key.from_entropy())
    with pytest.raises(AttributeError, match="not changed"):
        gradient.grads = jnp.ones(3)
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(lambda p, e: dpj.privatize(clipped(p, e), mechanism, Key.from_seed(0)).grads)(
            jnp.ones(3), jnp.ones((4, 3))
        )


def test_lists_are_examples():
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, steps=2, expected_batch_size=4
    )
    data = [{"x": np.full(3, i, np.float32)} for i in range(8)]
    options = {"physical_batch_size": 4}
    task = dpj.make_private(
        lambda p, e: jnp.sum(p * e["x"]), jnp.ones(3), optax.sgd(0.1), data, mechanism, **options
    )
    assert len(list(task.steps())) == 2
    with pytest.raises(TypeError, match="key must be"):
        dpj.make_private(lambda p, e: 0.0, jnp.ones(3), optax.sgd(0.1), data, mechanism, key=3, **options)
    with pytest.raises(ValueError, match="has_aux"):
        dpj.clipped_grad(lambda p, e: (jnp.sum(p * e), 1), clip_norm=1.0)(jnp.ones(3), jnp.ones((4, 3)))
