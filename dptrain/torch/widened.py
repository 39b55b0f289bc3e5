"""A computation in float64 throughout, so that a wrong gradient cannot pass for rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NARROW = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}
CASTS = ("float", "half", "bfloat16")


def widened_rows(batch: Any) -> Any:
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, batch)


@contextlib.contextmanager
def float64_only(device: torch.device) -> Iterator[None]:
    """Whatever narrower type the model asks for, inside, is float64.

    Norm layers of Llama or T5 cast to float32, whose rounding would hide an error below 1e-7.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast(device.type, enabled=False), _Widening():
            yield
    finally:
        torch.set_default_dtype(before)


class _Widening(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in CASTS and isinstance(args[0], Tensor):
            func = Tensor.double
        wide = [NARROW.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        named = {k: NARROW.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*wide, **named)
