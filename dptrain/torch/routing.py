"""Whose rows these are, where the data decide which rows an operation sees.

The rows that reach an expert, or a time step of packed sequences, are picked by the data, so no
layout says which example a row belongs to. Back-propagation does: the loss of example b is scaled
by a power of two that spells b, and what comes back in a row has been scaled by exactly that, for
floating-point arithmetic commutes with powers of two. A row that two examples move comes back with
something else, and is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from .capture import Capture, Use
from .errors import Misfit, Refused
from .guards import backward
from .layout import Layout, Routed, row_heights
from .trace import CHANGING, UseFacts
from .uses.base import Size, widen

#: what atomic additions on a GPU may cost; two examples in one row are off by far more
TOLERANCE = 1e-5


def settle(
    facts: tuple[UseFacts, ...],
    capture: Capture,
    losses: Tensor,
    mask: Tensor | None,
    parameters: dict[str, Tensor],
    batch_size: int,
) -> tuple[UseFacts, ...]:
    """The facts with a layout for every routed use, found by ``1 + log16(B)`` backward passes, or
    ``1 + log2(B)`` where a compute type is too narrow.

    Where an operation of this batch may have sent rows about (``capture.scattered``), all other uses
    are looked at as well: their rows must be where their layout has them.

    Raises:
        Refused: a row belongs to more than one example.
        Misfit: rows of a use that is not routed are elsewhere.
    """
    routed = {i for i, fact in enumerate(facts) if fact.routed}
    regular = {i for i, fact in enumerate(facts) if fact.layout is not None} if capture.scattered else set()
    if not routed and not regular:
        return facts
    seen = _owners(routed | regular, facts, capture, losses, mask, parameters, batch_size)
    for index in regular & seen.keys():
        if not _where_expected(facts[index].layout, seen[index][0], batch_size):
            raise Misfit(CHANGING, facts[index].pattern)
    settled = list(facts)
    for index in routed:
        fact = facts[index]
        if index not in seen:  # no gradient reaches it in this batch
            nobody = torch.zeros(0, dtype=torch.int64, device=losses.device)
            settled[index] = dataclasses.replace(fact, layout=Routed(nobody, batch_size))
            continue
        owners, size = seen[index]
        layout = Routed(owners, batch_size)
        if size is not None:
            per_row = size.positions // max(1, owners.numel())
            size = size._replace(positions=layout.width * max(1, per_row))
        settled[index] = dataclasses.replace(fact, layout=layout, size=size)
    return tuple(settled)


def _owners(
    wanted: Collection[int], facts, capture: Capture, losses: Tensor, mask, parameters, batch_size: int
) -> dict[int, tuple[Tensor, Size | None]]:
    """By use: the example of each row, in the shape of the row axes; and the size as one example."""
    sizes: dict[int, Size | None] = {}

    def spell(scale: Tensor) -> dict[int, Tensor]:
        """How high the rows of each use come with these weights of the losses."""
        heights: dict[int, Tensor] = {}

        def measure(use: Use, a: Tensor | None, g: Tensor) -> None:
            if use.index in wanted:
                axes, layout = use.rule.row_axes(g), facts[use.index].layout
                if layout is not None:
                    if not layout.fits(g, batch_size):
                        raise Misfit(CHANGING, facts[use.index].pattern)
                    axes = max(axes, layout.axis + 1)
                heights[use.index] = row_heights(widen(g), axes)
                sizes[use.index] = use.rule.size(use.value.shape, a, g, 1)

        capture.sink = measure
        scaled = losses * scale.to(losses.dtype)
        total = scaled.sum() if mask is None else torch.where(mask, scaled, 0.0).sum()
        backward(capture, total, parameters, retain_graph=True)
        return heights

    before = capture.sink
    examples = torch.arange(batch_size, device=losses.device)
    try:
        plain = spell(torch.ones_like(losses))
        for base in (16, 2):
            digits = [examples // base**n % base for n in range(_length(batch_size, base))]
            weights = [torch.exp2((d - 8).to(losses.dtype)) if base == 16 else d for d in digits]
            scaled = [spell(weight) for weight in weights]
            read = {}
            for i, rows in plain.items():
                unread = _unread(facts[i], rows, losses)
                read[i] = _read(rows, [h[i] for h in scaled], base, batch_size, unread)
            if all(owners is not None for owners in read.values()):
                return {i: (owners, sizes[i]) for i, owners in read.items() if owners is not None}
    finally:
        capture.sink = before
    raise Refused("examples mix: a row that was routed by the data belongs to more than one example.")


def _where_expected(layout: Layout, owners: Tensor, batch_size: int) -> bool:
    return bool(((owners == _by_layout(layout, owners, batch_size)) | (owners < 0)).all())


def _by_layout(layout: Layout, rows: Tensor, batch_size: int) -> Tensor:
    """Whose the rows are where the layout has them."""
    examples = torch.arange(batch_size, device=rows.device)
    return layout.per_row(examples, rows.dim()).expand(rows.shape)


def _unread(fact: UseFacts, rows: Tensor, losses: Tensor) -> Tensor | None:
    """The owners of rows whose gradient is not finite and so spells nothing: those of the layout if there is
    one, else any example whose loss is not finite, for all of those count for nothing. None if none is."""
    if fact.layout is not None:
        return _by_layout(fact.layout, rows, len(losses))
    broken = (~losses.detach().isfinite()).nonzero().flatten()
    return broken[0].expand(rows.shape) if len(broken) else None


def _length(batch_size: int, base: int) -> int:
    """Digits of the largest example number."""
    length, rest = 0, batch_size - 1
    while rest:
        length, rest = length + 1, rest // base
    return length


def _read(
    plain: Tensor, scaled: list[Tensor], base: int, batch_size: int, unread: Tensor | None
) -> Tensor | None:
    """The owner of each row; -1 where there is no gradient. None if some row says nothing that makes sense.

    In base 16 a digit is a power of two, which a type as narrow as float16 may not hold; in base 2
    a loss takes part or does not, and the row comes back as it was or not at all.
    """
    owners = torch.zeros(plain.shape, dtype=torch.int64, device=plain.device)
    busy = plain != 0
    finite = torch.stack([plain, *scaled]).isfinite().all(0)
    for position, height in enumerate(scaled):
        ratio = height / plain
        digit = (ratio.log2().round() + 8 if base == 16 else ratio.round()).nan_to_num(-1, -1, -1)
        exact = (ratio / torch.exp2(digit - 8) - 1 if base == 16 else ratio - digit).abs() < TOLERANCE
        if bool((busy & finite & ~(exact & (digit >= 0) & (digit < base))).any()):
            return None
        owners += torch.where(busy & finite, digit, 0).long() * base**position
    lost = busy & ~finite
    if bool(lost.any()):
        if unread is None:
            raise Refused(
                "a gradient is not finite in rows that were routed by the data, so it cannot be said "
                "whose they are: lower the learning rate, or clip the activations."
            )
        owners = torch.where(lost, unread, owners)
    if bool((owners >= batch_size).any()):
        return None
    return torch.where(busy, owners, -1)
