"""Faults of clipping in PyTorch.

The rehearsal, which compares a plan with ordinary autograd before it is used and refuses most of these, is
silenced: what is asked is whether they are seen from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dptrain.torch import baselines
from dptrain.torch.batch import replace_rows
from dptrain.torch.bookkeeping import Bookkeeping
from dptrain.torch.clipped_sum import ClippedSum
from dptrain.torch.clipping import ClippedGrad
from dptrain.torch.guards import check_batch, trainable

from .common import Patch

Grads = dict[str, Tensor]


def silence_the_rehearsal(patch: Patch) -> None:
    patch.replace("dptrain.torch.clipping", "rehearse", lambda *args: None)


def _factors(patch: Patch, change: Callable[[Callable], Callable]) -> None:
    silence_the_rehearsal(patch)
    patch.around("dptrain.torch.bookkeeping", "clip_factors", change)


def twice_the_clip_norm(patch: Patch) -> None:
    _factors(patch, lambda true: lambda squared, clip_norm, *rest: true(squared, 2 * clip_norm, *rest))


def factors_in_bfloat16(patch: Patch) -> None:
    _factors(patch, lambda true: lambda squared, *rest: true(squared, *rest).bfloat16().to(squared.dtype))


def norm_without_a_layer(patch: Patch) -> None:
    """The first matrix that is met in the backward pass, the last layer's."""
    silence_the_rehearsal(patch)

    def change(true: Callable) -> Callable:
        def record(books: Bookkeeping, use: Any, fact: Any, *rest: Any) -> None:
            before = len(books.parts), len(books.bounded)
            true(books, use, fact, *rest)
            if use.value.dim() > 1 and not getattr(books, "left_out", False):
                books.left_out = True
                del books.parts[before[0] :], books.bounded[before[1] :]

        return record

    patch.around(Bookkeeping, "_record_alone", change)


def norm_without_cross_terms(patch: Patch) -> None:
    silence_the_rehearsal(patch)

    def tied(true: Callable) -> Callable:
        def squared_norms(factors: list) -> tuple[Tensor, Tensor]:
            squared, bounds = zip(*(true([one]) for one in factors))
            return torch.stack(squared).sum(0), torch.stack(bounds).sum(0)

        return squared_norms

    def general(true: Callable) -> Callable:
        def pulled(capture: Any, values: list, gradients: list, leaves: list) -> list[Tensor | None]:
            each = [true(capture, [v], [g], leaves) for v, g in zip(values, gradients)]
            parts = [[g for g in of_leaf if g is not None] for of_leaf in zip(*each)]
            return [torch.stack(p, 1) if p else None for p in parts]

        return pulled

    patch.around("dptrain.torch.bookkeeping", "tied_squared_norms", tied)
    patch.around("dptrain.torch.bookkeeping", "pull_back_examples", general)


def nan_spreads(patch: Patch) -> None:
    def change(true: Callable) -> Callable:
        def sums(plan: Any, books: Bookkeeping, *rest: Any) -> Grads:
            books.included = None
            return true(plan, books, *rest)

        return sums

    silence_the_rehearsal(patch)
    patch.around("dptrain.torch.batch", "_sums", change)


def _call(patch: Patch, change: Callable[[Callable], Callable]) -> None:
    silence_the_rehearsal(patch)
    patch.around(ClippedGrad, "__call__", change)


def mask_ignored(patch: Patch) -> None:
    _call(
        patch,
        lambda true: (
            lambda clipped, batch, mask=None, into=None, **how: true(clipped, batch, None, into, **how)
        ),
    )


def forgets_earlier_parts(patch: Patch) -> None:
    def change(true: Callable) -> Callable:
        def call(
            clipped: ClippedGrad, batch: Any, mask: Any = None, into: Any = None, **how: Any
        ) -> ClippedSum:
            if into is not None:
                torch._foreach_zero_(list(into.grads.values()))
            return true(clipped, batch, mask, into, **how)

        return call

    _call(patch, change)


def counts_the_first_part_twice(patch: Patch) -> None:
    def change(true: Callable) -> Callable:
        def call(
            clipped: ClippedGrad, batch: Any, mask: Any = None, into: Any = None, **how: Any
        ) -> ClippedSum:
            out = true(clipped, batch, mask, into, **how)
            if into is None:
                torch._foreach_mul_(list(out.grads.values()), 2)
            return out

        return call

    _call(patch, change)


def _other_sums(patch: Patch, sums: Callable[[ClippedGrad, Any, Tensor], tuple[Grads, Tensor]]) -> None:
    """``sums(clipped, batch, mask) -> grads, losses [B]`` in place of clipping."""

    def change(true: Callable) -> Callable:
        def call(
            clipped: ClippedGrad, batch: Any, mask: Any = None, into: Any = None, **how: Any
        ) -> ClippedSum:
            size, mask = check_batch(batch, mask)
            if mask is not None and not bool(mask.any()):
                return true(clipped, batch, mask, into, **how)
            mask = torch.ones(size, dtype=torch.bool) if mask is None else mask
            grads, losses = sums(clipped, replace_rows(batch, mask), mask)
            out = ClippedSum(grads, torch.zeros_like(losses), losses, clipped.clip_norm)
            return out if into is None else into.add_(out)

        return call

    _call(patch, change)


def _norm(gradients: Any) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).norm()


def _clipped_to(gradient: Tensor, norm: Tensor, clip_norm: float) -> Tensor:
    return gradient * (clip_norm / norm).clamp(max=1)


def clipped_as_a_group(patch: Patch) -> None:
    def sums(clipped: ClippedGrad, batch: Any, mask: Tensor) -> tuple[Grads, Tensor]:
        model, count = clipped.model, mask.sum()
        grads, _, losses = baselines.non_private(
            model, clipped.loss_fn, trainable(model), batch, mask, len(mask)
        )
        norm = _norm(grads.values()) / count
        return {name: _clipped_to(g, norm, clipped.clip_norm) for name, g in grads.items()}, losses

    _other_sums(patch, sums)


def clipped_by_layer(patch: Patch) -> None:
    def sums(clipped: ClippedGrad, batch: Any, mask: Tensor) -> tuple[Grads, Tensor]:
        parameters = trainable(clipped.model)
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        with torch.enable_grad():
            losses = clipped.loss_fn(clipped.model, batch)
        for b in mask.nonzero().flatten().tolist():
            grads = torch.autograd.grad(
                losses[b], list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            for name, g in zip(parameters, grads):
                total[name] += _clipped_to(g, _norm([g]), clipped.clip_norm)
        return total, losses.detach()

    _other_sums(patch, sums)


def mixing_is_not_seen(patch: Patch) -> None:
    silence_the_rehearsal(patch)
    patch.replace("dptrain.torch.probe", "provoke", lambda *args: None)
    patch.replace("dptrain.torch.separation", "_compare", lambda *args: None)
    patch.replace("dptrain.torch.separation", "_crowded", lambda *args: None)
