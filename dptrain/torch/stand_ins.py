"""What the probe runs on: stand-in rows, randomised parameters, borrowed randomness."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


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
def randomise(model: nn.Module, original: nn.Module, attempt: int) -> None:
    """Parameters near the original's own, but with no zero left to hide behind; at last as they are."""
    scale = (0.5, 0.2, 0.05, 0.0)[attempt % 4]
    generator = torch.Generator().manual_seed(1000 + attempt)
    for name, mine in model.named_parameters():
        if not mine.is_floating_point() or not mine.numel():
            continue
        fan_in = mine[0].numel() if mine.dim() > 1 else 9
        noise = torch.randn(mine.shape, generator=generator) * (scale / max(1, fan_in) ** 0.5)
        mine.copy_(original.get_parameter(name).nan_to_num() + noise.to(mine.device, mine.dtype))


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

    def __call__(self, size: int, attempt: int, salt: int = 0) -> Any:
        """``size`` rows, the same for the same numbers."""
        generator = torch.Generator().manual_seed(17 * attempt + salt)
        order = torch.randperm(len(self.rows), generator=generator)
        first = self.rows[order[torch.arange(size) % len(self.rows)]]
        second = self.rows[torch.randint(len(self.rows), (size,), generator=generator)]
        weight = torch.rand(size, generator=generator)
        vary = self.all_alike or attempt > 0
        out = []
        for t in self.leaves:
            if not isinstance(t, Tensor):
                out.append(t)
            elif t.is_floating_point():
                out.append(self._mixture(t, first, second, weight, vary, generator))
            else:
                x = t.detach()[first.to(t.device)].clone()
                if t.dim() > 1 and (self.all_alike or attempt > 1):
                    x = self._shuffled(t, x, generator)
                out.append(x)
        return tree_unflatten(out, self.tree)

    def crowd(self, size: int, attempt: int, salt: int = 0, sign: float = 1.0) -> Any:
        """``size`` copies of one row, a hair apart: what overflows a router's capacity."""
        one = self(1, attempt, salt)
        generator = torch.Generator().manual_seed(attempt + salt)

        def copies(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            t = t.repeat_interleave(size, 0)
            if not t.is_floating_point():
                return t
            noise = torch.randn(t.shape, generator=generator).to(t.device, t.dtype)
            return sign * t + 1e-3 * noise * t.abs().mean()

        return tree_map(copies, one)

    def _mixture(self, t, first, second, weight, vary, generator) -> Tensor:
        x, y = t.detach()[first.to(t.device)], t.detach()[second.to(t.device)]
        x, y = x.nan_to_num(0.5, 0.5, 0.5), y.nan_to_num(0.5, 0.5, 0.5)
        w = weight.to(t.device, t.dtype).reshape(-1, *[1] * (t.dim() - 1))
        x = w * x + (1 - w) * y
        if vary:
            noise = torch.randn(x.shape, generator=generator).to(t.device, t.dtype)
            x = x + noise * (0.1 + x.std() if x.numel() > 1 else 0.1)
        return x

    def _shuffled(self, t: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
        """Values of this leaf in another order; masks of zeros and ones stay as they are."""
        pool = t.detach()[self.rows.to(t.device)].unique()
        if t.dtype == torch.bool or len(pool) < 2 or bool((pool <= 1).all()):
            return x
        index = torch.randint(len(pool), x.shape, generator=generator)
        return pool[index.to(t.device)]
