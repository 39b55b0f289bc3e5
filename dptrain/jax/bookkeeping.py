"""From what was captured to norms, and from clip factors to the clipped sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import jax
import jax.numpy as jnp
from jax import Array, lax

from . import gram
from .capture import Capture, Captured, Use
from .factors import sum_of_squares, total, weighted_sum
from .program import Value
from .pullback import Group, Pull
from .uses import Table, accumulated


class Route(StrEnum):
    """How a group of values is normed and summed."""

    GRAM = "gram+contract"
    KEEP = "materialise+reuse"
    DROP = "materialise+contract"


@dataclass(frozen=True, eq=False)
class Part:
    """A group, the uses of its values, and the route that it takes."""

    group: Group
    uses: tuple[Use, ...]
    direct: tuple[Value, ...]
    route: Route = Route.DROP  #: which fits every group

    @property
    def single(self) -> Use | None:
        """The one use that is all there is: its gradient has the parameter's norm."""
        return self.uses[0] if self.group.alone and len(self.uses) == 1 and not self.direct else None


def parts(capture: Capture, groups: Sequence[Group]) -> list[Part]:
    """All groups with their uses."""
    out = []
    for group in groups:
        uses = tuple(use for use in capture.uses if use.value in group.values)
        direct = tuple(v for v in group.values if v in capture.direct)
        out.append(Part(group, uses, direct))
    return out


@dataclass(frozen=True, eq=False)
class Term:
    """A part's squared norms ``[B]``, rounded up; where that is too far, they are formed.

    Attributes:
        doubtful: whether the bound on the error of one of them is too large to be accepted.
        formed: them, without a bound, from the gradients.
    """

    squared: Array
    doubtful: Array | None = None
    formed: Callable[[], Array] | None = None

    def settled(self) -> Array:
        """What counts, doubtful or not."""
        if self.doubtful is None or self.formed is None:
            return self.squared
        return lax.cond(self.doubtful, self.formed, lambda: self.squared)


