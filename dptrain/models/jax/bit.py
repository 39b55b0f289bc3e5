"""BiT-ResNets (Kolesnikov et al. 2020, arXiv 1912.11370) as a function of timm's parameters.

Residual networks with normalisation before the activation, group norm and standardised weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from .parameters import Parameters, initialised

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class BiTResNet:
    """An architecture. The parameters are a dictionary with timm's names and shapes.

    Attributes:
        layers: 50, 101 or 152.
        width: factor of all channels.
        classes: of the head.
    """

    layers: int
    width: int = 1
    classes: int = 1000

    def blocks(self) -> Iterator[tuple[str, int, int, int, bool]]:
        """Name, channels in, channels out, stride, and whether the shortcut has a convolution."""
        before = 64 * self.width
        for stage, depth in enumerate(LAYERS[self.layers]):
            channels = 256 * 2**stage * self.width
            for i in range(depth):
                stride = 2 if i == 0 and stage else 1
                yield f"stages.{stage}.blocks.{i}.", before, channels, stride, i == 0
                before = channels

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by timm's name."""
        out: dict[str, tuple[int, ...]] = {"stem.conv.weight": (64 * self.width, 3, 7, 7)}
        channels = 0
        for name, before, channels, _, projected in self.blocks():
            inner = channels // 4
            if projected:
                out[name + "downsample.conv.weight"] = (channels, before, 1, 1)
            for i, size in enumerate((before, inner, inner), 1):
                out[f"{name}norm{i}.weight"] = out[f"{name}norm{i}.bias"] = (size,)
            out[name + "conv1.weight"] = (inner, before, 1, 1)
            out[name + "conv2.weight"] = (inner, inner, 3, 3)
            out[name + "conv3.weight"] = (channels, inner, 1, 1)
        out |= {"norm.weight": (channels,), "norm.bias": (channels,)}
        return out | {"head.fc.weight": (self.classes, channels, 1, 1), "head.fc.bias": (self.classes,)}

    def init(self, key: Array) -> Parameters:
        """Random parameters: normal with variance 2 / fan-in, the head's 0.01 squared, scales 1, shifts 0."""

        def draw(key: Array, name: str, shape: tuple[int, ...]) -> Array:
            scale = 0.01 if name.startswith("head") else (2 / math.prod(shape[1:])) ** 0.5
            return scale * jax.random.normal(key, shape)

        return initialised(self.shapes(), key, draw)

    def __call__(self, parameters: Parameters, image: Array) -> Array:
        """Logits ``[classes]`` of one image ``[3, H, W]``, normalised."""
        p = parameters
        x = image.transpose(1, 2, 0)[None]
        x = convolution(x, standardised(p["stem.conv.weight"]), stride=2)
        x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        for name, _, _, stride, projected in self.blocks():
            block = {n[len(name) :]: v for n, v in p.items() if n.startswith(name)}
            x = _block(block, x, stride, projected)
        x = _normed(p, "norm", x).mean((0, 1, 2))
        return p["head.fc.weight"][:, :, 0, 0] @ x + p["head.fc.bias"]


def _block(p: Parameters, x: Array, stride: int, projected: bool) -> Array:
    h = _normed(p, "norm1", x)
    if projected:
        x = convolution(h, standardised(p["downsample.conv.weight"]), stride)
    h = convolution(h, standardised(p["conv1.weight"]))
    h = convolution(_normed(p, "norm2", h), standardised(p["conv2.weight"]), stride)
    return x + convolution(_normed(p, "norm3", h), standardised(p["conv3.weight"]))


def _normed(p: Parameters, name: str, x: Array) -> Array:
    return jax.nn.relu(group_norm(x, p[name + ".weight"], p[name + ".bias"]))


def standardised(weight: Array) -> Array:
    """Mean 0 and variance 1 of each output channel of ``[out, in, height, width]``."""
    axes = (1, 2, 3)
    centred = weight - jnp.mean(weight, axes, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + 1e-8)


def convolution(x: Array, weight: Array, stride: int = 1) -> Array:
    """``x [1, H, W, in]`` by ``weight [out, in, k, k]``, padded to keep its place."""
    side = weight.shape[-1]
    before = (stride - 1 + side - 1) // 2
    return lax.conv_general_dilated(
        x,
        weight.transpose(2, 3, 1, 0),
        (stride, stride),
        [(before, before)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def group_norm(x: Array, weight: Array, bias: Array, groups: int = 32) -> Array:
    shape = x.shape
    x = x.reshape(-1, groups, shape[-1] // groups)
    x = x - jnp.mean(x, (0, 2), keepdims=True)
    x = x * lax.rsqrt(jnp.mean(jnp.square(x), (0, 2), keepdims=True) + 1e-5)
    return x.reshape(shape) * weight + bias
