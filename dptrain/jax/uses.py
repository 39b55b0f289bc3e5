"""Uses whose gradient is a sum of outer products, on one canonical layout.

A rule belongs to one operation ``out = f(a, w)``, linear in the parameter-only value w. For one example it
brings the other operand and the gradient of the output to

    rows [E, T, R],  cols [E, T, C]:   dW[e] = sum_t rows[e, t] (x) cols[e, t]

with E groups (batch axes of a product, groups of a convolution) and T positions, from which Gram norms are
taken; and it forms the gradient itself. Everything else that reads a parameter needs no rule: ordinary
differentiation per example yields the gradient of the value (``capture.py``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array, lax

from dptrain.core.cost import UseShape

from . import versions
from .factors import sum_of_squares
from .program import Operation

#: sums of products that must be as exact as their type: without TF32 or bfloat16 passes
EXACT = lax.Precision.HIGHEST


def rule_for(operation: Operation, position: int) -> Rule | None:
    """The rule, if there is one, of an operation whose input number ``position`` is parameter-only."""
    values = (*operation.inputs, *operation.outputs)
    if any(v.aval.size == 0 for v in values) or not operation.inputs[position].is_floating:
        return None
    for kind in (Product, Convolution, Table, Row):
        if kind.fits(operation, position):
            return kind(operation, position)
    return None


class Rule:
    """What the kinds share.

    Attributes:
        shape: sizes of one use of one example, for the planner.
    """

    shape: UseShape

    def __init__(self, operation: Operation, position: int):
        self.operation, self.position = operation, position
        self.value, self.other = (operation.inputs[i].aval for i in (position, 1 - position))
        self.out = operation.outputs[0].aval

    @classmethod
    def fits(cls, operation: Operation, position: int) -> bool:
        raise NotImplementedError

    def factors(self, a: Array, g: Array) -> tuple[Array, Array]:
        """``rows [E, T, R]`` and ``cols [E, T, C]`` of one example."""
        raise NotImplementedError

    def example_gradient(self, a: Array, g: Array) -> Array:
        """The gradient of w for one example, in the type in which it is summed."""
        return self.gradient(a[None], g[None])

    def gradient(self, a: Array, g: Array) -> Array:
        """The gradient of w, summed over a leading axis of both operands: the operation's own transpose."""
        a, g = (_floating_as(x, accumulated(g.dtype)) for x in (a, g))

        def apply(w: Array) -> Array:
            return jax.vmap(lambda a: self.bind(a, w))(a)

        return jax.linear_transpose(apply, jax.ShapeDtypeStruct(self.value.shape, g.dtype))(g)[0]

    def bind(self, a: Array, w: Array) -> Array:
        """The operation on these operands, in w's type."""
        params = dict(self.operation.params)
        if params.get("preferred_element_type") is not None:
            params["preferred_element_type"] = w.dtype
        if "precision" in params:
            params["precision"] = (EXACT, EXACT)
        values = [a, w] if self.position == 1 else [w, a]
        return versions.bind(self.operation.eqn, values, params)[0]


