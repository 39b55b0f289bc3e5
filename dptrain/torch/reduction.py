"""Clipped sums of all ranks, added up once in a logical batch, and the noisy means shared out again.

A sum lies in flat buckets. Each is reduced as soon as the last physical batch has added all that it will,
while the rest of that batch is still computed; rank r gets the r-th part of it, draws the noise of its
elements (``core/noise.py``: the same whoever draws it) and hands the noisy means on to the others. So every
element has noise once, no rank sees another's sum, and what is sent is what one all-reduce sends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dptrain.core.noise import Span

from .clipped_sum import ClippedSum
from .ranks import Ranks, lost_ranks
from .uses.base import wide_type

BUCKET_BYTES = 25 * 2**20
"""As DistributedDataParallel has them: long enough for the network, short enough to begin early."""


class Bucket:
    """Some parameters, one after the other in a flat tensor, padded so that every rank has an equal part."""

    def __init__(self, shapes: dict[str, torch.Size], dtype: torch.dtype, device: torch.device, ranks: int):
        self.shapes = shapes
        sizes = [shape.numel() for shape in shapes.values()]
        self.starts = dict(zip(shapes, itertools.accumulate(sizes, initial=0)))
        self.share = -(-sum(sizes) // ranks)
        self.size, self.dtype, self.device = self.share * ranks, dtype, device

    def empty(self) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=self.device)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """By parameter, in the parameters' shapes."""
        return {
            name: flat[self.starts[name] : self.starts[name] + shape.numel()].view(shape)
            for name, shape in self.shapes.items()
        }

    def parts(self, rank: int) -> Iterator[tuple[str, slice, Span]]:
        """What a rank has of the parameters: (name, where it lies in the rank's share, which elements)."""
        low, high = rank * self.share, (rank + 1) * self.share
        for name, shape in self.shapes.items():
            start, size = self.starts[name], shape.numel()
            first, last = max(low, start), min(high, start + size)
            if first < last:
                yield name, slice(first - low, last - low), Span(first - start, size)


class Shares(NamedTuple):
    """What one rank has of a bucket: flat sums, and which elements of the parameters they are."""

    sums: dict[str, Tensor]
    spans: dict[str, Span]


class Reductions:
    """Where the sums of all ranks of data-parallel training lie. Memory is used again from step to step.

    Args:
        parameters: the trainable leaves by name, alike on all ranks.
        ranks: two or more.
        on_grid: whether sums are integers on a grid.

    Raises:
        ValueError: the ranks' parameters differ.
    """

    def __init__(self, parameters: dict[str, Tensor], ranks: Ranks, on_grid: bool = False) -> None:
        ranks.check_alike("weights", parameters)
        self.ranks = ranks
        self.buckets = list(_buckets(parameters, ranks.size, on_grid))
        self._spare: list[Tensor] | None = None

    def begin(self, clip_norm: float, grid: float | None) -> ClippedSum:
        """An empty sum of this rank's, in buckets."""
        flats, self._spare = self._spare or [bucket.empty() for bucket in self.buckets], None
        for flat in flats:
            flat.zero_()
        pairs = zip(self.buckets, flats)
        grads = {name: view for bucket, flat in pairs for name, view in bucket.views(flat).items()}
        nothing = flats[0].new_zeros(0, dtype=None if grid is None else torch.float32)
        return ClippedSum(grads, nothing, nothing, clip_norm, grid, Reduction(self, flats))

    def give_back(self, flats: list[Tensor]) -> None:
        """Nobody wants the sum in these any more: the next one may lie there."""
        self._spare = flats


class _Sent(NamedTuple):
    own: Tensor  #: what this rank gets
    work: dist.Work
    version: int  #: of what was sent


