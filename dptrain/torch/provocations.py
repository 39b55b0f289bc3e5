"""Losses under provocation, at a small size, where a forward pass costs next to nothing.

Some examples are made loud, silent, short or extreme, and the losses of the others must stay as
they were: that is what a threshold on the batch, a sequence trimmed to the longest, a mask averaged
over the batch or weights by class counts would notice. Each comparison draws other random numbers, so
that mixing by chance is met as well. What one batch leaves behind in the model must not show in the
losses of the next, nor may an example's loss depend on its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from .errors import CARRIED, Refused, is_final
from .separation import MIXED, choose, same_rows
from .understudy import Understudy

SPREADS = (
    "examples mix: what is not a number in one example reaches the losses of others, as in a product with "
    "a mask over the whole batch (0 * NaN is NaN): pick the rows of each example by indexing instead."
)
PLACE = (
    "an example's loss depends on its place in the batch or on how many others there are: compute it from "
    "the example alone, and leave averages over the batch to dptrain."
)

#: a leaf of the stand-in rows, and the same leaf of the batch that they stand in for -> other rows
Change = Callable[[Tensor, Tensor], Tensor]


def same(rows: Tensor, pool: Tensor) -> Tensor:
    return rows


def loud(rows: Tensor, pool: Tensor) -> Tensor:
    return 1e3 * rows.abs() if rows.is_floating_point() else rows


def bright(rows: Tensor, pool: Tensor) -> Tensor:
    """All positive, and no louder: what is loud can saturate a loss."""
    return rows.abs() if rows.is_floating_point() else rows


def low(rows: Tensor, pool: Tensor) -> Tensor:
    return -1e3 * rows.abs() if rows.is_floating_point() else rows


def silent(rows: Tensor, pool: Tensor) -> Tensor:
    return torch.zeros_like(rows) if rows.is_floating_point() else rows


def short(rows: Tensor, pool: Tensor) -> Tensor:
    """The second half of what comes after the axis of examples is padding."""
    if rows.dim() < 2:
        return rows
    rows = rows.clone()
    rows[:, (rows.shape[1] + 1) // 2 :] = 0
    return rows


def broken(rows: Tensor, pool: Tensor) -> Tensor:
    """Not a number: times zero it still is none, so that a product with a mask hands it on."""
    return torch.full_like(rows, float("nan")) if rows.is_floating_point() else rows


def _is_mask(rows: Tensor, pool: Tensor) -> bool:
    whole = not (rows.is_floating_point() or rows.is_complex())
    return whole and rows.dim() > 1 and bool(((pool == 0) | (pool == 1)).all())


def shown(rows: Tensor, pool: Tensor) -> Tensor:
    """Masks that hide nothing."""
    return torch.ones_like(rows) if _is_mask(rows, pool) else rows


def hidden(rows: Tensor, pool: Tensor) -> Tensor:
    """Masks that hide the second half; everything else as it was, so that no length disagrees."""
    return short(rows, pool) if _is_mask(rows, pool) else rows


def lowest(rows: Tensor, pool: Tensor) -> Tensor:
    codes = not (rows.is_floating_point() or rows.is_complex())
    return pool.amin().to(rows).expand_as(rows).clone() if codes else rows


def highest(rows: Tensor, pool: Tensor) -> Tensor:
    codes = not (rows.is_floating_point() or rows.is_complex())
    return pool.amax().to(rows).expand_as(rows).clone() if codes else rows


#: what all rows are, and what some of them become
PROVOCATIONS: tuple[tuple[Change, Change], ...] = (
    (same, loud),
    (bright, low),
    (silent, same),
    (same, short),
    (short, same),
    (shown, hidden),
    (lowest, highest),
    (highest, lowest),
    (same, broken),
    (same, same),
)


def provoke(understudy: Understudy, layouts: Any, size: int) -> None:
    """Make all comparisons with ``size`` examples.

    Raises:
        Refused: examples mix.
    """
    rows, new = understudy.stand_ins(size, 0), understudy.stand_ins(size, 1, salt=1)
    losses = understudy.losses(rows, layouts)
    _nothing_carried(understudy, layouts, rows, new)
    known = {} if understudy.random else {same: losses}
    for number, (mine, theirs) in enumerate(PROVOCATIONS):
        kept = torch.arange(size) % 2 == number % 2
        before = _changed(understudy, rows, mine)
        others = _changed(understudy, new if mine is theirs else rows, theirs)
        if all(a is b for a, b in zip(tree_leaves(before), tree_leaves(others))):
            continue  # nothing in this batch is of the kind that would change
        after = choose(kept, before, others)
        draw = number if understudy.random else 0
        try:
            if mine not in known or understudy.random:
                known[mine] = understudy.losses(before, layouts, draw)
            changed = understudy.losses(after, layouts, draw)
        except Exception as error:  # such rows can be outside what a model accepts
            if is_final(error):
                raise
            continue
        if not same_rows(known[mine], changed, kept):
            raise Refused(SPREADS if theirs is broken else MIXED)
    _anywhere(understudy, layouts, rows, losses)


def _changed(understudy: Understudy, rows: Any, change: Change) -> Any:
    leaves, tree = tree_flatten(rows)
    pools = understudy.stand_ins.leaves
    changed = [change(t, pool) if isinstance(t, Tensor) else t for t, pool in zip(leaves, pools)]
    return tree_unflatten(changed, tree)


def _anywhere(understudy: Understudy, layouts: Any, rows: Any, losses: Tensor) -> None:
    """An example's loss is the same wherever it stands, and however many others there are."""
    if understudy.random:  # another place draws other numbers
        return
    try:
        turned = understudy.losses(_map(lambda t: torch.cat([t.flip(0), t[:1]]), rows), layouts)
    except Exception as error:  # the model takes no other batch size
        if is_final(error):
            raise
        return
    wanted = torch.cat([losses.flip(0), losses[:1]])
    if not same_rows(wanted, turned, torch.ones(len(wanted), dtype=torch.bool)):
        raise Refused(PLACE)


def _map(change: Callable[[Tensor], Tensor], rows: Any) -> Any:
    return tree_map(lambda t: change(t) if isinstance(t, Tensor) else t, rows)


def _nothing_carried(understudy: Understudy, layouts: Any, rows: Any, new: Any) -> None:
    """``rows`` after themselves (the pass before was theirs) and after others."""
    after = []
    for first in (None, new):
        if first is not None:
            understudy.losses(first, layouts)
        try:
            after.append(understudy.losses(rows, layouts, carry=True))
        except Exception as error:  # the second pass does not go with what the first one left
            if is_final(error):
                raise
            raise Refused(CARRIED) from error
    everyone = torch.ones(len(after[0]), dtype=torch.bool)
    if not same_rows(*after, everyone):
        raise Refused(CARRIED)
