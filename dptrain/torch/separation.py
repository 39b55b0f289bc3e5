"""That examples stay apart, seen at the real batch size.

(a) Back-propagate the losses of half of the examples: of every recorded gradient, the rows of the
    other half must be exactly zero and its own not all zero.
(b) Replace the other half: every loss of the first, and every row of theirs in every recorded operand
    and gradient, must stay as it was up to rounding. A stop-gradient batch mean, a hand-written batch
    norm and capacity-limited routing pass (a) and still let one example move another's gradient.
(c) The losses again, with rows that crowd together; the rest is in ``provocations.py``.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import routing
from .capture import Capture, Use
from .errors import WRITTEN, Misfit, Refused, is_final
from .guards import backward, listed
from .layout import Routed
from .structure import Structure
from .trace import CHANGING, Findings, match, names
from .understudy import Understudy

MIXED = "examples mix: replacing one example changes the loss of another."
#: a batch mean of a thousand examples moves by 1e-3; rounding by less than this
TOLERANCE = 3e-5


@dataclass
class Record:
    """One pass in which the losses of some examples were back-propagated."""

    losses: Tensor
    findings: Findings
    #: of each use by name: two numbers a row for the gradient, two for the operand
    digests: dict[tuple, Tensor]
    #: of each value that is no leaf, by name
    values: dict[tuple, tuple[float, float]]
    buffers: dict[str, Tensor]
    #: names of uses that some example moved
    moved: set[tuple]


def check(understudy: Understudy, structure: Structure, size: int, attempt: int) -> Record | None:
    """(a), (b) and (c); None if the stand-ins of this attempt can tell nothing.

    Raises:
        Refused: examples mix, or data is written where it would be released.
        Misfit: the examples of a use are not where the small sizes had them.
    """
    try:
        return _check(understudy, structure, size, attempt)
    except Exception as error:  # rows outside what the model accepts
        if is_final(error):
            raise
        understudy.failure = traceback.format_exc(limit=-1).strip().splitlines()[-1]
        return None


def _check(understudy: Understudy, structure: Structure, size: int, attempt: int) -> Record | None:
    understudy.randomise(attempt)
    rows = understudy.stand_ins(size, attempt)
    kept = torch.zeros(size, dtype=torch.bool)
    kept[torch.randperm(size, generator=torch.Generator().manual_seed(attempt))[: (size + 1) // 2]] = True
    written = understudy.parameter_digest()
    first = _record(understudy, structure, rows, kept)
    if understudy.parameter_digest() != written:
        raise Refused(WRITTEN)
    if first is None:
        return None
    other_rows = choose(kept, rows, understudy.stand_ins(size, attempt + 1, salt=1))
    second = _record(understudy, structure, other_rows, kept, first.findings)
    if second is None or bool((first.losses == second.losses)[~kept].all()):
        return None
    _compare(first, second, kept)
    _crowded(understudy, structure.layouts, size, attempt)
    return first


def _record(understudy: Understudy, structure: Structure, rows, kept, known=None) -> Record | None:
    size = len(kept)
    capture, losses = understudy.forward(rows, size, structure.layouts)
    kept = kept.to(losses.device)
    if not bool(losses.isfinite().all()):
        return None
    findings = known or structure.at_size(capture, understudy.parameters)
    facts = match(findings, capture, understudy.parameters)
    facts = routing.settle(facts, capture, losses, None, understudy.parameters, size)
    called = names(facts)
    record = Record(losses.detach(), findings, {}, {}, {}, set())
    for name, use in zip(called, capture.uses):
        if use.value.grad_fn is not None and use.value.untyped_storage().nbytes():
            record.values[name] = _value_digest(use)

    def look(use: Use, a: Tensor | None, g: Tensor) -> None:
        fact = facts[use.index]
        if fact.layout is None:
            if bool(g.ne(0).any()):
                raise Misfit(CHANGING, fact.pattern)
            return
        if not fact.layout.fits(g, size):
            raise Misfit(CHANGING, fact.pattern)
        split = fact.layout.split(g, size).reshape(size, -1)
        busy = split.abs().amax(1) != 0 if split.numel() else torch.zeros_like(kept)
        if bool(busy[~kept].any()):
            if not fact.routed:
                raise Misfit(CHANGING, fact.pattern)
            raise Refused(
                f"examples mix in {use.operation} with {listed(fact.leaves)}: the loss of one "
                "example moves another's part of its gradient."
            )
        if bool(busy.any()):
            record.moved.add(called[use.index])
        # in which order routed rows come is no matter: they are summed
        rows = fact.layout.width if isinstance(fact.layout, Routed) else 1
        parts = [_digest(split, rows)]
        if a is not None and fact.layout.fits(a, size):
            parts.append(_digest(fact.layout.split(a, size).reshape(size, -1), rows))
        name, digest = called[use.index], torch.stack(parts, 1)
        record.digests[name] = record.digests[name] + digest if name in record.digests else digest

    capture.sink = look
    backward(capture, losses[kept].sum(), understudy.parameters, retain_graph=capture.hooked)
    if capture.hooked:
        _loud_gradients(capture, losses, kept, facts, understudy)
    record.buffers = understudy.buffers()
    return record


def _loud_gradients(capture: Capture, losses: Tensor, kept: Tensor, facts, understudy: Understudy) -> None:
    """A hook may clip the gradient of the whole batch: others' must not matter, however large."""
    seen: list[dict[int, Tensor]] = []

    def look(use: Use, a: Tensor | None, g: Tensor) -> None:
        layout = facts[use.index].layout
        if layout is not None:
            seen[-1][use.index] = _digest(layout.split(g, len(kept)).reshape(len(kept), -1), 1)

    capture.sink = look
    for scale in (1.0, 1e4):
        seen.append({})
        total = torch.where(kept, losses, scale * losses).sum()
        backward(capture, total, understudy.parameters, retain_graph=scale == 1.0)
    for index, digest in seen[0].items():
        if not same_rows(digest, seen[1][index], kept, TOLERANCE):
            raise Refused(
                "examples mix: a hook on an activation lets the size of one example's gradient change "
                "another's."
            )


