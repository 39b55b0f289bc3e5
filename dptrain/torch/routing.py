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
from .errors import Refused
from .guards import backward
from .layout import Routed, row_heights
from .trace import UseFacts
from .uses.base import Size, widen

#: digits that one backward pass spells, kept few so that neither float32 nor float16 overflows
BASE = 16
#: what atomic additions on a GPU may cost; two examples in one row are off by far more
TOLERANCE = 1e-3


def settle(
    facts: tuple[UseFacts, ...],
    capture: Capture,
    losses: Tensor,
    mask: Tensor | None,
    parameters: dict[str, Tensor],
    batch_size: int,
) -> tuple[UseFacts, ...]:
    """The facts with a layout for every routed use, found by ``1 + log16(B)`` backward passes.

    Raises:
        Refused: a row belongs to more than one example.
    """
    routed = {i for i, fact in enumerate(facts) if fact.routed}
    if not routed:
        return facts
    seen = _owners(routed, capture, losses, mask, parameters, batch_size)
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
    routed: Collection[int], capture: Capture, losses: Tensor, mask, parameters, batch_size: int
) -> dict[int, tuple[Tensor, Size | None]]:
    """By use: the example of each row, in the shape of the row axes; and the size as one example."""
    heights: list[dict[int, Tensor]] = []
    sizes: dict[int, Size | None] = {}

    def measure(use: Use, a: Tensor | None, g: Tensor) -> None:
        if use.index in routed:
            heights[-1][use.index] = row_heights(widen(g), use.rule.row_axes(g))
            sizes[use.index] = use.rule.size(use.value.shape, a, g, 1)

    def spell(scale: Tensor) -> None:
        heights.append({})
        scaled = losses * scale.to(losses.dtype)
        total = scaled.sum() if mask is None else torch.where(mask, scaled, 0.0).sum()
        backward(capture, total, parameters, retain_graph=True)

    before, capture.sink = capture.sink, measure
    examples = torch.arange(batch_size, device=losses.device)
    digits = []
    rest = batch_size - 1
    while rest:
        digits.append(examples // BASE ** len(digits) % BASE)
        rest //= BASE
    try:
        spell(torch.ones_like(losses))
        for digit in digits:
            spell(torch.exp2((digit - BASE // 2).to(losses.dtype)))
    finally:
        capture.sink = before
    broken = (~losses.detach().isfinite()).nonzero().flatten()
    return {
        index: (_read(height, [h[index] for h in heights[1:]], batch_size, broken), sizes[index])
        for index, height in heights[0].items()
    }


def _read(plain: Tensor, scaled: list[Tensor], batch_size: int, broken: Tensor) -> Tensor:
    """The owner of each row; -1 where there is no gradient."""
    owners = torch.zeros(plain.shape, dtype=torch.int64, device=plain.device)
    busy = plain != 0
    for position, height in enumerate(scaled):
        power = (height / plain).log2()
        digit = power.round()
        exact = (power - digit).abs() < TOLERANCE
        digit = digit + BASE // 2
        finite = power.isfinite()
        if bool((busy & finite & ~(exact & (digit >= 0) & (digit < BASE))).any()):
            raise Refused("examples mix: a row that was routed by the data belongs to more than one example.")
        owners += torch.where(busy & finite, digit.nan_to_num(0, 0, 0), 0).long() * BASE**position
    lost = busy & ~torch.stack([plain, *scaled]).isfinite().all(0)
    if bool(lost.any()):
        if len(broken) == 0:
            raise Refused(
                "a gradient is not finite in rows that were routed by the data, so it cannot be said "
                "whose they are: lower the learning rate, or clip the activations."
            )
        owners = torch.where(lost, broken[0], owners)  # all of these examples count for nothing
    return torch.where(busy, owners.clamp(max=batch_size - 1), -1)
