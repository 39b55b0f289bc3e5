"""Gaussian noise added to sums on the host, block by block while it is in cache, by all threads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.core.entropy import Key
from dptrain.core.gaussian import BLOCK, Gaussians, Place, streams_of

Array = npt.NDArray[Any]

_SMALL = 2**14  # numbers
_BATCHES_A_THREAD = 2  # fewer are not worth a thread: torch's own may still be spinning


class _Piece(NamedTuple):
    """A block of a parameter: its sums ``[n]``, where their noisy means go (maybe there), and its place."""

    total: Array
    out: Array
    place: Place


def noisy_mean(
    sums: Mapping[str, Array],
    out: Mapping[str, Array],
    noise_stddev: float,
    batch_size: float,
    key: Key,
    threads: int,
) -> None:
    """``out = (sum + N(0, noise_stddev^2)) / batch_size``, for contiguous float32 or float64 arrays.

    Each parameter has streams of its own, derived from its name, and each element a place in them: the noise
    depends neither on the order of the parameters nor on the number of threads, nor on the engine.

    NumPy and the cipher let go of Python's lock while they work, but who waits for it waits long: so
    threads share what comes in large pieces, and the small ones are the caller's.

    Args:
        sums, out: by parameter name; ``out`` may hold the same arrays.
        noise_stddev: sigma C, in units of the gradient.
        batch_size: L.
        key: used for this step's noise and nothing else.
        threads: at most.
    """
    for dtype in {total.dtype for total in sums.values()}:
        of_one_type = [name for name, total in sums.items() if total.dtype == dtype]
        pieces = [piece for name in of_one_type for piece in _pieces(name, sums[name], out[name])]
        step = (noise_stddev, batch_size, key)
        _add(_batches(piece for piece in pieces if piece.place.size < _SMALL), *step)
        large = _batches(piece for piece in pieces if piece.place.size >= _SMALL)
        others = min(threads, len(large) // _BATCHES_A_THREAD) - 1
        with ThreadPoolExecutor(max(1, others)) as pool:
            shared = iter(large)  # each batch goes to the thread that comes first
            running = [pool.submit(_add, shared, *step) for _ in range(others)]
            _add(shared, *step)
            for thread in running:
                thread.result()


def _pieces(name: str, total: Array, out: Array) -> Iterator[_Piece]:
    streams = streams_of(name)
    total, out = total.reshape(-1), out.reshape(-1)
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
