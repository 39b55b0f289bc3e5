"""Parameters that meet data elementwise."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from .settings import Made, Setting, flags, floats, gains, made, shapes, sizes


def changed(method: str, *factors: float) -> Callable[..., Tensor]:
    """An operation in place, on a copy."""
    return lambda x, p, *q: getattr(x.clone(), method)(p, *q, *factors)


def away(p: Tensor) -> Tensor:
    """Away from zero."""
    return p.abs() + 0.5


#: by name: a function of data and two values that broadcast with it, and maybe need not be used
POINTWISE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "+": lambda x, p, q: x + p,
    "+ reversed": lambda x, p, q: p + x,
    "- reversed": lambda x, p, q: p - x,
    "-": lambda x, p, q: x - p,
    "* of both": lambda x, p, q: x * p * q,
    "* reversed": lambda x, p, q: p * x,
    "/": lambda x, p, q: x / away(p),
    "/ reversed": lambda x, p, q: p / away(x),
    "** reversed": lambda x, p, q: away(p) ** x,
    "**": lambda x, p, q: away(x) ** p,
    "%": lambda x, p, q: x % away(p),
    "add with a factor": lambda x, p, q: torch.add(x, p, alpha=2),
    "sub reversed with a factor": lambda x, p, q: torch.sub(p, x, alpha=0.5),
    "rsub": lambda x, p, q: torch.rsub(x, p),
    "maximum": lambda x, p, q: torch.maximum(x, p),
    "minimum reversed": lambda x, p, q: torch.minimum(p, x),
    "fmax": lambda x, p, q: torch.fmax(x, p),
    "atan2": lambda x, p, q: torch.atan2(p, away(x)),
    "hypot": lambda x, p, q: torch.hypot(x, p),
    "logaddexp": lambda x, p, q: torch.logaddexp(p, x),
    "xlogy": lambda x, p, q: torch.xlogy(x, away(p)),
    "copysign": lambda x, p, q: torch.copysign(p, x),
    "> as a number": lambda x, p, q: (x > p).to(x.dtype) * q,
    "< reversed as a mask": lambda x, p, q: torch.where(p < x, x * q, q),
    "where": lambda x, p, q: torch.where(x > 0, p, x),
    "where of both": lambda x, p, q: torch.where(x > 0, p, q),
    "where by parameters": lambda x, p, q: torch.where(p > 0, x, q),
    "where as a method": lambda x, p, q: q.where(x > 0, x),
    "lerp": lambda x, p, q: torch.lerp(x, p, 0.3),
    "lerp with a weight": lambda x, p, q: torch.lerp(p, x, q),
    "lerp by data": lambda x, p, q: torch.lerp(p, q, x),
    "addcmul": lambda x, p, q: torch.addcmul(x, p, q, value=0.5),
    "addcmul of data": lambda x, p, q: torch.addcmul(p, x, q),
    "addcmul of data at the end": lambda x, p, q: torch.addcmul(p, q, x, value=2),
    "addcdiv": lambda x, p, q: torch.addcdiv(x, p, away(q)),
    "addcdiv of data": lambda x, p, q: torch.addcdiv(p, x, away(q), value=2),
    "clamp": lambda x, p, q: torch.clamp(x, p, p + away(q)),
    "clamp from below": lambda x, p, q: x.clamp(min=p),
    "clip of a value": lambda x, p, q: torch.clip(p, max=x),
    "sigmoid gate": lambda x, p, q: torch.sigmoid(p) * x + (1 - torch.sigmoid(p)) * q,
    "squared distance": lambda x, p, q: torch.square(torch.subtract(x, p)).mul(q),
    "complex": lambda x, p, q: torch.view_as_real(torch.complex(x, x) * torch.complex(p, 0 * p)).flatten(-2),
}
SAME_SHAPE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "+=": lambda x, p, q: operator.iadd(x.clone(), p),
    "-=": lambda x, p, q: operator.isub(x.clone(), p),
    "*=": lambda x, p, q: operator.imul(x.clone(), p),
    "/=": lambda x, p, q: operator.itruediv(x.clone(), away(p)),
    "add_": lambda x, p, q: x.clone().add_(p, alpha=3),
    "mul_ twice": lambda x, p, q: x.clone().mul_(p).mul_(q),
    "lerp_": lambda x, p, q: x.clone().lerp_(p, 0.3),
    "addcmul_": lambda x, p, q: x.clone().addcmul_(p, q, value=2),
    "clamp_": lambda x, p, q: x.clone().clamp_(min=p),
    "copy_": lambda x, p, q: x * q + torch.empty_like(x).copy_(p),
    "assigned": lambda x, p, q: assigned(x.clone(), ..., p),
    "assigned to a slice": lambda x, p, q: assigned(x.clone(), (..., slice(0, 1)), p[..., :1]),
    "a slice changed": lambda x, p, q: changed_slice(x.clone(), p),
    "masked_fill": lambda x, p, q: x.masked_fill(x > 0, p.flatten()[0]),
    "masked_fill_": lambda x, p, q: x.clone().masked_fill_(x > 0, p.flatten()[0]),
    "mse_loss": lambda x, p, q: F.mse_loss(x, p.expand_as(x), reduction="none"),
    "huber_loss": lambda x, p, q: F.huber_loss(p.expand_as(x), x, reduction="none"),
    "bce": lambda x, p, q: F.binary_cross_entropy_with_logits(
        x, torch.sigmoid(p).expand_as(x), reduction="none"
    ),
    "cat": lambda x, p, q: torch.cat([p.expand_as(x), x, q.expand_as(x)], -1),
    "stack": lambda x, p, q: torch.stack([x, p.expand_as(x)], -1),
}


def assigned(x: Tensor, index: Any, value: Tensor) -> Tensor:
    x[index] = value
    return x


def changed_slice(x: Tensor, p: Tensor) -> Tensor:
    x[..., 1:] *= p[..., 1:] if p.shape[-1] > 1 else p
    return x


@st.composite
def pointwise(draw, name: str) -> Setting:
    """Values that broadcast with data in every way that leaves the examples apart."""
    same_shape = name in SAME_SHAPE
    function = (SAME_SHAPE if same_shape else POINTWISE)[name]
    whole = draw(shapes(1, 3))
    place = draw(st.integers(0, len(whole) - same_shape))  # slices are taken of the last axis
    thin = [draw(st.sampled_from((False, False, not same_shape))) for _ in whole]
    shape = tuple(1 if t else n for n, t in zip(whole, thin))

    def value() -> Made:
        sizes = [n if draw(st.sampled_from((True, True, False))) else 1 for n in whole]
        sizes.insert(place, 1)
        cut = 0
        while cut < len(sizes) - 1 and sizes[cut] == 1 and draw(flags):
            cut += 1
        return draw(made(tuple(sizes[cut:])))

    p, q, grown = value(), value(), draw(flags)

    def forward(m, x):
        x, values = x.movedim(0, place), [p.make(m.p), q.make(m.q)]
        if grown:  # a copy for each example, of which nothing tells that they are alike
            values[0] = values[0].expand(torch.broadcast_shapes(x.shape, values[0].shape)) * 1.5
        return function(x, *values).movedim(place, 0)

    steady = name != "copysign"  # hands a zero on to data, and autograd makes NaN of 0 * inf
    text = f"{name} on {shape}, examples on axis {place}, {p.form} {p.leaf} and {q.form} {q.leaf}, {grown=}"
    parts = {"p": p.leaf, "q": q.leaf}
    return Setting(text, forward, parts, {"x": floats(*shape)}, draw(sizes), draw(gains(shape)), steady)
