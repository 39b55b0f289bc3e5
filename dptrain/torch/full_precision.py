"""Norms and clipped sums in full precision, whatever the model computes in (rule 7)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import backends

#: where float32 may mean less: TF32 on a GPU, bfloat16 products on some CPUs
PRODUCTS = {
    "cuda": (backends.cuda.matmul, backends.cudnn.conv),
    "cpu": (backends.mkldnn.matmul, backends.mkldnn.conv),
}


def is_full(device: torch.device) -> bool:
    """Whether float32 is float32 as it is."""
    return not torch.is_autocast_enabled(device.type) and not _lowered(device)


def _lowered(device: torch.device) -> list:
    return [p for p in PRODUCTS.get(device.type, ()) if p.fp32_precision not in ("ieee", "none")]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, and with float32 that is float32."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        for products in _lowered(device):
            stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
            products.fp32_precision = "ieee"
        yield