def accumulated(dtype: jnp.dtype) -> jnp.dtype:
    """The type in which gradients of this type are normed and summed: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32) if jnp.dtype(dtype).itemsize > 1 else jnp.dtype("float32")


def _floating_as(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _together(a: Array, g: Array) -> tuple[Array, Array]:
    """Both in one type; on a CPU, whose products know few mixtures of types, in that of the sum."""
    dtype = jnp.promote_types(a.dtype, g.dtype)
    if jax.default_backend() == "cpu":
        dtype = accumulated(dtype)
    return a.astype(dtype), g.astype(dtype)


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[i] for i in axes)


class Product(Rule):
    """``dot_general`` with w on either side: linear layers, einsums, projections of attention."""

    @classmethod
    def fits(cls, operation: Operation, position: int) -> bool:
        return operation.name == "dot_general" and all(v.is_floating for v in operation.inputs)

    def __init__(self, operation: Operation, position: int):
        super().__init__(operation, position)
        contracted, batch = operation.params["dimension_numbers"]
        self.a_contracted, self.w_contracted = contracted[1 - position], contracted[position]
        self.a_batch, self.w_batch = batch[1 - position], batch[position]
        self.a_free = _others(self.other.ndim, self.a_contracted, self.a_batch)
        self.w_free = _others(self.value.ndim, self.w_contracted, self.w_batch)
        self.shape = UseShape(
            positions=_size(self.other.shape, self.a_free),
            d_in=max(1, _size(self.other.shape, self.a_contracted)),
            d_out=max(1, _size(self.value.shape, self.w_free)),
            groups=max(1, _size(self.other.shape, self.a_batch)),
        )

    def factors(self, a: Array, g: Array) -> tuple[Array, Array]:
        s = self.shape
        rows = a.transpose(*self.a_batch, *self.a_free, *self.a_contracted)
        rows = rows.reshape(s.groups, s.positions, s.d_in)
        if self.position == 1:  # the output's axes: batch, those of a, those of w
            return rows, g.reshape(s.groups, s.positions, s.d_out)
        return rows, g.reshape(s.groups, s.d_out, s.positions).swapaxes(1, 2)

    def gradient(self, a: Array, g: Array) -> Array:
        n_batch, n_a, n_w = len(self.a_batch), len(self.a_free), len(self.w_free)
        first_a = 1 + n_batch + (n_w if self.position == 0 else 0)
        contracted = ([0, *(i + 1 for i in self.a_free)], [0, *range(first_a, first_a + n_a)])
        batch = ([i + 1 for i in self.a_batch], list(range(1, 1 + n_batch)))
        a, g = _together(a, g)
        # Its axes: batch, a's contracted ones in the order in which they lie in a, and w's free ones.
        lying = sorted(range(len(self.a_contracted)), key=lambda i: self.a_contracted[i])
        of_a, of_g = [self.w_contracted[i] for i in lying], self.w_free
        pair = [(a, contracted[0], batch[0], of_a), (g, contracted[1], batch[1], of_g)]
        # The first operand is transposed, with all that is fused into it: the smaller one.
        one, other = pair if a.size <= g.size else reversed(pair)
        out = lax.dot_general(
            one[0],
            other[0],
            ((one[1], other[1]), (one[2], other[2])),
            precision=EXACT,
            preferred_element_type=accumulated(g.dtype),
        )
        axes = [*self.w_batch, *one[3], *other[3]]
        return out.transpose([axes.index(i) for i in range(len(axes))])


def _others(ndim: int, *taken: Sequence[int]) -> list[int]:
    return [i for i in range(ndim) if not any(i in axes for axes in taken)]


class Convolution(Rule):
    """``conv_general_dilated`` with w as the kernel: strided, dilated, transposed, grouped, depthwise."""

    @classmethod
    def fits(cls, operation: Operation, position: int) -> bool:
        return (
            operation.name == "conv_general_dilated"
            and position == 1
            and operation.params["batch_group_count"] == 1
        )

    def __init__(self, operation: Operation, position: int):
        super().__init__(operation, position)
        p = operation.params
        self.axes = p["dimension_numbers"]
        self.groups = p["feature_group_count"]
        self.features, self.channels, *self.window = (self.value.shape[i] for i in self.axes.rhs_spec)
        images, _, *space = (self.out.shape[i] for i in self.axes.out_spec)
        self.shape = UseShape(
            positions=images * math.prod(space),
            d_in=self.channels * math.prod(self.window),
            d_out=self.features // self.groups,
            groups=self.groups,
        )

    def factors(self, a: Array, g: Array) -> tuple[Array, Array]:
        s = self.shape
        patches = self.patches(a, [g.shape[i] for i in self.axes.out_spec[2:]])  # n, c, k, t
        n, t = patches.shape[0], patches.shape[-1]
        rows = patches.reshape(n, self.groups, s.d_in, t).transpose(1, 0, 3, 2)
        cols = g.transpose(self.axes.out_spec).reshape(n, self.groups, s.d_out, t).transpose(1, 0, 3, 2)
        return rows.reshape(s.groups, n * t, s.d_in), cols.reshape(s.groups, n * t, s.d_out)

    def patches(self, a: Array, space: Sequence[int]) -> Array:
        """The pixels under each element of the kernel, ``[images, channels, elements, positions]``."""
        p = self.operation.params
        a = a.transpose(self.axes.lhs_spec)
        margins = [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"])]
        a = lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), (0, 0, 0), *margins])
        shifted = []
        for element in itertools.product(*map(range, self.window)):
            first = [i * d for i, d in zip(element, p["rhs_dilation"])]
            last = [i + (n - 1) * s + 1 for i, n, s in zip(first, space, p["window_strides"])]
            shifted.append(lax.slice(a, [0, 0, *first], [*a.shape[:2], *last], [1, 1, *p["window_strides"]]))
        stack = jnp.stack(shifted, 2)
        return stack.reshape(*stack.shape[:3], -1)

    def example_gradient(self, a: Array, g: Array) -> Array:
        rows, cols = _together(*self.factors(a, g))
        out = jnp.einsum(
            "etr,etc->ecr",
            rows,
            cols,
            precision=EXACT,
            preferred_element_type=accumulated(g.dtype),
        )
        out = out.reshape(self.features, self.channels, *self.window)
        return out.transpose([self.axes.rhs_spec.index(i) for i in range(out.ndim)])


class Table(Rule):
    """``gather`` of whole rows of w by indices that depend on the example: embeddings."""

    @classmethod
    def fits(cls, operation: Operation, position: int) -> bool:
        if operation.name != "gather" or position != 0:
            return False
        d, table = operation.params["dimension_numbers"], operation.inputs[0].aval
        indices, out = operation.inputs[1].aval, operation.outputs[0].aval
        rest = table.ndim - 1
        return (
            tuple(d.collapsed_slice_dims) == (0,)
            and tuple(d.start_index_map) == (0,)
            and not d.operand_batching_dims
            and tuple(operation.params["slice_sizes"]) == (1, *table.shape[1:])
            and tuple(d.offset_dims) == tuple(range(out.ndim - rest, out.ndim))
            and indices.shape[-1] == 1
        )

    def __init__(self, operation: Operation, position: int):
        super().__init__(operation, position)
        self.shape = UseShape(
            positions=max(1, math.prod(self.other.shape)),
            d_in=max(1, math.prod(self.value.shape[1:])),
            d_out=self.value.shape[0],
            picked=True,
        )

    def picked(self, a: Array, g: Array) -> tuple[Array, Array]:
        """Row numbers ``[T]`` and gradients ``[T, D]``; rows that the gradient misses have number -1."""
        rows, last = self._numbers(a.reshape(-1)), self.value.shape[0] - 1
        if "FILL" in str(self.operation.params["mode"]).upper():
            rows = jnp.where((rows >= 0) & (rows <= last), rows, -1)
        else:
            rows = rows.clip(0, last)
        return rows, g.reshape(len(rows), -1)

    def _numbers(self, indices: Array) -> Array:
        """Indices in a type that can hold -1 and any row, and one beyond the last."""
        last, most = self.value.shape[0] - 1, jnp.iinfo(indices.dtype).max
        wide = indices.astype(jnp.promote_types(jnp.result_type(int), jnp.int32))
        return jnp.where(indices > last, last + 1, wide) if most > last else wide

    def squared_norm(self, a: Array, g: Array) -> Array:
        """Exactly, from the sums over equal indices: nothing of the table's size is formed."""
        rows, g = self.picked(a, g)
        order = jnp.argsort(rows)
        rows, g = rows[order], g[order].astype(accumulated(g.dtype))
        new = jnp.concatenate([jnp.zeros(1, int), (rows[1:] != rows[:-1]).astype(int)])
        g = jnp.where((rows >= 0)[:, None], g, 0)
        sums = jax.ops.segment_sum(g, jnp.cumsum(new), len(rows), indices_are_sorted=True)
        return sum_of_squares([sums])


