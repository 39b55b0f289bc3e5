"""Gaussian noise, once per logical step, in float32 or better."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dptrain.core.entropy import Key

from .gaussian import BLOCK, Gaussians, Place, streams_of

_SMALL = 2**14  # numbers
_BATCHES_A_THREAD = 2  # fewer are not worth a thread: torch's own may still be spinning


def noisy_mean(
    sums: dict[str, Tensor],
    noise_stddev: float,
    batch_size: float,
    key: Key,
    out: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """``(sum + N(0, noise_stddev^2)) / batch_size`` for every element of every sum.

    Each parameter has streams of its own, derived from its name, and each element a place in them:
    the noise depends neither on the order of the parameters nor on the number of threads. On a CPU
    it comes from a cipher, block by block, and is added while it is in cache. On another device it
    comes from torch's generator there, which starts from 64 bits of the key.

    Args:
        sums: float32 or better.
        noise_stddev: sigma C, in units of the gradient.
        batch_size: L.
        key: used for this step's noise and nothing else.
        out: where the result goes, like ``sums`` and maybe the same; new tensors by default.

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
    here: dict[torch.dtype, list[str]] = {}
    for name, total in sums.items():
        if total.device.type == "cpu":
            here.setdefault(total.dtype, []).append(name)
        else:
            source = generator(key.child("parameter", name), total.device)
            add_drawn(total, noise_stddev, batch_size, source, out[name])
    for names in here.values():
        _add_in_threads({name: sums[name] for name in names}, noise_stddev, batch_size, key, out)
    return out


def generator(key: Key, device: torch.device) -> torch.Generator:
    """The device's own generator, started from 64 bits of ``key``: Philox, on a GPU."""
    made = torch.Generator(device)
    made.manual_seed(key.seed64())
    return made


def add_drawn(total: Tensor, stddev: float, batch_size: float, source: torch.Generator, out: Tensor) -> None:
    """``out = (total + noise) / batch_size``, drawn by torch. ``out`` may be ``total``."""
    noise = torch.empty_like(total).normal_(0.0, stddev / batch_size, generator=source)
    torch.add(noise, total, alpha=1 / batch_size, out=out)


class _Piece(NamedTuple):
    """A block of a parameter: its sums ``[n]``, where their noisy means go (maybe there), and its place."""

    total: np.ndarray
    out: np.ndarray
    place: Place


def _add_in_threads(
    sums: dict[str, Tensor], stddev: float, batch_size: float, key: Key, out: dict[str, Tensor]
) -> None:
    """``noisy_mean`` on the CPU, for sums of one type.

    NumPy and the cipher let go of Python's lock while they work, but who waits for it waits long:
    so threads share what comes in large pieces, and the small ones are the caller's.
    """
    results = {
        name: out[name] if out[name].is_contiguous() else torch.empty(total.shape, dtype=total.dtype)
        for name, total in sums.items()
    }
    pieces = [
        piece for name, total in sums.items() for piece in _pieces(name, total.contiguous(), results[name])
    ]
    step = (stddev, batch_size, key)
    _add(_batches(piece for piece in pieces if piece.place.size < _SMALL), *step)
    large = _batches(piece for piece in pieces if piece.place.size >= _SMALL)
    others = min(torch.get_num_threads(), len(large) // _BATCHES_A_THREAD) - 1
    with ThreadPoolExecutor(max(1, others)) as pool:
        shared = iter(large)  # each batch goes to the thread that comes first
        running = [pool.submit(_add, shared, *step) for _ in range(others)]
        _add(shared, *step)
        for thread in running:
            thread.result()
    for name, result in results.items():
        if result is not out[name]:
            out[name].copy_(result)


def _pieces(name: str, total: Tensor, out: Tensor) -> Iterator[_Piece]:
    streams = streams_of(name)
    total, out = total.detach().numpy().reshape(-1), out.detach().numpy().reshape(-1)
    for block, begin in enumerate(range(0, total.size, BLOCK)):
        part = slice(begin, begin + BLOCK)
        yield _Piece(total[part], out[part], Place(streams, block, total[part].size))


def _batches(pieces: Iterable[_Piece]) -> list[list[_Piece]]:
    """Of at most ``BLOCK`` numbers each."""
    batches: list[list[_Piece]] = []
    pairs = BLOCK
    for piece in pieces:
        pairs += piece.place.pairs
        if pairs > BLOCK // 2:
            batches.append([])
            pairs = piece.place.pairs
        batches[-1].append(piece)
    return batches


def _add(batches: Iterable[list[_Piece]], stddev: float, batch_size: float, key: Key) -> None:
    """What one thread does."""
    source = None
    for batch in batches:
        pairs = sum(piece.place.pairs for piece in batch)
        if source is None or source.most_pairs < pairs:
            source = Gaussians(key, batch[0].total.dtype, stddev, pairs)
        for piece, noise in zip(batch, source.draw([piece.place for piece in batch])):
            total, out = piece.total, piece.out
            if total.size % 2:  # the last of the second row is one too many
                noise = noise.reshape(-1)[: total.size]
            noise += total.reshape(noise.shape)
            np.multiply(noise, noise.dtype.type(1 / batch_size), out=out.reshape(noise.shape))
