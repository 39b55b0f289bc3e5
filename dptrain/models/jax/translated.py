"""A PyTorch model as a function for JAX of the same parameters, by the same names.

The paper's architectures have functions of their own; small networks are made of a dozen kinds of layers,
each of which is a line here. What is neither is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array, lax
from torch import nn

from ..errors import ModelError
from .build import architecture

Parameters = Mapping[str, Array]
#: from all parameters and one input to its logits
Forward = Callable[[Parameters, Array], Array]


def translated(model: nn.Module, name: str, num_classes: int, input_shape: tuple[int, ...]) -> Forward:
    """The function that computes what ``model`` does in evaluation mode.

    Args:
        model: the parameters' owner; those of the function have its names.
        name: by which the model was built.

    Raises:
        ModelError: a layer, or an architecture, that is not known here.
    """
    if isinstance(model, nn.Sequential | nn.Linear):
        return _layers(model, name)
    try:
        ours = architecture(name, num_classes, input_shape[-1] if "vit" in name else None)
    except ValueError as error:
        raise ModelError(str(error)) from error
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    if theirs != ours.shapes():
        raise ModelError(
            f"the parameters of {name} are not those that the function for JAX expects; use --engine torch."
        )
    return ours


def _layers(model: nn.Module, name: str) -> Forward:
    leaves = [(path, layer) for path, layer in model.named_modules() if not any(layer.children())]
    steps = [(path, _layer(layer, name)) for path, layer in leaves]

    def forward(parameters: Parameters, x: Array) -> Array:
        for path, step in steps:
            prefix = re.compile(rf"^{re.escape(path)}\.?(?=[^.]+$)") if path else re.compile("^")
            own = {prefix.sub("", n): p for n, p in parameters.items() if prefix.match(n)}
            x = step(own, x)
        return x

    return forward


def _layer(layer: nn.Module, name: str) -> Forward:
    """One layer on one example, without a batch axis."""
    match layer:
        case nn.Flatten():
            return lambda p, x: x.reshape(-1)
        case nn.Tanh():
            return lambda p, x: jnp.tanh(x)
        case nn.ReLU():
            return lambda p, x: jax.nn.relu(x)
        case nn.GELU():
            return lambda p, x: jax.nn.gelu(x, approximate=layer.approximate == "tanh")
        case nn.Identity() | nn.Dropout() | nn.Sequential():  # an empty sequence
            return lambda p, x: x
        case nn.Linear():
            return lambda p, x: p["weight"] @ x + p.get("bias", 0)
        case nn.Conv2d() if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            return lambda p, x: _convolution(layer, p, x)
        case nn.GroupNorm():
            return lambda p, x: _group_norm(layer, p, x)
        case nn.LayerNorm():
            return lambda p, x: _layer_norm(layer, p, x)
        case nn.MaxPool2d() if layer.padding == 0 and layer.dilation == 1 and not layer.ceil_mode:
            return lambda p, x: _pooled(x, -jnp.inf, lax.max, layer.kernel_size, layer.stride)
        case nn.AvgPool2d() if layer.padding == 0 and not layer.ceil_mode:
            side = _pair(layer.kernel_size)
            return lambda p, x: (
                _pooled(x, 0.0, lax.add, layer.kernel_size, layer.stride) / (side[0] * side[1])
            )
        case nn.AdaptiveAvgPool2d() if _pair(layer.output_size) == (1, 1):
            return lambda p, x: x.mean((1, 2), keepdims=True)
        case _:
            raise ModelError(
                f"{name} has a layer {type(layer).__name__} that there is no function for JAX of: use "
                "--engine torch, or bring a loss of your own to dptrain.jax."
            )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


def _convolution(layer: nn.Conv2d, p: Parameters, x: Array) -> Array:
    out = lax.conv_general_dilated(
        x[None],
        p["weight"],
        _pair(layer.stride),
        [(side, side) for side in _pair(layer.padding)],
        rhs_dilation=_pair(layer.dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=layer.groups,
    )[0]
    return out + p["bias"][:, None, None] if "bias" in p else out


def _normalised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    x = x - jnp.mean(x, axes, keepdims=True)
    return x * lax.rsqrt(jnp.mean(jnp.square(x), axes, keepdims=True) + eps)


def _group_norm(layer: nn.GroupNorm, p: Parameters, x: Array) -> Array:
    groups = x.reshape(layer.num_groups, -1)
    x = _normalised(groups, (1,), layer.eps).reshape(x.shape)
    if not layer.affine:
        return x
    shape = (-1, *[1] * (x.ndim - 1))
    return x * p["weight"].reshape(shape) + p["bias"].reshape(shape)


def _layer_norm(layer: nn.LayerNorm, p: Parameters, x: Array) -> Array:
    axes = tuple(range(x.ndim - len(layer.normalized_shape), x.ndim))
    x = _normalised(x, axes, layer.eps)
    return x * p["weight"] + p.get("bias", 0) if "weight" in p else x


def _pooled(x: Array, start: float, combine: Callable, side: int, stride: int) -> Array:
    window, strides = (1, *_pair(side)), (1, *_pair(stride))
    return lax.reduce_window(x, start, combine, window, strides, "VALID")
