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
from dptrain.core.gaussian import ALIGNMENT, BLOCK, PAIRS, Gaussians, Place, streams_of
from dptrain.core.grid import in_spacings
from dptrain.core.rounded_gaussian import RoundedGaussians

Array = npt.NDArray[Any]
Source = Gaussians | RoundedGaussians

_SMALL = 2**14  # numbers
_BATCHES_A_THREAD = 2  # fewer are not worth a thread: torch's own may still be spinning


class Span(NamedTuple):
    """Which elements of a parameter an array holds: those from ``begin`` on, of ``of`` in all."""

    begin: int
    of: int


class _Piece(NamedTuple):
    """Elements of a block of a parameter, and where their noise comes from."""

    total: Array  #: sums ``[n]``
    out: Array  #: where their noisy means go, maybe there
    place: Place
    row: int | None = None  #: of the place's two, if not all numbers of both are wanted
    skip: int = 0  #: numbers of that row before the first that is wanted

    def of(self, drawn: Array) -> Array:
        """What is wanted of ``drawn``, ``[2, pairs]``: ``[n]``, or by rows."""
        if self.row is not None:
            return drawn[self.row, self.skip : self.skip + self.total.size]
        if self.total.size % 2:  # the last of the second row is one too many
            return drawn.reshape(-1)[: self.total.size]
        return drawn


def noisy_mean(
    sums: Mapping[str, Array],
    out: Mapping[str, Array],
    noise_stddev: float,
    batch_size: float,
    key: Key,
    threads: int,
    spans: Mapping[str, Span] | None = None,
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
        spans: which elements of its parameter an array holds, if not all: each element's noise is its own,
            whoever draws it.
    """
    spans = _spans(sums, spans)
    for dtype in {total.dtype for total in sums.values()}:
        of_one_type = {name: total for name, total in sums.items() if total.dtype == dtype}

        def source(pairs: int, dtype: np.dtype[Any] = dtype) -> Gaussians:
            return Gaussians(key, dtype, noise_stddev, pairs)

        _in_threads(partial(_add, source, 1 / batch_size), of_one_type, out, spans, streams_of, threads)


def noisy_mean_on_grid(
    sums: Mapping[str, Array],
    out: Mapping[str, Array],
    noise_stddev: float,
    grid: float,
    batch_size: float,
    key: Key,
    threads: int,
    spans: Mapping[str, Span] | None = None,
) -> None:
    """``out = grid (sum + round(N(0, (noise_stddev / grid)^2))) / batch_size``.

    Rounded Gaussians are drawn exactly (``rounded_gaussian.py``) and added in integers; only the result is
    converted, which is post-processing.

    Args:
        sums: contiguous int64 arrays, in units of the grid, by parameter name.
        out: contiguous float32 or float64 arrays of the same shapes.
        noise_stddev: sigma C, in units of the gradient.
        grid: the spacing, a power of two.
        batch_size, key, threads, spans: as for `noisy_mean`.

    Raises:
        ValueError: the noise's standard deviation is not 1 to 2^32 spacings, or a parameter has more than
            2^31 elements.
    """
    stddev = in_spacings(noise_stddev, grid)
    rounded_gaussian.check_stddev(stddev)
    spans = _spans(sums, spans)
    for name, span in spans.items():
        if span.of > rounded_gaussian.LARGEST_PARAMETER:
            raise ValueError(f"{name} has {span.of} elements, and rounded noise at most 2^31: split it.")

    def source(pairs: int) -> RoundedGaussians:
        return RoundedGaussians(key, stddev, pairs)

    add = partial(_add, source, grid / batch_size)
    _in_threads(add, sums, out, spans, rounded_gaussian.streams_of, threads)


def _in_threads(
    add: Callable[[Iterable[list[_Piece]]], None],
    sums: Mapping[str, Array],
    out: Mapping[str, Array],
    spans: Mapping[str, Span],
    streams_of: Callable[[str], tuple[int, ...]],
    threads: int,
) -> None:
    """Have all pieces of all sums added to, the large ones by several threads."""
    pieces = [
        piece for name in sums for piece in _pieces(streams_of(name), sums[name], out[name], spans[name])
    ]
    add(_batches(piece for piece in pieces if piece.total.size < _SMALL))
    large = _batches(piece for piece in pieces if piece.total.size >= _SMALL)
    others = min(threads, len(large) // _BATCHES_A_THREAD) - 1
    with ThreadPoolExecutor(max(1, others)) as pool:
        shared = iter(large)  # each batch goes to the thread that comes first
        running = [pool.submit(add, shared) for _ in range(others)]
        add(shared)
        for thread in running:
            thread.result()


def _spans(sums: Mapping[str, Array], spans: Mapping[str, Span] | None) -> dict[str, Span]:
    """Of every array, whole parameters where nothing else is said."""
    return {name: Span(0, total.size) for name, total in sums.items()} | dict(spans or {})


def _pieces(streams: tuple[int, ...], total: Array, out: Array, span: Span) -> Iterator[_Piece]:
    """Block by block. A block of n numbers has the first ones of its pairs, then the second ones."""
    total, out = total.reshape(-1), out.reshape(-1)
    end = span.begin + total.size
    for block in range(span.begin // BLOCK, -(-end // BLOCK)):
        start, size = block * BLOCK, min(BLOCK, span.of - block * BLOCK)
        pairs = (size + 1) // 2
        low, high = max(span.begin, start) - start, min(end, start + size) - start

        def here(first: int, last: int, start: int = start) -> tuple[Array, Array]:
            part = slice(start + first - span.begin, start + last - span.begin)
            return total[part], out[part]

        if (low, high) == (0, size):
            yield _Piece(*here(0, size), Place(streams, block * PAIRS, pairs))
            continue
        for row, (first, last) in enumerate(((low, min(high, pairs)), (max(low, pairs), high))):
            if first < last:
                pair = first - row * pairs
                skip = pair % ALIGNMENT
                place = Place(streams, block * PAIRS + pair - skip, last - first + skip)
                yield _Piece(*here(first, last), place, row, skip)


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
        for piece, drawn in zip(batch, source.draw([piece.place for piece in batch])):
            total, out, noise = piece.total, piece.out, piece.of(drawn)
            noise += total.reshape(noise.shape)
            if noise.dtype == out.dtype:
                np.multiply(noise, noise.dtype.type(scale), out=out.reshape(noise.shape))
            else:  # integers, all of whose digits count until they are scaled
                np.multiply(noise, scale, out=out.reshape(noise.shape), casting="same_kind")
