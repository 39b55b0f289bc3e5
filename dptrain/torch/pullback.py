"""From gradients of parameter-only values to gradients of leaf parameters.

A per-example norm is taken over the *sum* of the pulled-back gradients of all uses of a leaf.
Uses fall into groups that share leaves; within a group there are four cases:

* ``alone``: every value is a selection of its leaf's elements (the leaf itself, a transpose, a
  slice) and no element is selected twice, so pulling back keeps norms and uses are orthogonal;
* ``tied``: several uses of one whole matrix (tied embeddings, a layer called three times), whose
  cross terms have a Gram form;
* ``standardised``: one use of a leaf that was standardised per output channel (``standardised.py``);
* ``general``: anything else (weight standardisation, W + BA, overlapping slices): per-example
  gradients are pulled back by a batched vector-Jacobian product for the norm, and the clipped sum
  by a single one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from . import standardised
from .capture import Capture, Use, storage_key
from .layout import Placement
from .uses import gram
from .uses.base import widen
from .uses.convolution import Convolution
from .uses.gram import gamma
from .uses.linear import Linear
from .uses.lookup import Lookup

#: autograd nodes that move elements without changing them
SELECTIONS = {
    "T", "Transpose", "Permute", "Movedim", "View", "UnsafeView", "ReshapeAlias", "Clone", "Alias",
    "Unsqueeze", "Squeeze", "Slice", "Select", "Split", "SplitWithSizes", "Unbind", "Expand",
    "Contiguous", "ViewAsReal", "ViewAsComplex",
}  # fmt: skip


class Kind(Enum):
    ALONE = "alone"
    TIED = "tied"
    STANDARDISED = "standardised"
    GENERAL = "general"


@dataclass(frozen=True)
class Group:
    """Uses (by index) that share leaves (by name)."""

    kind: Kind
    leaves: tuple[str, ...]
    uses: tuple[int, ...]
    #: whether examples must be pulled back one by one and then summed, not the other way round: a
    #: value is narrower than float32, or made by a function whose derivative need not be linear
    one_by_one: bool = False
    #: for tied uses: whether the value is the transpose of the leaf
    flipped: tuple[bool, ...] = ()


def leaves_of(value: Tensor, names: dict[int, str]) -> tuple[str, ...]:
    """Names of the leaf parameters that ``value`` depends on, sorted."""
    if id(value) in names:
        return (names[id(value)],)
    found, seen, stack = set(), set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(names.get(id(leaf), f"an unregistered tensor of shape {tuple(leaf.shape)}"))
        stack += [parent for parent, _ in node.next_functions]
    return tuple(sorted(found))


def group_uses(uses: list[Use], names: dict[int, str], parameters: dict[str, Tensor]) -> list[Group]:
    """Partition the uses by the leaves that they share and say how each group is pulled back."""
    owners: dict[str, str] = {}

    def root(leaf: str) -> str:
        while owners.setdefault(leaf, leaf) != leaf:
            leaf = owners[leaf]
        return leaf

    leaves = [leaves_of(use.value, names) for use in uses]
    for first, *others in leaves:
        for other in others:
            owners[root(other)] = root(first)
    members: dict[str, list[int]] = {}
    for index, mine in enumerate(leaves):
        members.setdefault(root(mine[0]), []).append(index)
    groups = []
    for indices in members.values():
        shared = tuple(sorted({leaf for i in indices for leaf in leaves[i]}))
        mine = [uses[i] for i in indices]
        kind, flipped = _kind(mine, shared, parameters)
        if kind is Kind.ALONE:
            groups += [Group(kind, leaves[i], (i,)) for i in indices]
        else:
            one_by_one = in_low_precision(mine) or any(map(_rounds, mine))
            groups.append(Group(kind, shared, tuple(indices), one_by_one, flipped))
    return groups


def at_leaves(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The same uses, with the gradients of single examples pulled back to the leaves, and summed there."""
    members: dict[tuple[str, ...], tuple[int, ...]] = {}
    for group in groups:  # those of one leaf's selections differ in nothing but their uses
        members[group.leaves] = members.get(group.leaves, ()) + group.uses
    return tuple(Group(Kind.GENERAL, leaves, uses, one_by_one=True) for leaves, uses in members.items())


def within(groups: tuple[Group, ...], part_of: Mapping[str, int]) -> tuple[Group, ...]:
    """The same uses; a value whose leaves belong to several parts has no clip factor of its own, so the
    gradients of single examples are pulled back to those leaves and summed there."""

    def crosses(group: Group) -> bool:
        return len({part_of[leaf] for leaf in group.leaves}) > 1

    return tuple(at_leaves((group,))[0] if crosses(group) else group for group in groups)


