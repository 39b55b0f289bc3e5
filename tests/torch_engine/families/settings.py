"""What a family draws: a model with one use or a few, and the shapes of its batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    """A model and its batch, yet to be filled with numbers.

    Attributes:
        text: what was drawn, for the report of a failure.
        forward: ``forward(model, **batch)``, of any shape ``[B, ...]``.
        parts: parameters by the shapes of the leaves, and modules as functions that build them.
        batch: by name, a tensor for a number of examples.
        gain: the shape of a parameter that scales ``x`` first, so that the gradient which an operation
            hands on to its input is tested as well.
        overflows: whether an infinite row can do no more harm than to have no gradient.
    """

    text: str
    forward: Callable[..., Tensor]
    parts: dict[str, Any]
    batch: dict[str, Callable[[int], Tensor]]
    size: int
    gain: tuple[int, ...] | None = None
    overflows: bool = True

    def __repr__(self) -> str:
        return f"{self.text} B={self.size}" + (" gain" if self.gain else "")

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(repr(self))

    def model(self) -> nn.Module:
        return Model(self).double()

    def rows(self) -> dict[str, Tensor]:
        return {name: make(self.size) for name, make in self.batch.items()}


class Model(nn.Module):
    def __init__(self, setting: Setting):
        super().__init__()
        self.setting = setting
        for name, part in setting.parts.items():
            setattr(self, name, nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part())
        if setting.gain is not None:
            self.gain = nn.Parameter(1 + 0.3 * torch.randn(setting.gain))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        if self.setting.gain is not None:
            batch = batch | {"x": batch["x"] * self.gain}
        return self.setting.forward(self, **batch)


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss to which each element of the output matters in a way of its own."""
    out = model(batch)
    out = out.reshape(len(out), -1).to(torch.promote_types(out.dtype, torch.float32))
    return torch.sin(out + torch.arange(out.shape[1], device=out.device)).sum(1)


def floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randn(size, *shape, dtype=torch.float64)


def integers(low: int, high: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda size: torch.randint(low, high, (size, *shape))


sizes = st.sampled_from((3, 2, 4, 1, 5))
few = st.integers(1, 3)
seeds = st.integers(0, 99)
flags = st.booleans()


def shapes(least: int, most: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, 4), min_size=least, max_size=most).map(tuple)


@dataclass(frozen=True)
class Made:
    """A value of some shape: the shape of the leaf it is made of, and how."""

    leaf: tuple[int, ...]
    make: Callable[[Tensor], Tensor]
    form: str


#: by name: the leaf for a shape of at least one axis, and the value made of it
FORMS: dict[str, Callable[[tuple[int, ...]], tuple[tuple[int, ...], Callable[[Tensor], Tensor]]]] = {
    "itself": lambda s: (s, lambda p: p),
    "transposed": lambda s: (s[::-1], lambda p: p.permute(*reversed(range(p.dim())))),
    "slice": lambda s: ((s[0] + 2, *s[1:]), lambda p: p[1:-1]),
    "every other": lambda s: ((*s[:-1], 2 * s[-1]), lambda p: p[..., ::2]),
    "element of a stack": lambda s: ((3, *s), lambda p: p[1]),
    "stacked": lambda s: (s, lambda p: torch.stack([*p.unbind()][::-1])),
    "rolled": lambda s: (s, lambda p: torch.cat([p[..., 1:], p[..., :1]], -1)),
    "flipped": lambda s: (s, lambda p: p.flip(0)),
    "picked": lambda s: (s, lambda p: p[torch.arange(len(p)).flip(0)]),
    "expanded": lambda s: ((1, *s[1:]), lambda p: p.expand(s)),
    "expanded at the end": lambda s: ((*s[:-1], 1), lambda p: p.expand(s)),
    "repeated": lambda s: ((1, *s[1:]), lambda p: p.repeat(s[0], *[1] * (len(s) - 1))),
    "unflattened": lambda s: ((math.prod(s),), lambda p: p.view(s)),
    "scaled": lambda s: (s, lambda p: 0.5 * p),
    "normalised": lambda s: (s, lambda p: p / (1 + p.square().sum()).sqrt()),
    "standardised": lambda s: (s, lambda p: (p - p.mean(-1, keepdim=True)) / (1 + p.var(-1, False, True))),
}
forms = st.sampled_from(["itself"] * 8 + list(FORMS))


@st.composite
def made(draw, shape: tuple[int, ...]) -> Made:
    form = draw(forms) if shape else "itself"
    return Made(*FORMS[form](tuple(shape)), form)


@st.composite
def moved(draw, lead: int, fold: bool | None = None):
    """Where the examples lie among ``lead`` further axes: (before, after, text), the functions that
    bring a tensor ``[B, *lead, ...]`` there and back, perhaps folded with the others into one axis."""
    place = draw(st.integers(0, lead))
    fold = lead > 0 and (draw(flags) if fold is None else fold)
    there: list[int] = []

    def before(x: Tensor) -> Tensor:
        x = x.movedim(0, place)
        there[:] = x.shape[: lead + 1]
        return x.flatten(0, lead) if fold else x

    def after(y: Tensor) -> Tensor:
        return (y.unflatten(0, there) if fold else y).movedim(place, 0)

    return before, after, f"examples on axis {place} of {lead + 1}" + (" folded" if fold else "")


def gains(shape: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...] | None]:
    return st.sampled_from((None, shape))
