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


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Without autocast, and with float32 that is float32."""
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):  # entered for every use: what is off costs nothing
            stack.enter_context(torch.autocast(device.type, enabled=False))
        for products in PRODUCTS.get(device.type, ()):
            if products.fp32_precision not in ("ieee", "none"):
                stack.callback(setattr, products, "fp32_precision", products.fp32_precision)
                products.fp32_precision = "ieee"
        yield