class Row(Table):
    """``dynamic_slice`` of one whole row of w, ``table[i]``, at a place that depends on the example."""

    @classmethod
    def fits(cls, operation: Operation, position: int) -> bool:
        if operation.name != "dynamic_slice" or position != 0:
            return False
        # Along the other axes it starts at 0, whatever is asked for: it is as long as they are.
        return tuple(operation.params["slice_sizes"]) == (1, *operation.inputs[0].aval.shape[1:])

    def bind(self, a: Array, w: Array) -> Array:
        starts = [a, *[jnp.zeros_like(a)] * (w.ndim - 1)]
        return versions.bind(self.operation.eqn, [w, *starts], dict(self.operation.params))[0]

    def picked(self, a: Array, g: Array) -> tuple[Array, Array]:
        rows = self._numbers(a.reshape(-1)).clip(0, self.value.shape[0] - 1)
        return rows, g.reshape(len(rows), -1)


@dataclass(frozen=True)
class Stacking:
    """The loops around a use, outermost first: their lengths, and whether the value is sliced by each."""

    lengths: tuple[int, ...] = ()
    sliced: tuple[bool, ...] = ()

    def within(self, length: int, sliced: bool) -> Stacking:
        return Stacking((*self.lengths, length), (*self.sliced, sliced))

    def ordered(self, x: Array, lead: int = 0) -> Array:
        """``[lead..., loops..., rest] -> [lead..., slices, turns, rest]``: one axis for the loops that slice
        the value and one for those that take it whole."""
        order = sorted(range(len(self.sliced)), key=lambda i: not self.sliced[i])
        n = len(order)
        x = x.transpose(*range(lead), *(lead + i for i in order), *range(lead + n, x.ndim))
        return x.reshape(*x.shape[:lead], self.slices, self.turns, *x.shape[lead + n :])

    @property
    def slices(self) -> int:
        return math.prod(n for n, s in zip(self.lengths, self.sliced) if s)

    @property
    def turns(self) -> int:
        return math.prod(n for n, s in zip(self.lengths, self.sliced) if not s)
