"""Faults of clipping in JAX. What was compiled before a fault is planted does not have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dptrain.core import methods
from dptrain.jax import baselines
from dptrain.jax.accumulate import Accumulator
from dptrain.jax.bookkeeping import Bookkeeping, Part, Term
from dptrain.jax.call import Call
from dptrain.jax.clipping import ClippedGrad
from dptrain.jax.factors import sum_of_squares
from dptrain.jax.planner import Plan

from .common import Patch, zeros_like


def _factors(patch: Patch, change: Callable[[Callable], Callable]) -> None:
    patch.around("dptrain.jax.factors", "clip_factors", change)


def twice_the_clip_norm(patch: Patch) -> None:
    _factors(patch, lambda true: lambda s, mask, clip_norm, *rest: true(s, mask, 2 * clip_norm, *rest))


def factors_in_bfloat16(patch: Patch) -> None:
    def change(true: Callable) -> Callable:
        return lambda squared, *rest: true(squared, *rest).astype(jnp.bfloat16).astype(squared.dtype)

    _factors(patch, change)


def norm_without_a_layer(patch: Patch) -> None:
    """The first group of parameters that holds a matrix."""

    def change(true: Callable) -> Callable:
        def squared(books: Bookkeeping, number: int, part: Part) -> Term:
            matrices = [i for i, p in enumerate(books.parts) if any(v.aval.ndim > 1 for v in p.group.values)]
            found = true(books, number, part)
            return Term(jnp.zeros_like(found.squared)) if number == matrices[0] else found

        return squared

    patch.around(Bookkeeping, "_squared", change)


def norm_without_cross_terms(patch: Patch) -> None:
    def change(true: Callable) -> Callable:
        def squared(books: Bookkeeping, number: int, part: Part) -> Term:
            found = true(books, number, part)
            if len(part.uses) < 2:
                return found
            total: Any = 0.0
            for use in part.uses:
                gradient = jax.vmap(lambda a, g, use=use: books._slices(use, a, g))(*books._operands(use))
                like = {
                    v: jnp.zeros((len(gradient), *v.aval.shape), gradient.dtype) for v in part.group.values
                }
                gradients = list({**like, use.value: gradient}.values())
                at_leaves = books._at_the_leaves(part, books.pulls[number], gradients)
                total = total + sum_of_squares(at_leaves, 1)
            return Term(total)

        return squared

    patch.around(Bookkeeping, "_squared", change)


def nan_spreads(patch: Patch) -> None:
    for module in ("by_uses", "baselines"):
        patch.replace(f"dptrain.jax.{module}", "unless_infinite", lambda found, *rest: found)


def mask_ignored(patch: Patch) -> None:
    patch.around(ClippedGrad, "checked", lambda true: lambda clipped, args, mask=None: true(clipped, args))


def forgets_earlier_parts(patch: Patch) -> None:
    def change(true: Callable) -> Callable:
        def add(accumulator: Accumulator, total: Any, *args: Any, mask: Any) -> Any:
            return true(accumulator, jax.tree.map(zeros_like, total), *args, mask=mask)

        return add

    patch.around(Accumulator, "add", change)


def counts_the_first_part_twice(patch: Patch) -> None:
    def change(true: Callable) -> Callable:
        def add(accumulator: Accumulator, total: Any, *args: Any, mask: Any) -> Any:
            first = not any(bool((x != 0).any()) for x in jax.tree.leaves(total))
            out = true(accumulator, total, *args, mask=mask)
            return true(accumulator, out, *args, mask=mask) if first else out

        return add

    patch.around(Accumulator, "add", change)


def _other_step(patch: Patch, step_of: Callable[[float], Callable[[Call, Array], tuple]]) -> None:
    """``step_of(clip_norm)(call, mask) -> (sums, norms, losses, aux)`` in place of clipping."""
    patch.replace(
        ClippedGrad,
        "_planned",
        lambda clipped, call, way=None: (
            Plan(methods.Capture.VMAP, call.size),
            step_of(clipped.clip_norm),
            "",
        ),
    )


def clipped_as_a_group(patch: Patch) -> None:
    def step_of(clip_norm: float) -> Callable[[Call, Array], tuple]:
        def step(call: Call, mask: Array) -> tuple:
            sums, norms, losses, aux = baselines.non_private(call, mask)
            norm = jnp.sqrt(sum_of_squares(sums)) / jnp.maximum(1, jnp.sum(mask))
            factor = jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30))
            return [(factor * s).astype(s.dtype) for s in sums], norms, losses, aux

        return step

    _other_step(patch, step_of)


def clipped_by_layer(patch: Patch) -> None:
    def step_of(clip_norm: float) -> Callable[[Call, Array], tuple]:
        def step(call: Call, mask: Array) -> tuple:
            gradient = jax.value_and_grad(lambda p, e: call.loss(p, e, call.others)[0])
            losses, gradients = jax.vmap(gradient, (None, 0))(call.parameters, call.data)
            sums = []
            for g in gradients:
                norm = jnp.sqrt(sum_of_squares([g], 1))
                factor = jnp.where(mask, jnp.minimum(1, clip_norm / jnp.maximum(norm, 1e-30)), 0)
                sums.append(jnp.tensordot(factor.astype(g.dtype), g, 1, precision="highest"))
            return sums, jnp.zeros_like(losses), losses, []

        return step

    _other_step(patch, step_of)
