"""The models that are timed, as losses of one example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dptrain.models.jax import BiTResNet, ViT

CLASSES = 100


@dataclass(frozen=True)
class Case:
    """A model and a batch of images of random numbers.

    Attributes:
        model: ``model(params, image [3, H, W]) -> logits``.
        init: ``key -> params``.
    """

    name: str
    model: Callable[[Any, Array], Array]
    init: Callable[[Array], Any]
    image_size: int
    batch_size: int

    def loss(self, params: Any, example: tuple[Array, Array]) -> Array:
        image, label = example
        return -jax.nn.log_softmax(self.model(params, image))[label]

    def batch(self, size: int) -> tuple[Array, Array]:
        shape = (size, 3, self.image_size, self.image_size)
        return jax.random.normal(jax.random.key(1), shape, jnp.float32), jnp.arange(size) % CLASSES


def _convnet(params: dict, image: Array) -> Array:
    """Weight-standardised, grouped and depthwise convolutions."""

    def conv(x: Array, name: str, groups: int = 1, stride: int = 1, standardise: bool = True) -> Array:
        w = params[name]
        if standardise:
            centred = w - w.mean((0, 1, 2), keepdims=True)
            w = centred * lax.rsqrt(jnp.square(centred).mean((0, 1, 2), keepdims=True) + 1e-6)
        x = lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        return jax.nn.relu(x + params[name + ".bias"])

    x = conv(image.transpose(1, 2, 0)[None], "stem")
    x = conv(x, "grouped", groups=4, stride=2)
    x = conv(x, "depthwise", groups=64, standardise=False)
    x = conv(x, "pointwise", stride=2)
    return x.mean((0, 1, 2)) @ params["head"]


def _convnet_params(key: Array) -> dict:
    shapes = {
        "stem": (3, 3, 3, 64), "grouped": (3, 3, 16, 64), "depthwise": (5, 5, 1, 64),
        "pointwise": (1, 1, 64, 128), "head": (128, CLASSES),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    params = {n: 0.1 * jax.random.normal(k, s, jnp.float32) for k, (n, s) in zip(keys, shapes.items())}
    return params | {f"{n}.bias": jnp.zeros(s[-1], jnp.float32) for n, s in shapes.items() if n != "head"}


def _of(name: str, model: ViT | BiTResNet, image_size: int, batch_size: int) -> Case:
    return Case(name, model, model.init, image_size, batch_size)


CASES = {
    case.name: case
    for case in (
        _of("vit-tiny", ViT(192, 12, 3, classes=CLASSES), 224, 16),
        _of("vit-768x4", ViT(768, 4, 12, image_size=128, classes=CLASSES), 128, 16),
        Case("convnet", _convnet, _convnet_params, 32, 32),
        _of("bit-50x1", BiTResNet(50, 1, CLASSES), 224, 8),
        _of("vit-base", ViT(768, 12, 12, classes=CLASSES), 224, 4),
    )
}
