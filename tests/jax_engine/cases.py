"""Losses of one example, in the ways in which people write models for JAX."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

F = jnp.float64


@dataclass(frozen=True)
class Case:
    """``make(key, B) -> (loss, params, batch of B)``."""

    name: str
    make: Callable[[jax.Array, int], tuple[Callable, Any, Any]]


CASES: list[Case] = []


def case(function: Callable) -> Callable:
    CASES.append(Case(function.__name__, function))
    return function


def normal(key, *shape, scale=1.0):
    return scale * jax.random.normal(key, shape, F)


def keys(key):
    while True:
        key, one = jax.random.split(key)
        yield one


def cross_entropy(logits, label):
    return -jax.nn.log_softmax(logits)[label]


def images(k, size, side=8, channels=3):
    return {"x": normal(next(k), size, side, side, channels), "y": jax.random.randint(next(k), (size,), 0, 4)}


@case
def mlp(key, size):
    k = keys(key)
    params = {
        "w1": normal(next(k), 6, 8),
        "b1": normal(next(k), 8),
        "w2": normal(next(k), 8, 4),
        "b2": jnp.zeros(4, F),
    }

    def loss(p, e):
        h = jax.nn.relu(e["x"] @ p["w1"] + p["b1"])
        return cross_entropy(h @ p["w2"] + p["b2"], e["y"])

    return loss, params, {"x": normal(next(k), size, 6), "y": jax.random.randint(next(k), (size,), 0, 4)}


def _norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def _attention(p, x, heads):
    d = x.shape[1]
    q, k, v = (p["qkv"].reshape(d, 3, heads, d // heads).transpose(1, 0, 2, 3)[i] for i in range(3))
    q, k, v = (jnp.einsum("td,dhe->hte", x, w) for w in (q, k, v))
    a = jax.nn.softmax(q @ k.swapaxes(1, 2) / (d // heads) ** 0.5, -1)
    return jnp.einsum("hte,hed->td", a @ v, p["out"].reshape(heads, d // heads, d))


def _block(p, x, heads=2):
    x = x + p["scale"] * _attention(p, _norm(x, p["g1"], p["b1"]), heads)
    h = jax.nn.gelu(_norm(x, p["g2"], p["b2"]) @ p["up"] + p["c1"])
    return x + h @ p["down"] + p["c2"]


def _block_params(k, d, *lead):
    def n(*s, scale=0.3):
        return normal(next(k), *lead, *s, scale=scale)

    return {
        "qkv": n(d, 3 * d), "out": n(d, d), "up": n(d, 2 * d), "down": n(2 * d, d),
        "c1": n(2 * d), "c2": n(d),
        "g1": 1 + n(d), "b1": n(d), "g2": 1 + n(d), "b2": n(d), "scale": n(d, scale=1.0),
    }  # fmt: skip


@case
def vit(key, size):
    k, d = keys(key), 8
    params = {
        "patch": normal(next(k), 4, 4, 3, d, scale=0.2),
        "cls": normal(next(k), d),
        "pos": normal(next(k), 5, d),
        "blocks": [_block_params(k, d) for _ in range(2)],
        "head": normal(next(k), d, 4),
    }

    def loss(p, e):
        x = lax.conv_general_dilated(
            e["x"][None], p["patch"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.concatenate([p["cls"][None], x.reshape(-1, d)]) + p["pos"]
        for block in p["blocks"]:
            x = _block(block, x)
        return cross_entropy(x[0] @ p["head"], e["y"])

    return loss, params, images(k, size)


def _standardised(w):
    mean, var = w.mean((0, 1, 2), keepdims=True), w.var((0, 1, 2), keepdims=True)
    return (w - mean) / jnp.sqrt(var + 1e-5)


@case
def convolutions(key, size):
    """Weight-standardised, grouped, depthwise, strided, dilated, transposed."""
    k = keys(key)
    params = {
        "a": normal(next(k), 3, 3, 3, 8), "gain": normal(next(k), 8), "b": normal(next(k), 3, 3, 4, 8),
        "c": normal(next(k), 5, 5, 1, 8), "d": normal(next(k), 3, 3, 8, 4), "e": normal(next(k), 2, 2, 4, 4),
        "bias": normal(next(k), 8), "head": normal(next(k), 4, 4),
    }  # fmt: skip

    def loss(p, e):
        def conv(x, w, groups=1, **options):
            options = {"window_strides": (1, 1), "padding": "SAME"} | options
            return lax.conv_general_dilated(
                x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups, **options
            )

        x = jnp.tanh(conv(e["x"][None], _standardised(p["a"]) * p["gain"]))
        x = jnp.tanh(conv(x, _standardised(p["b"]), 2, window_strides=(2, 2)) + p["bias"])
        x = jnp.tanh(conv(x, p["c"], 8))
        x = jnp.tanh(conv(x, p["d"], rhs_dilation=(2, 2), padding=[(2, 1), (1, 2)]))
        x = jnp.tanh(lax.conv_transpose(x, p["e"], (2, 2), "VALID"))
        return cross_entropy(x.mean((0, 1, 2)) @ p["head"], e["y"])

    return loss, params, images(k, size)


@case
def tied_language_model(key, size):
    k, vocabulary, d, t = keys(key), 11, 6, 7
    params = {
        "table": normal(next(k), vocabulary, d),
        "pos": normal(next(k), t, d),
        "block": _block_params(k, d),
    }

    def loss(p, e):
        x = _block(p["block"], p["table"][e["tokens"]] + p["pos"])
        logits = x @ p["table"].T
        return jnp.mean(jax.vmap(cross_entropy)(logits[:-1], e["tokens"][1:]))

    return loss, params, {"tokens": jax.random.randint(next(k), (size, t), 0, vocabulary)}


@case
def scanned_layers(key, size):
    """Stacked layers in a scan, recomputed in the backward pass, with dropout keys in the batch."""
    k, d, layers = keys(key), 6, 3
    params = {
        "layers": _block_params(k, d, layers),
        "in": normal(next(k), 5, d),
        "head": normal(next(k), d, 4),
    }

    def loss(p, e):
        x = e["x"] @ p["in"]

        @jax.checkpoint
        def layer(carry, layer):
            x, key = carry
            key, now = jax.random.split(key)
            x = _block(layer, x)
            return (jnp.where(jax.random.bernoulli(now, 0.8, x.shape), x / 0.8, 0), key), None

        (x, _), _ = lax.scan(layer, (x, e["key"]), p["layers"])
        return cross_entropy(x.mean(0) @ p["head"], e["y"])

    batch = {
        "x": normal(next(k), size, 7, 5),
        "key": jax.random.split(next(k), size),
        "y": jax.random.randint(next(k), (size,), 0, 4),
    }
    return loss, params, batch


@jax.custom_vjp
def _quantised(x, w):
    return x @ jnp.round(4 * w) / 4


_quantised.defvjp(
    lambda x, w: (_quantised(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ jnp.tanh(g))
)


@case
def custom_vjp(key, size):
    k = keys(key)
    params = {"w": normal(next(k), 5, 6), "v": normal(next(k), 6, 3), "softness": normal(next(k), 3)}

    def loss(p, e):
        h = _quantised(e["x"], p["w"])
        h = jax.nn.softplus(p["softness"]) * jnp.tanh(h @ p["v"])
        return jnp.sum(h**2)

    return loss, params, {"x": normal(next(k), size, 4, 5)}


@case
def nnx_attention(key, size):
    k = keys(key)
    model = nnx.MultiHeadAttention(
        num_heads=2, in_features=6, decode=False, param_dtype=F, dtype=F, rngs=nnx.Rngs(0)
    )
    graph, params = nnx.split(model, nnx.Param)

    def loss(p, e):
        return jnp.sum(jnp.sin(nnx.merge(graph, p)(e["x"][None], sow_weights=False)))

    return loss, params, {"x": normal(next(k), size, 5, 6)}


@case
def equinox_gru(key, size):
    k = keys(key)
    cell = eqx.nn.GRUCell(4, 6, key=next(k), dtype=F)
    head = eqx.nn.Linear(6, 3, key=next(k), dtype=F)
    params, static = eqx.partition((cell, head, normal(next(k), 6)), eqx.is_inexact_array)

    def loss(p, e):
        cell, head, start = eqx.combine(p, static)
        end, _ = lax.scan(lambda h, x: (cell(x, h), None), start, e["x"])
        return cross_entropy(head(end), e["y"])

    return loss, params, {"x": normal(next(k), size, 5, 4), "y": jax.random.randint(next(k), (size,), 0, 3)}


@case
def mixture_of_experts(key, size):
    k, experts, d = keys(key), 3, 5
    params = {
        "gate": normal(next(k), d, experts),
        "up": normal(next(k), experts, d, 7),
        "down": normal(next(k), experts, 7, d),
        "bias": normal(next(k), experts, 7),
    }

    def loss(p, e):
        weight, expert = lax.top_k(jax.nn.softmax(e["x"] @ p["gate"]), 2)
        send = jax.nn.one_hot(expert, experts, dtype=F)  # [T, 2, E]
        x = jnp.einsum("tke,td->etkd", send, e["x"])
        h = jax.nn.gelu(
            jnp.einsum("etkd,edf->etkf", x, p["up"])
            + p["bias"][:, None, None] * send.transpose(2, 0, 1)[..., None]
        )
        y = jnp.einsum("etkf,efd,tk->td", h, p["down"], weight)
        return jnp.sum(y**2)

    return loss, params, {"x": normal(next(k), size, 6, d)}


@case
def chosen_expert(key, size):
    """The data pick a matrix out of a stack."""
    k = keys(key)
    params = {"w": normal(next(k), 4, 5, 3), "b": normal(next(k), 4, 3)}

    def loss(p, e):
        return jnp.sum(jnp.tanh(e["x"] @ p["w"][e["i"]] + p["b"][e["i"]]))

    return loss, params, {"x": normal(next(k), size, 6, 5), "i": jax.random.randint(next(k), (size,), 0, 4)}


@case
def low_rank(key, size):
    k = keys(key)
    params = {"w": normal(next(k), 5, 6), "a": normal(next(k), 5, 2), "b": normal(next(k), 2, 6)}

    def loss(p, e):
        return jnp.sum(jnp.tanh(e["x"] @ (p["w"] + 0.5 * p["a"] @ p["b"])))

    return loss, params, {"x": normal(next(k), size, 4, 5)}


@case
def sliced_parameters(key, size):
    """One matrix in pieces that overlap, and in pieces that do not."""
    k = keys(key)
    params = {"w": normal(next(k), 6, 9), "v": normal(next(k), 8, 4)}

    def loss(p, e):
        a, b, c = jnp.split(p["w"], 3, axis=1)
        h = jnp.tanh(e["x"] @ a) * jnp.tanh(e["x"] @ b) + e["x"] @ c
        return jnp.sum(h @ p["v"][:3] + jnp.sin(h @ p["v"][2:5]))

    return loss, params, {"x": normal(next(k), size, 4, 6)}


@case
def single_rows(key, size):
    """Rows picked one by one, by numbers that need not be in range; some again, in turns of a loop."""
    k = keys(key)
    params = {
        "user": normal(next(k), 5, 6),
        "place": normal(next(k), 4, 2, 3),
        "turns": normal(next(k), 7, 6),
    }

    def loss(p, e):
        place = lax.dynamic_slice(p["place"], (e["place"], 0, 1), (1, 2, 3))
        h, _ = lax.scan(lambda h, t: (jnp.tanh(h + p["turns"][t]), None), p["user"][e["user"]], e["turns"])
        return jnp.sum(h * place.reshape(-1)) + jnp.sum(jnp.sin(p["user"][e["turns"][0] % 5]))

    numbers = {name: jax.random.randint(next(k), (size,), -3, 8) for name in ("user", "place")}
    return loss, params, numbers | {"turns": jax.random.randint(next(k), (size, 5), 0, 7)}


@case
def weight_norm_used_thrice(key, size):
    k = keys(key)
    params = {"v": normal(next(k), 6, 6), "g": normal(next(k), 6)}

    def loss(p, e):
        w = p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0)
        x = e["x"]
        for _ in range(3):
            x = jnp.tanh(x @ w)
        return jnp.sum(x) + 0.1 * jnp.sum(p["v"] ** 2)

    return loss, params, {"x": normal(next(k), size, 3, 6)}


@case
def loops_within_loops(key, size):
    """Stacked layers, each of which is applied over time: slices outside, one matrix for all turns inside, a
    standardised weight, a counter, and a carry that is made of parameters alone."""
    k, layers, d = keys(key), 2, 4
    params = {
        "w": normal(next(k), layers, d, d),
        "u": normal(next(k), layers, d, d),
        "start": normal(next(k), layers, d),
        "grow": normal(next(k), d),
        "shared": normal(next(k), d, d),
    }

    def loss(p, e):
        def layer(carry, layer):
            x, growth, number = carry
            w = layer["w"] - layer["w"].mean(0)

            def turn(h, x):
                h = jnp.tanh(x @ w + h @ layer["u"] + (x * growth) @ p["shared"])
                return h, h

            _, x = lax.scan(turn, layer["start"], x, reverse=True)
            return (x * (1 + number), growth * jnp.cos(p["grow"]), number + 1), x.sum()

        (x, growth, _), sums = lax.scan(layer, (e["x"], p["grow"], 0), {n: p[n] for n in ("w", "u", "start")})
        return jnp.sum(x * growth) + jnp.sum(sums)

    return loss, params, {"x": normal(next(k), size, 5, d)}


@case
def layers_over_time(key, size):
    """A stack of layers at each time step: the outer loop takes the weights whole, the inner one slices them.
    And a parameter that a loop merely hands on."""
    k, layers, d = keys(key), 3, 4
    params = {"w": normal(next(k), layers, d, d), "u": normal(next(k), d, d), "v": normal(next(k), d)}

    def loss(p, e):
        def turn(h, x):
            def layer(h, w):
                return jnp.tanh(h @ w + x @ p["u"]), None

            h, _ = lax.scan(layer, h, p["w"])
            return h, (h, p["v"])

        h, (hs, vs) = lax.scan(turn, jnp.zeros(d, F), e["x"])
        return jnp.sum(hs * vs) + jnp.sum(h)

    return loss, params, {"x": normal(next(k), size, 5, d)}


@case
def used_both_ways(key, size):
    """By a product, which has a rule, and by something that has none."""
    k = keys(key)
    params = {"w": normal(next(k), 4, 4)}

    def loss(p, e):
        return (
            jnp.sum(jnp.tanh(e["x"] @ p["w"])) + jnp.sum(jnp.sin(p["w"] * e["x"][0])) + jnp.sum(p["w"] ** 3)
        )

    return loss, params, {"x": normal(next(k), size, 3, 4)}


@case
def branches(key, size):
    """The data choose between branches that use different parameters."""
    k = keys(key)
    params = {"w": normal(next(k), 4, 4), "v": normal(next(k), 4, 4), "b": normal(next(k), 4)}

    def loss(p, e):
        h = lax.cond(e["x"][0, 0] > 0, lambda x: x @ p["w"] + p["b"], lambda x: jnp.sin(x @ p["v"]), e["x"])
        return jnp.sum(h**2)

    return loss, params, {"x": normal(next(k), size, 3, 4)}


@case
def relative_positions(key, size):
    """A table read by constant indices, repeated over heads and added to data."""
    k, t = keys(key), 4
    params = {"table": normal(next(k), 2 * t - 1, 2), "w": normal(next(k), 5, 2)}

    def loss(p, e):
        index = jnp.arange(t)[:, None] - jnp.arange(t)[None] + t - 1
        scores = jnp.einsum("td,dh->ht", e["x"], p["w"])[:, None] + p["table"][index].transpose(2, 0, 1)
        return jnp.sum(jax.nn.softmax(scores, -1) ** 2)

    return loss, params, {"x": normal(next(k), size, t, 5)}


def _out_of_bounds(mode: str):
    def make(key, size):
        k = keys(key)
        params = {"table": normal(next(k), 5, 3), "w": normal(next(k), 3, 3)}

        def loss(p, e):
            rows = p["table"].at[e["i"]].get(mode=mode, fill_value=0)
            return jnp.sum(jnp.tanh(rows @ p["w"]) * e["x"])

        low, high = (0, 5) if mode == "promise_in_bounds" else (-3, 9)
        batch = {"i": jax.random.randint(next(k), (size, 8), low, high), "x": normal(next(k), size, 8, 3)}
        return loss, params, batch

    make.__name__ = f"out_of_bounds_{mode}"
    return make


case(_out_of_bounds("fill"))
case(_out_of_bounds("clip"))
case(_out_of_bounds("promise_in_bounds"))


@case
def linen_model(key, size):
    k = keys(key)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Conv(6, (3, 3), param_dtype=F)(x)
            x = linen.GroupNorm(2, param_dtype=F)(x)
            x = linen.avg_pool(jax.nn.swish(x), (2, 2), (2, 2))
            x = linen.ConvTranspose(4, (2, 2), strides=(2, 2), param_dtype=F)(x)
            x = linen.LayerNorm(param_dtype=F)(x)
            return linen.Dense(4, param_dtype=F)(x.mean((0, 1)))

    net = Net()
    params = net.init(next(k), jnp.zeros((8, 8, 3), F))

    def loss(p, e):
        return cross_entropy(net.apply(p, e["x"]), e["y"])

    return loss, params, images(k, size)


@case
def linen_scan(key, size):
    """Flax's own lifted scan and remat."""
    k = keys(key)

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            h = linen.LayerNorm(param_dtype=F)(x)
            h = linen.MultiHeadDotProductAttention(num_heads=2, param_dtype=F)(h)
            return x + linen.Dense(6, param_dtype=F)(h), None

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(
                linen.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )()
            x, _ = layers(x, None)
            return linen.Dense(4, param_dtype=F)(x.mean(0))

    net = Net()
    params = net.init(next(k), jnp.zeros((5, 6), F))

    def loss(p, e):
        return cross_entropy(net.apply(p, e["x"]), e["y"])

    return loss, params, {"x": normal(next(k), size, 5, 6), "y": jax.random.randint(next(k), (size,), 0, 4)}


@case
def haiku_lstm(key, size):
    k = keys(key)

    def forward(x):
        core = hk.LSTM(5)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(None))
        return hk.Linear(3)(out[-1])

    net = hk.without_apply_rng(hk.transform(forward))
    params = jax.tree.map(lambda p: p.astype(F), net.init(next(k), jnp.zeros((6, 4), F)))

    def loss(p, e):
        return cross_entropy(net.apply(p, e["x"]), e["y"])

    return loss, params, {"x": normal(next(k), size, 6, 4), "y": jax.random.randint(next(k), (size,), 0, 3)}
