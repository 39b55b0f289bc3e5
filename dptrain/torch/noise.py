"""Gaussian noise, once per logical step, in float32 or better."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dptrain.core import noise as on_host
from dptrain.core.entropy import Key
from dptrain.core.noise import Span

DEVICE_BLOCK = 2**22
"""Numbers that a generator of a device draws from one start. Who owns a part of a block draws all of it."""


def noisy_mean(
    sums: dict[str, Tensor],
    noise_stddev: float,
    batch_size: float,
    key: Key,
    out: dict[str, Tensor] | None = None,
    spans: Mapping[str, Span] | None = None,
) -> dict[str, Tensor]:
    """``(sum + N(0, noise_stddev^2)) / batch_size`` for every element of every sum.

    Each parameter has streams of its own, derived from its name, and each element a place in them: the
    noise depends neither on the order of the parameters nor on the number of threads, nor on who draws
    which part of it. On a CPU it comes from a cipher, block by block, and is added while it is in cache. On
    another device it comes from torch's generator there, which starts each block from 64 bits of the key.

    Args:
        sums: float32 or better.
        noise_stddev: sigma C, in units of the gradient.
        batch_size: L.
        key: used for this step's noise and nothing else.
        out: where the result goes, like ``sums`` and maybe the same; new tensors by default.
        spans: which elements of its parameter a sum holds, if not all, counted in the order of a contiguous
            tensor.

    Raises:
        TypeError: a sum is of a narrower type.
    """
    for name, total in sums.items():
        if total.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"noise for {name} would be drawn in {total.dtype}: float32 at least.")
    if out is None:
        out = {name: torch.empty_like(total) for name, total in sums.items()}
    if noise_stddev == 0:
        for name, total in sums.items():
            torch.mul(total, 1 / batch_size, out=out[name])
        return out
    here: dict[str, Tensor] = {}
    for name, total in sums.items():
        if total.device.type == "cpu":
            here[name] = total
        else:
            span = (spans or {}).get(name) or Span(0, total.numel())
            noise = drawn(span, total, noise_stddev / batch_size, key.child("parameter", name))
            torch.add(noise, total, alpha=1 / batch_size, out=out[name])
    if here:
        _add_on_cpu(here, noise_stddev, batch_size, key, out, spans)
    return out


def noisy_mean_on_grid(
    sums: dict[str, Tensor],
    noise_stddev: float,
    grid: float,
    batch_size: float,
    key: Key,
    spans: Mapping[str, Span] | None = None,
) -> dict[str, Tensor]:
    """``grid (sum + round(N(0, (noise_stddev / grid)^2))) / batch_size``, in float32, in new tensors.

    Noise and sum are added on the host, in integers (``core/noise.py``), wherever the sums lie.

    Args:
        sums: int64, in units of the grid.
        noise_stddev, batch_size, key, spans: as for ``noisy_mean``.
        grid: the spacing.

    Raises:
        TypeError: a sum is not of integers.
    """
    for name, total in sums.items():
        if total.dtype != torch.int64:
            raise TypeError(f"the sum of {name} on a grid must be int64 and is {total.dtype}.")
    out = {name: torch.empty(total.shape) for name, total in sums.items()}
    on_host.noisy_mean_on_grid(
        {name: total.detach().cpu().contiguous().numpy() for name, total in sums.items()},
        {name: result.numpy() for name, result in out.items()},
        noise_stddev,
        grid,
        batch_size,
        key,
        torch.get_num_threads(),
        spans,
    )
    return {name: result.to(sums[name].device) for name, result in out.items()}


def drawn(span: Span, like: Tensor, stddev: float, key: Key) -> Tensor:
    """N(0, stddev^2) for the elements of a span, drawn by the device's own generator: Philox, on a GPU.

    Args:
        like: its shape, type and device are the result's.
        key: of the step and the parameter.
    """
    noise = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    flat, end = noise.view(-1), span.begin + like.numel()
    for block in range(span.begin // DEVICE_BLOCK, -(-end // DEVICE_BLOCK)):
        start, size = block * DEVICE_BLOCK, min(DEVICE_BLOCK, span.of - block * DEVICE_BLOCK)
        low, high = max(span.begin, start), min(end, start + size)
        part = flat[low - span.begin : high - span.begin]
        whole = part if high - low == size else torch.empty(size, dtype=like.dtype, device=like.device)
        source = torch.Generator(like.device)
        source.manual_seed(key.child(block).seed64())
        whole.normal_(0.0, stddev, generator=source)
        if whole is not part:
            part.copy_(whole[low - start : high - start])
    return noise


def _add_on_cpu(
    sums: dict[str, Tensor],
    stddev: float,
    batch_size: float,
    key: Key,
    out: dict[str, Tensor],
    spans: Mapping[str, Span] | None,
) -> None:
    results = {
        name: out[name] if out[name].is_contiguous() else torch.empty(total.shape, dtype=total.dtype)
        for name, total in sums.items()
    }
    on_host.noisy_mean(
        {name: total.detach().contiguous().numpy() for name, total in sums.items()},
        {name: result.detach().numpy() for name, result in results.items()},
        stddev,
        batch_size,
        key,
        torch.get_num_threads(),
        spans,
    )
    for name, result in results.items():
        if result is not out[name]:
            out[name].copy_(result)
