"""What the probe runs on: stand-in rows, randomised parameters, borrowed randomness."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .uses.base import is_channels_last


@contextlib.contextmanager
def isolated_randomness(batch: Any) -> Iterator[None]:
    """Leave every random state as it was found."""
    devices = {t.device for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed(number: int) -> None:
    """Start every generator that a model may draw from."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def random_state(parameters: dict[str, Tensor]) -> tuple:
    """Where every generator stands that a model on these parameters may draw from."""
    devices = {p.device for p in parameters.values() if p.is_cuda}
    on_gpu = [torch.cuda.get_rng_state(d).numpy().tobytes() for d in sorted(devices, key=str)]
    numpy = np.random.get_state()
    mine = torch.get_rng_state().numpy().tobytes()
    return mine, on_gpu, random.getstate(), numpy[1].tobytes(), numpy[2:]


@torch.no_grad()
def randomised(parameters: Iterable[tuple[str, Tensor]], attempt: int) -> Iterator[tuple[str, Tensor]]:
    """By name, what to add to parameters so that no zero is left to hide behind; at last nothing."""
    scale = (0.5, 0.2, 0.05, 0.0)[attempt % 4]
    generator = torch.Generator().manual_seed(1000 + attempt)
    for name, p in parameters:
        if p.is_floating_point() and p.numel():
            fan_in = p.shape[1:].numel() if p.dim() > 1 else 9
            yield name, torch.randn(p.shape, generator=generator) * (scale / max(1, fan_in) ** 0.5)


class StandIns:
    """Finite rows like those of a batch: mixtures for floats, real values for the rest."""

    def __init__(self, batch: Any, mask: Tensor | None, batch_size: int):
        self.leaves, self.tree = tree_flatten(batch)
        usable = torch.ones(batch_size, dtype=torch.bool)
        if mask is not None:
            usable &= mask.cpu()
        for t in self.leaves:
            if isinstance(t, Tensor) and t.is_floating_point():
                usable &= t.detach().reshape(batch_size, -1).isfinite().all(1).cpu()
        rows = usable.nonzero().flatten()
        self.rows = rows if len(rows) else torch.arange(batch_size)
        first = self.rows[0]
        self.all_alike = not any(
            bool((t[self.rows] != t[first]).any()) for t in self.leaves if isinstance(t, Tensor)
        )
        #: real rows in their own order, for models that accept nothing else
        self.plain = False
        self._kinds = [self._kind(t) for t in self.leaves]

    def widen(self) -> None:
        """Floats become float64."""
        self.leaves = [
            t.double() if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in self.leaves
        ]

    def _kind(self, t: Any) -> tuple[Tensor, float, float] | None:
        """Of floats: which columns hold whole numbers only, codes perhaps, and the range of the values."""
        if not isinstance(t, Tensor) or not t.is_floating_point() or not t.numel():
            return None
        rows = t.detach()[self.rows.to(t.device)].nan_to_num()
        whole = (rows == rows.round()).all(0)
        low = 0.0 if bool((rows >= 0).all()) else -float("inf")
        high = 1.0 if low == 0 and bool((rows <= 1).all()) else float("inf")
        return whole, low, high

    def __call__(self, size: int, attempt: int, salt: int = 0) -> Any:
        """``size`` rows, the same for the same numbers."""
        generator = torch.Generator().manual_seed(17 * attempt + salt)
        order = torch.randperm(len(self.rows), generator=generator)
        first = self.rows[order[torch.arange(size) % len(self.rows)]]
        second = self.rows[torch.randint(len(self.rows), (size,), generator=generator)]
        weight = torch.rand(size, generator=generator)
        vary = self.all_alike or attempt > 0
        if self.plain:  # spread evenly; the others are their neighbours, in case the order matters
            places = torch.arange(size) * len(self.rows) // size
            first = second = self.rows[(places - int(salt > 0)).clamp(min=0)]
        out = []
        for t, kind in zip(self.leaves, self._kinds):
            if not isinstance(t, Tensor):
                out.append(t)
            elif t.is_floating_point():
                out.append(self._mixture(t, kind, first, second, weight, vary, generator))
            else:
                x = t.detach()[first.to(t.device)].clone()
                if t.dim() > 1 and not t.is_complex() and (self.all_alike or attempt > 1) and not self.plain:
                    x = self._shuffled(t, x, generator)
                out.append(x)
        return tree_unflatten(out, self.tree)

    def crowd(self, size: int, attempt: int, salt: int = 0, sign: float = 1.0) -> Any:
        """``size`` copies of one row, a hair apart: what overflows a router's capacity."""
        one = self(1, attempt, salt)
        generator = torch.Generator().manual_seed(attempt + salt)

        leaves, tree = tree_flatten(one)
        out = []
        for t, kind in zip(leaves, self._kinds):
            if isinstance(t, Tensor):
                t = t.repeat_interleave(size, 0)
                if kind is not None:
                    noise = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
                    moved = (sign * t + 1e-3 * noise * t.abs().mean()).clamp(*kind[1:])
                    t = torch.where(kind[0], t, moved)
            out.append(t)
        return tree_unflatten(out, tree)

    def _mixture(self, t, kind, first, second, weight, vary, generator) -> Tensor:
        x, y = t.detach()[first.to(t.device)], t.detach()[second.to(t.device)]
        x, y = x.nan_to_num(0.5, 0.5, 0.5), y.nan_to_num(0.5, 0.5, 0.5)
        if self.plain or kind is None:
            return x.clone()
        whole, low, high = kind
        w = weight.to(t.device, t.dtype).reshape(-1, *[1] * (t.dim() - 1))
        mixed = w * x + (1 - w) * y
        if vary:
            noise = torch.randn(x.shape, generator=generator).to(t.device, t.dtype)
            mixed = mixed + noise * (0.1 + mixed.std() if mixed.numel() > 1 else 0.1)
        if self.all_alike:  # nothing else would tell the rows apart
            return mixed.clamp(low, high)
        mixed = torch.where(whole, x, mixed.clamp(low, high))
        return mixed.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else mixed

    def _shuffled(self, t: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """Values of this leaf in another order; masks of zeros and ones stay as they are."""
        pool = t.detach()[self.rows.to(t.device)].unique()
        if t.dtype == torch.bool or len(pool) < 2 or bool((pool <= 1).all()):
            return x
        index = torch.randint(len(pool), x.shape, generator=generator)
        return pool[index.to(t.device)]