class Bookkeeping:
    """One physical batch: what was captured, and the norms and sums of its parts."""

    def __init__(
        self,
        parts: Sequence[Part],
        captured: Captured,
        parameters: Sequence[Array],
        constants: Mapping[Value, Array],
        part_of: Sequence[int],
    ):
        self.parts, self.captured = parts, captured
        #: by the number of a leaf: the part of the clip rule that it belongs to
        self.part_of = part_of
        self.pulls = [part.group.pull(parameters, constants) for part in parts]
        self.kept: dict[int, list[Array]] = {}

    def squared_norms(self, count: int) -> list[Array]:
        """Of each example's gradient, ``[B]``, rounded up where rounding matters: over the parameters of each
        of the clip rule's ``count`` parts."""
        found: list[list[Term]] = [[] for _ in range(count)]
        for number, part in enumerate(self.parts):
            if self._crosses(part):
                for leaf, gradient in zip(part.group.leaves, self._leaf_gradients(number, part)):
                    found[self.part_of[leaf]].append(Term(sum_of_squares([gradient], 1)))
            else:
                found[self.part_of[part.group.leaves[0]]].append(self._squared(number, part))
        doubts = [term.doubtful for mine in found for term in mine if term.doubtful is not None]

        def joined(of: Callable[[Term], Array]) -> list[Array]:
            squared = [[of(term) for term in mine] for mine in found]
            nothing = jnp.zeros_like(next(each for mine in squared for each in mine))
            return [total(mine) if mine else nothing for mine in squared]

        def as_found() -> list[Array]:
            return joined(lambda term: term.squared)

        if not doubts:
            return as_found()
        # One question for all: each branch has operands in an order of their own, and copies of them.
        return lax.cond(jnp.any(jnp.stack(doubts)), lambda: joined(Term.settled), as_found)

    def _crosses(self, part: Part) -> bool:
        """Whether the leaves belong to several parts of the clip rule: their values have no one factor."""
        return len({self.part_of[leaf] for leaf in part.group.leaves}) > 1

    def _leaf_gradients(self, number: int, part: Part) -> list[Array]:
        """Of each leaf of the group, ``[B, *shape]``."""
        if number not in self.kept:
            self.kept[number] = self._at_the_leaves(part, self.pulls[number], self._example_gradients(part))
        return self.kept[number]

    def _squared(self, number: int, part: Part) -> Term:
        if part.route is Route.GRAM and part.single is not None:
            return self._by_gram(part.single)
        gradients = self._example_gradients(part)
        if part.route is Route.KEEP:
            self.kept[number] = gradients
        return Term(sum_of_squares(self._at_the_leaves(part, self.pulls[number], gradients), 1))

    def _at_the_leaves(self, part: Part, pull: Pull, gradients: list[Array]) -> list[Array]:
        return gradients if part.group.alone else jax.vmap(lambda *g: pull(g))(*gradients)

    def _by_gram(self, use: Use) -> Term:
        a, g = self._operands(use)  # [B, slices, turns, ...]
        if isinstance(use.rule, Table):

            def flat(a: Array, g: Array) -> Array:
                return use.rule.squared_norm(a.reshape(-1, 1), g.reshape(-1, *use.rule.value.shape[1:]))

            return Term(jnp.sum(jax.vmap(jax.vmap(flat))(a, g), 1))
        rows, cols = jax.vmap(jax.vmap(jax.vmap(use.rule.factors)))(a, g)  # [B, slices, turns, E, T, F]
        rows, cols = (
            x.swapaxes(2, 3).reshape(len(x), x.shape[1] * x.shape[3], x.shape[2] * x.shape[4], x.shape[5])
            for x in (rows, cols)
        )
        squared, bound = gram.squared_norms(rows, cols)

        def formed() -> Array:
            one = lambda a, g: sum_of_squares([self._slices(use, a, g)])  # noqa: E731
            return lax.map(lambda ag: one(*ag), (a, g))

        return Term(squared + bound, jnp.any(gram.doubtful(squared, bound)), formed)

    def _operands(self, use: Use) -> tuple[Array, Array]:
        """``[B, slices, turns, ...]`` each."""
        a, g = self.captured.operands[use.number], self.captured.gradients[use.number]
        return use.stacking.ordered(a, 1), use.stacking.ordered(g, 1)

    def _slices(self, use: Use, a: Array, g: Array) -> Array:
        """The gradient of one example's value, ``[*value.shape]``, of ``[slices, turns, ...]``."""
        if use.stacking.turns == 1:
            out = jax.vmap(use.rule.example_gradient)(a[:, 0], g[:, 0])
        else:
            out = jax.vmap(use.rule.gradient)(a, g)
        return out.reshape(use.value.aval.shape)

    def _example_gradients(self, part: Part) -> list[Array]:
        """Of each value of the group, ``[B, *shape]``."""
        sums = {v: g.astype(accumulated(g.dtype)) for v, g in self._direct(part).items()}
        for use in part.uses:
            gradient = jax.vmap(lambda a, g, use=use: self._slices(use, a, g))(*self._operands(use))
            sums[use.value] = sums[use.value] + gradient if use.value in sums else gradient
        return [sums[v] for v in part.group.values]

    def _direct(self, part: Part) -> dict[Value, Array]:
        return {v: self.captured.direct[v] for v in part.direct}

    # -- sums ----------------------------------------------------------------------------------------------

    def sums(self, factors: Sequence[Array]) -> dict[int, Array]:
        """The clipped sum of each leaf by its number.

        Args:
            factors: clip factors ``[B]`` for each part of the clip rule, 0 for whoever contributes nothing.
                All gradients are finite.
        """
        out: dict[int, Array] = {}
        for number, (part, pull) in enumerate(zip(self.parts, self.pulls)):
            if self._crosses(part):
                for leaf, gradient in zip(part.group.leaves, self._leaf_gradients(number, part)):
                    out[leaf] = weighted_sum(factors[self.part_of[leaf]], gradient)
                continue
            own = factors[self.part_of[part.group.leaves[0]]]
            if number in self.kept:
                summed = [weighted_sum(own, g) for g in self.kept[number]]
            else:
                summed = self._contracted(part, own)
            out.update(zip(part.group.leaves, pull(summed)))
        return out

    def _contracted(self, part: Part, factors: Array) -> list[Array]:
        sums = {
            v: weighted_sum(factors, g.astype(accumulated(g.dtype))) for v, g in self._direct(part).items()
        }
        for use in part.uses:
            a, g = self._operands(use)
            a, g = _weighted(factors, a, g)
            # [B, slices, turns, ...] -> [slices, B * turns, ...]
            a, g = (x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:]) for x in (a, g))
            gradient = jax.vmap(use.rule.gradient)(a, g).reshape(use.value.aval.shape)
            sums[use.value] = sums[use.value] + gradient if use.value in sums else gradient
        return [sums[v] for v in part.group.values]


def _weighted(factors: Array, a: Array, g: Array) -> tuple[Array, Array]:
    """Operands and output gradients ``[B, ...]`` as they are contracted: the smaller of the two times the
    clip factors ``[B]``, in the type in which gradients are summed."""
    g = g.astype(accumulated(g.dtype))

    def times(x: Array) -> Array:
        return x * factors.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    if jnp.issubdtype(a.dtype, jnp.floating) and a.size < g.size:
        return times(a.astype(jnp.promote_types(a.dtype, g.dtype))), g
    return a, times(g)
