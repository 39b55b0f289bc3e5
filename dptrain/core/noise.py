"""Gaussian noise added to sums on the host, block by block while it is in cache, by all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dptrain.core import rounded_gaussian
from dptrain.core.entropy import Key
from dptrain.core.gaussian import BLOCK, Gaussians, Place, streams_of
from dptrain.core.grid import in_spacings
from dptrain.core.rounded_gaussian import RoundedGaussians

Array = npt.NDArray[Any]
Source = Gaussians | RoundedGaussians

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
        of_one_type = {name: total for name, total in sums.items() if total.dtype == dtype}

        def source(pairs: int, dtype: np.dtype[Any] = dtype) -> Gaussians:
            return Gaussians(key, dtype, noise_stddev, pairs)

        _in_threads(partial(_add, source, 1 / batch_size), of_one_type, out, streams_of, threads)


def noisy_mean_on_grid(
    sums: Mapping[str, Array],
    out: Mapping[str, Array],
    noise_stddev: float,
    grid: float,
    batch_size: float,
    key: Key,
    threads: int,
) -> None:
    """``out = grid (sum + round(N(0, (noise_stddev / grid)^2))) / batch_size``.

    Rounded Gaussians are drawn exactly (``rounded_gaussian.py``) and added in integers; only the result is
    converted, which is post-processing.

    Args:
        sums: contiguous int64 arrays, in units of the grid, by parameter name.
        out: contiguous float32 or float64 arrays of the same shapes.
        noise_stddev: sigma C, in units of the gradient.
        grid: the spacing, a power of two.
        batch_size, key, threads: as for `noisy_mean`.

    Raises:
        ValueError: the noise's standard deviation is not 1 to 2^32 spacings, or a parameter has more than
            2^31 elements.
    """
    stddev = in_spacings(noise_stddev, grid)
    rounded_gaussian.check_stddev(stddev)
    for name, total in sums.items():
        if total.size > rounded_gaussian.LARGEST_PARAMETER:
            raise ValueError(f"{name} has {total.size} elements, and rounded noise at most 2^31: split it.")

    def source(pairs: int) -> RoundedGaussians:
        return RoundedGaussians(key, stddev, pairs)

    add = partial(_add, source, grid / batch_size)
    _in_threads(add, sums, out, rounded_gaussian.streams_of, threads)


def _in_threads(
    add: Callable[[Iterable[list[_Piece]]], None],
    sums: Mapping[str, Array],
    out: Mapping[str, Array],
    streams_of: Callable[[str], tuple[int, ...]],
    threads: int,
) -> None:
    """Have all pieces of all sums added to, the large ones by several threads."""
    pieces = [piece for name in sums for piece in _pieces(streams_of(name), sums[name], out[name])]
    add(_batches(piece for piece in pieces if piece.place.size < _SMALL))
    large = _batches(piece for piece in pieces if piece.place.size >= _SMALL)
    others = min(threads, len(large) // _BATCHES_A_THREAD) - 1
    with ThreadPoolExecutor(max(1, others)) as pool:
        shared = iter(large)  # each batch goes to the thread that comes first
        running = [pool.submit(add, shared) for _ in range(others)]
        add(shared)
        for thread in running:
            thread.result()


def _pieces(streams: tuple[int, ...], total: Array, out: Array) -> Iterator[_Piece]:
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


def _add(make: Callable[[int], Source], scale: float, batches: Iterable[list[_Piece]]) -> None:
    """What one thread does.

    Args:
        make: the thread's source of at most so many pairs at once.
        scale: of the noisy sums.
    """
    source = None
    for batch in batches:
        pairs = sum(piece.place.pairs for piece in batch)
        if source is None or source.most_pairs < pairs:
            source = make(pairs)
        for piece, noise in zip(batch, source.draw([piece.place for piece in batch])):
            total, out = piece.total, piece.out
            if total.size % 2:  # the last of the second row is one too many
                noise = noise.reshape(-1)[: total.size]
            noise += total.reshape(noise.shape)
            if noise.dtype == out.dtype:
                np.multiply(noise, noise.dtype.type(scale), out=out.reshape(noise.shape))
            else:  # integers, all of whose digits count until they are scaled
                np.multiply(noise, scale, out=out.reshape(noise.shape), casting="same_kind")