def _kind(
    uses: list[Use], leaves: tuple[str, ...], parameters: dict[str, Tensor]
) -> tuple[Kind, tuple[bool, ...]]:
    if len(leaves) > 1 or in_low_precision(uses) or any(map(_rounds, uses)):
        return Kind.GENERAL, ()
    if len(uses) == 1 and isinstance(uses[0].rule, Convolution):  # noqa: SIM102
        if standardised.of(uses[0].value, parameters[leaves[0]]) is not None:
            return Kind.STANDARDISED, ()
    if not all(_is_selection(use.value) for use in uses):
        return Kind.GENERAL, ()
    leaf = parameters[leaves[0]]
    times = torch.zeros_like(leaf, dtype=torch.float32)
    for use in uses:
        times += _through(use.value, leaf, torch.ones_like(use.value))
    if not times.numel() or times.max() <= 1:
        return Kind.ALONE, ()
    if not all(isinstance(use.rule, (Linear, Lookup)) for use in uses) or leaf.dim() != 2:
        return Kind.GENERAL, ()
    flipped = tuple(_is_flipped(use.value, leaf) for use in uses)
    if None in flipped:
        return Kind.GENERAL, ()
    return Kind.TIED, flipped


def in_low_precision(uses: list[Use]) -> bool:
    """Whether a value that is no leaf is narrower than float32.

    Pulling a clipped sum back through it would round the sum to that type, by more than C.
    """
    wide = (torch.float32, torch.float64)
    return any(use.value.grad_fn is not None and use.value.dtype not in wide for use in uses)


def _rounds(use: Use) -> bool:
    """Whether pulling back may round or clamp: a value was cast on its way, perhaps to a narrower type and
    back, or made by a ``torch.autograd.Function`` of the model's."""
    stack, seen = [use.value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) or node.name().startswith("ToCopy"):
            return True
        stack += [parent for parent, _ in node.next_functions]
    return False


def geometry(value: Tensor, leaf: Tensor) -> tuple | None:
    """Which elements of its leaf a view shows: (offset, shape, strides); None if it is a copy."""
    if storage_key(value) != storage_key(leaf):
        return None
    return value.storage_offset() - leaf.storage_offset(), tuple(value.shape), value.stride()


def _is_selection(value: Tensor) -> bool:
    node = value.grad_fn
    while node is not None and getattr(node, "variable", None) is None:
        name = node.name().split("Backward")[0]
        if name not in SELECTIONS:
            return False
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        if len(parents) != 1:
            return False
        node = parents[0]
    return True