class Reduction:
    """The way of one sum: over all ranks, and back to all as a noisy mean. All ranks do all of it."""

    def __init__(self, all_: Reductions, flats: list[Tensor]) -> None:
        self.ranks, self.buckets = all_.ranks, all_.buckets
        self._all, self._flats = all_, flats
        self._bucket_of = {name: i for i, bucket in enumerate(self.buckets) for name in bucket.shapes}
        #: by bucket: names whose sums may still change; what has been sent
        self._waiting = [set(bucket.shapes) for bucket in self.buckets]
        self._sent: list[_Sent] = []

    def settled(self, name: str) -> None:
        """Nothing will be added any more to this parameter's sum: send its bucket off if that was the last.

        Buckets leave in one order, which is the same on all ranks.
        """
        self._waiting[self._bucket_of[name]].discard(name)
        while len(self._sent) < len(self.buckets) and not self._waiting[len(self._sent)]:
            self._send(self._flats[len(self._sent)])

    def _send(self, flat: Tensor) -> None:
        own = flat.new_empty(len(flat) // self.ranks.size)
        with lost_ranks():
            work = dist.reduce_scatter_tensor(own, flat, group=self.ranks.group, async_op=True)
        self._sent.append(_Sent(own, work, flat._version))

    def reduced(self, grads: dict[str, Tensor]) -> list[Shares]:
        """What this rank has of the sums over all ranks, by bucket, in new memory.

        Args:
            grads: of this rank's sum.

        Raises:
            RuntimeError: the sum is not the one that was sent.
        """
        flats = [self._flat(bucket, flat, grads) for bucket, flat in zip(self.buckets, self._flats)]
        early = len(self._sent)
        for flat in flats[early:]:
            self._send(flat)
        found: list[Shares] = []
        for bucket, flat, ours, sent in zip(self.buckets, flats, self._flats, self._sent):
            with lost_ranks():
                sent.work.wait()
            if flat._version != sent.version or (flat is not ours and len(found) < early):
                raise RuntimeError(
                    "a sum changed after it was sent to the other ranks: it cannot be released."
                )
            parts = list(bucket.parts(self.ranks.rank))
            sums = {name: sent.own[place] for name, place, _ in parts}
            found.append(Shares(sums, {name: span for name, _, span in parts}))
        self._sent = []
        return found

    def _flat(self, bucket: Bucket, flat: Tensor, grads: dict[str, Tensor]) -> Tensor:
        """The bucket with this sum in it: the one that it was begun in, unless it was made otherwise."""
        views = bucket.views(flat)
        if all(view.data_ptr() == grads[name].data_ptr() for name, view in views.items()):
            return flat
        made = bucket.empty().zero_()
        for name, view in bucket.views(made).items():
            view.copy_(grads[name])
        return made

    def gathered(self, means: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The whole of what every rank has a part of, like the parameters, in new memory.

        Args:
            means: by bucket, like the sums of ``reduced``, in floating point.
        """
        sent = []
        for bucket, parts in zip(self.buckets, means):
            dtype = bucket.dtype if bucket.dtype.is_floating_point else torch.float32
            own = torch.zeros(bucket.share, dtype=dtype, device=bucket.device)
            for name, place, _ in bucket.parts(self.ranks.rank):
                own[place] = parts[name]
            whole = torch.empty(bucket.size, dtype=dtype, device=bucket.device)
            with lost_ranks():
                work = dist.all_gather_into_tensor(whole, own, group=self.ranks.group, async_op=True)
            sent.append((whole, work, own))
        grads: dict[str, Tensor] = {}
        for bucket, (whole, work, _) in zip(self.buckets, sent):
            with lost_ranks():
                work.wait()
            grads |= bucket.views(whole)
        return grads

    def give_back(self) -> None:
        """Nobody wants the sum any more."""
        self._all.give_back(self._flats)


def _buckets(parameters: dict[str, Tensor], ranks: int, on_grid: bool) -> Iterator[Bucket]:
    """Of one type and device each; the last parameters first, as backward passes come to them."""
    members: dict[str, torch.Size] = {}
    kind: tuple[torch.dtype, torch.device] | None = None
    held = 0
    for name, parameter in reversed(parameters.items()):
        dtype = torch.int64 if on_grid else wide_type(parameter.dtype)
        if members and ((dtype, parameter.device) != kind or held >= BUCKET_BYTES):
            yield Bucket(members, *kind, ranks)
            members, held = {}, 0
        kind = dtype, parameter.device
        members[name] = parameter.shape
        held += parameter.numel() * dtype.itemsize
    if members and kind is not None:
        yield Bucket(members, *kind, ranks)