def _compare(first: Record, second: Record, kept: Tensor) -> None:
    for name in first.values.keys() & second.values.keys():
        if first.values[name] != second.values[name]:
            raise Refused(
                "data reaches a value made of parameters by a way that cannot be followed, such as "
                "numpy or torch.func.vmap: compute it with ordinary tensor operations."
            )
    for name, buffer in second.buffers.items():
        if not torch.equal(buffer, first.buffers[name]):
            raise Refused(
                f"the buffer {name} of the model depends on the data, which would be released "
                "without any protection: freeze it, for example with .eval() on its module."
            )
    if not same_rows(first.losses, second.losses, kept):
        raise Refused(MIXED)
    for name in first.digests.keys() & second.digests.keys():
        if not same_rows(first.digests[name], second.digests[name], kept, TOLERANCE):
            operation, leaves, *_ = name
            raise Refused(
                f"examples mix in {operation} with {listed(leaves)}: replacing one example changes "
                "another's part of the gradient."
            )


def _crowded(understudy: Understudy, layouts, size: int, attempt: int) -> None:
    """Rows nearly alike and then half of them another: what fills a router's capacity."""
    rows = understudy.stand_ins.crowd(size, attempt)
    kept = torch.arange(size) >= (size + 1) // 2  # routing favours whoever comes first
    others = understudy.stand_ins.crowd(size, attempt + 1, 1, -1.0)
    try:
        losses = understudy.losses(rows, layouts)
        changed = understudy.losses(choose(kept, rows, others), layouts)
    except Exception as error:  # such rows can be outside what a model accepts
        if is_final(error):
            raise
        return
    if not same_rows(losses, changed, kept):
        raise Refused(MIXED)


# ------------------------------------------------------------------ digests


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device).reshape(-1, *[1] * (like.dim() - 1))


def choose(keep: Tensor, rows: Any, new: Any) -> Any:
    """The rows in ``keep`` from one batch, the others from another."""
    return tree_map(
        lambda t, u: torch.where(_column(keep, t), t, u) if isinstance(t, Tensor) else t, rows, new
    )


def _value_digest(use: Use) -> tuple[float, float]:
    """Of a value that is no leaf: data must not change it."""
    # masks hold -inf or the lowest number there is, next to which everything else would drown
    flat = use.value.detach().double().flatten().nan_to_num(0, 0, 0)
    flat = flat.where(flat.abs() < 1e30, 0)
    wave = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype) * 1.7)
    return float(flat.sum()), float(flat @ wave)


def _digest(split: Tensor, rows: int) -> Tensor:
    """Two numbers an example, a projection of the sum of its rows and the sum of all squares:
    ``[B, rows * F] -> [B, 2]`` in float64."""
    flat = split.double() if not split.is_floating_point() or split.dtype == torch.float64 else split.float()
    squares = flat.square().sum(1)
    total = flat.unflatten(1, (rows, -1)).sum(1) if rows > 1 else flat
    direction = torch.cos(torch.arange(total.shape[1], device=flat.device, dtype=flat.dtype) * 1.7)
    return torch.stack([total @ direction, squares], 1).double()


def same_rows(first: Tensor, second: Tensor, rows: Tensor, tolerance: float | None = None) -> bool:
    """Equal up to rounding in these rows; what is not finite must stay so."""
    if tolerance is None:  # a model in float64 may still have a norm layer in float32
        tolerance = 1e-6 if first.dtype == torch.float64 else TOLERANCE
    rows = rows.to(first.device)
    first, second = first[rows].double(), second[rows].double()
    finite = first.isfinite()
    if bool((finite != second.isfinite()).any()):
        return False
    first, second = first.where(finite, 0), second.where(finite, 0)
    scale = first.abs().amax(0, keepdim=True)
    return bool(((first - second).abs() <= tolerance * scale + 1e-30).all())