def _through(value: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    if value is leaf:
        return cotangent
    return torch.autograd.grad(value, leaf, cotangent, retain_graph=True)[0]


def _is_flipped(value: Tensor, leaf: Tensor) -> bool | None:
    """Whether a value is the transpose of a matrix (True) or the matrix (False), else None."""
    seen = geometry(value, leaf)
    if seen == geometry(leaf.detach(), leaf):
        return False
    return True if seen == geometry(leaf.detach().T, leaf) else None


# ---------------------------------------------------------------------- tied matrices


@dataclass
class Side:
    """One factor in the leaf's own orientation: dense ``[B, T, F]`` or one-hot indices ``[B, T]``."""

    data: Tensor

    @property
    def one_hot(self) -> bool:
        return not self.data.is_floating_point()

    @property
    def terms(self) -> int:
        """Features that an inner product of two rows sums over; one picked by an index is exact."""
        return 0 if self.one_hot else self.data.shape[-1]

    def squared(self, dtype: torch.dtype) -> Tensor:
        """Squared Frobenius norms ``[B]``."""
        if self.one_hot:
            return torch.full(self.data.shape[:1], self.data.shape[1], dtype=dtype, device=self.data.device)
        return self.data.square().sum((1, 2))

    def cross(self, other: Side, dtype: torch.dtype) -> Tensor:
        """Inner products of the rows of two factors, ``[B, T, S]``."""
        if self.one_hot and other.one_hot:
            return (self.data.unsqueeze(2) == other.data.unsqueeze(1)).to(dtype)
        if self.one_hot:
            return other.cross(self, dtype).mT
        if other.one_hot:
            index = other.data.unsqueeze(1).expand(-1, self.data.shape[1], -1)
            return self.data.gather(2, index)
        return gram.products(self.data, other.data)


def tied_factors(
    use: Use, flipped: bool, a: Tensor | None, g: Tensor, layout: Placement, batch_size: int
) -> tuple[Side, Side]:
    """(rows, cols) of a use in the orientation of its leaf ``[rows, cols]``."""
    if isinstance(use.rule, Lookup):
        indices, gradient = use.rule.picked(a, g, layout, batch_size)
        rows, cols = Side(indices), Side(gradient)
    else:
        factors = use.rule.factors(a, g, layout, batch_size)
        rows, cols = Side(factors.rows.squeeze(1)), Side(factors.cols.squeeze(1))
    return (cols, rows) if flipped else (rows, cols)


def tied_squared_norms(factors: list[tuple[Side, Side]]) -> tuple[Tensor, Tensor]:
    """``||sum_u R_u^T C_u||^2 = sum_{u,w} <R_u R_w^T, C_u C_w^T>`` and a bound on its error."""
    dtype = next(s.data for pair in factors for s in pair if not s.one_hot).dtype
    parts = []
    for i, (r1, c1) in enumerate(factors):
        parts.append(_own_product(r1, c1, dtype))
        for r2, c2 in factors[:i]:
            squared, bound = _product(r1, c1, r2, c2, dtype)
            parts.append((2 * squared, 2 * bound))
    squared = torch.stack([s for s, _ in parts])
    rounding = gamma(len(parts), dtype) * squared.abs().sum(0)
    return squared.sum(0), torch.stack([b for _, b in parts]).sum(0) + rounding


def _own_product(rows: Side, cols: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``<R R^T, C C^T>`` and its bound."""
    if rows.one_hot or cols.one_hot:
        return _product(rows, cols, rows, cols, dtype)
    return gram.squared_norms(rows.data.unsqueeze(1), cols.data.unsqueeze(1))


def _product(r1: Side, c1: Side, r2: Side, c2: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``<R_1 R_2^T, C_1 C_2^T>`` and its bound."""
    rr, cc = r1.cross(r2, dtype), c1.cross(c2, dtype)
    # roots first: the product may vanish
    rows, cols = (a.squared(dtype).sqrt() * b.squared(dtype).sqrt() for a, b in ((r1, r2), (c1, c2)))
    row_terms, col_terms = min(r1.terms, r2.terms), min(c1.terms, c2.terms)
    bound = gram.error_bound(
        rows,
        cols,
        gram.row_squares(rr.unsqueeze(1)),
        gram.row_squares(cc.unsqueeze(1)),
        gram.chunked_gamma(row_terms, dtype),
        gram.chunked_gamma(col_terms, dtype),
        rr[0].numel(),
    )
    bound += gram.underflow(rows, cols, row_terms, col_terms, rr[0].numel())
    return gram.total((rr * cc).unsqueeze(1)).to(dtype), bound


def tied_gradients(factors: list[tuple[Side, Side]], leaf: torch.Size) -> Tensor:
    """Per-example gradients ``[B, *leaf]`` of a tied matrix, where its Gram norm is in doubt."""
    total: Tensor | None = None
    for rows, cols in factors:
        if rows.one_hot:
            gradient = _scatter(rows.data, cols.data, leaf[0])
        elif cols.one_hot:
            gradient = _scatter(cols.data, rows.data, leaf[1]).mT
        else:
            gradient = rows.data.mT @ cols.data
        total = gradient if total is None else total + gradient
    assert total is not None
    return total


def _scatter(indices: Tensor, gradients: Tensor, size: int) -> Tensor:
    """``sum_t onehot(indices[b, t]) (x) gradients[b, t]``: ``[B, size, F]``."""
    out = gradients.new_zeros(indices.shape[0], size, gradients.shape[2])
    index = indices.unsqueeze(2).expand_as(gradients)
    return out.scatter_add_(1, index, gradients)


# ---------------------------------------------------------------------- general pull-back


def pull_back_examples(
    capture: Capture, values: list[Tensor], gradients: list[Tensor], leaves: list[Tensor]
) -> list[Tensor | None]:
    """Per-example gradients of leaves ``[B, *leaf]`` from those of values ``[B, *value]``.

    One vector-Jacobian product, batched over the examples. Leaves among the values get theirs as
    they are. The graph of the parameters is kept for the clipped sum.
    """
    out: list[Tensor | None] = [None] * len(leaves)
    position = {id(leaf): i for i, leaf in enumerate(leaves)}
    made: list[tuple[Tensor, Tensor]] = []
    for value, gradient in zip(values, gradients):
        i = position.get(id(value))
        if i is None:
            made.append((value, gradient.to(value.dtype)))
        else:
            out[i] = gradient if out[i] is None else out[i] + gradient
    if made:
        pulled = _batched_vjp(capture, [v for v, _ in made], leaves, [g for _, g in made])
        for i, more in enumerate(pulled):
            if more is not None:
                out[i] = widen(more) if out[i] is None else out[i] + more
    return out


def _batched_vjp(capture: Capture, values, leaves, gradients):
    options = {"retain_graph": True, "allow_unused": True}
    try:
        return capture.differentiate(values, leaves, gradients, is_grads_batched=True, **options)
    except RuntimeError:  # an operation without a batching rule: one example after the other
        each = [
            capture.differentiate(values, leaves, [g[b] for g in gradients], **options)
            for b in range(gradients[0].shape[0])
        ]
        return [None if col[0] is None else torch.stack(col) for col in zip(*each)]


def pull_back_sums(
    capture: Capture,
    sums: list[tuple[Tensor, Tensor]],
    parameters: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Gradients by name from sums over examples with respect to values; the graph is freed.

    Args:
        grads: to which they are added, in place.
    """
    running = frozenset(grads)

    def add(name: str, gradient: Tensor) -> None:
        if name in running:
            grads[name].add_(gradient)
        else:
            grads[name] = grads[name] + gradient if name in grads else gradient

    made = []
    for value, total in sums:
        name = capture.names.get(id(value))
        if name is None:
            made.append((value, total.to(value.dtype)))
        else:
            add(name, total)
    if made:
        leaves = list(parameters.values())
        pulled = capture.differentiate([v for v, _ in made], leaves, [t for _, t in made], allow_unused=True)
        for name, gradient in zip(parameters, pulled):
            if gradient is not None:
                add(name, widen(gradient))
    return grads
