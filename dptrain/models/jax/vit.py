"""Vision transformers (Dosovitskiy et al. 2021, arXiv 2010.11929) as a function of timm's parameters."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from .parameters import Parameters, initialised


@dataclass(frozen=True)
class ViT:
    """An architecture. The parameters are a dictionary with timm's names and shapes.

    Attributes:
        width, depth, heads: of the transformer; its hidden layers are four times as wide.
        patch: pixels along the side of a patch.
        image_size: pixels along the side of an image.
        classes: of the head.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    image_size: int = 224
    classes: int = 1000

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, by timm's name."""
        d, hidden = self.width, 4 * self.width
        out: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, d),
            "pos_embed": (1, self.tokens, d),
            "patch_embed.proj.weight": (d, 3, self.patch, self.patch),
            "patch_embed.proj.bias": (d,),
        }
        for i in range(self.depth):
            block = {
                "norm1": (d,), "attn.qkv": (3 * d, d), "attn.proj": (d, d),
                "norm2": (d,), "mlp.fc1": (hidden, d), "mlp.fc2": (d, hidden),
            }  # fmt: skip
            for name, shape in block.items():
                out[f"blocks.{i}.{name}.weight"] = shape
                out[f"blocks.{i}.{name}.bias"] = shape[:1]
        out |= {"norm.weight": (d,), "norm.bias": (d,)}
        return out | {"head.weight": (self.classes, d), "head.bias": (self.classes,)}

    def init(self, key: Array) -> Parameters:
        """Random parameters as timm draws them: matrices from a truncated normal of deviation 0.02."""

        def draw(key: Array, name: str, shape: tuple[int, ...]) -> Array:
            scale = 1e-6 if name == "cls_token" else 0.02
            return scale * jax.random.truncated_normal(key, -2 / scale, 2 / scale, shape)

        return initialised(self.shapes(), key, draw)

    def __call__(self, parameters: Parameters, image: Array) -> Array:
        """Logits ``[classes]`` of one image ``[3, H, W]``, normalised."""
        p = parameters
        x = linear(_patches(image, self.patch), p["patch_embed.proj.weight"], p["patch_embed.proj.bias"])
        x = jnp.concatenate([p["cls_token"][0], x]) + p["pos_embed"][0]
        for i in range(self.depth):
            block = {n.split(".", 2)[2]: v for n, v in p.items() if n.startswith(f"blocks.{i}.")}
            x = self._block(block, x)
        return linear(layer_norm(x[0], p["norm.weight"], p["norm.bias"]), p["head.weight"], p["head.bias"])

    def _block(self, p: Parameters, x: Array) -> Array:
        h = layer_norm(x, p["norm1.weight"], p["norm1.bias"])
        h = linear(h, p["attn.qkv.weight"], p["attn.qkv.bias"])
        # Cut, and not indexed: the gradients are put side by side, and not padded and added.
        q, k, v = (y.reshape(len(x), self.heads, -1).swapaxes(0, 1) for y in jnp.split(h, 3, -1))
        scores = jnp.einsum("hqe,hke->hqk", q * q.shape[-1] ** -0.5, k)
        h = jnp.einsum("hqk,hke->qhe", jax.nn.softmax(scores, -1), v).reshape(x.shape)
        x = x + linear(h, p["attn.proj.weight"], p["attn.proj.bias"])
        h = layer_norm(x, p["norm2.weight"], p["norm2.bias"])
        h = jax.nn.gelu(linear(h, p["mlp.fc1.weight"], p["mlp.fc1.bias"]), approximate=False)
        return x + linear(h, p["mlp.fc2.weight"], p["mlp.fc2.bias"])


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """``x [..., in]`` by a weight ``[out, ...]``, whose other axes are those of ``in``."""
    return x @ weight.reshape(weight.shape[0], -1).T + bias


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * weight + bias


def _patches(image: Array, side: int) -> Array:
    """``[3, H, W] -> [patches, 3 side side]``."""
    channels, height, width = image.shape
    x = image.reshape(channels, height // side, side, width // side, side)
    return x.transpose(1, 3, 0, 2, 4).reshape(-1, channels * side * side)
