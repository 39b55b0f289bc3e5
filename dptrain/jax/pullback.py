"""From the gradients of parameter-only values back to the parameters.

Values that share parameters form a *group*, for the norm is that of the sum of what they contribute. Most
groups are *alone*: one value that is the parameter itself, rearranged or cast, so that norms are equal and
the way back is a rearrangement. All others (``W + BA``, standardised weights, tied and sliced parameters)
are pulled back by a vector-Jacobian product: of every example for the norms, and of the clipped sum
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from .program import Equation, Loop, Operation, Program, Value, walk, without_the_unused
from .split import Split
from .uses import accumulated

#: each element of the input lies in the output once, and nothing else does
REARRANGE = {
    "broadcast_in_dim",  # where the size stays the same
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "rev",
    "squeeze",
    "transpose",
}


@dataclass(frozen=True, eq=False)
class Group:
    """Values that share parameters.

    Attributes:
        values: those that are used.
        leaves: the numbers of the parameters behind them.
        alone: one value, which is one whole parameter rearranged.
        program: from ``inputs`` of the pure part to the values.
    """

    values: tuple[Value, ...]
    leaves: tuple[int, ...]
    alone: bool
    program: Program

    @property
    def rounds(self) -> str | None:
        """An operation that would round a clipped sum on its way back, and cannot be widened."""
        return next((e.eqn.primitive.name for e in walk(self.program.equations) if _rounds(e)), None)

    def pull(self, parameters: Sequence[Array], constants: Mapping[Value, Array]) -> Pull:
        """The way back at these parameters."""
        return Pull(self, parameters, constants)


class Pull:
    """A linear map from gradients of a group's values to gradients of its leaves, in float32 or better."""

    def __init__(self, group: Group, parameters: Sequence[Array], constants: Mapping[Value, Array]):
        inputs = group.program.inputs

        def forward(leaves: list[Array]) -> list[Array]:
            given = dict(zip(group.leaves, leaves))
            values = [given[i] if i in given else constants.get(v) for i, v in enumerate(inputs)]
            return _run_wide(group.program, values)

        here = [_wide(parameters[i]) for i in group.leaves]
        self._like = jax.eval_shape(forward, here)
        if group.alone:
            self._apply = jax.linear_transpose(forward, here)
        else:
            self._apply = jax.vjp(forward, here)[1]

    def __call__(self, gradients: Sequence[Array]) -> list[Array]:
        return self._apply([g.astype(s.dtype) for g, s in zip(gradients, self._like)])[0]


def groups(split: Split, used: Iterable[Value]) -> list[Group]:
    """The used values, grouped by the parameters behind them."""
    joined: list[tuple[set[int], list[Value]]] = []
    for value in used:
        leaves, values = set(split.leaves[value]), [value]
        for other in [j for j in joined if j[0] & leaves]:
            joined.remove(other)
            leaves |= other[0]
            values = other[1] + values
        joined.append((leaves, values))
    return [_group(split, tuple(values), tuple(sorted(leaves))) for leaves, values in joined]


def _group(split: Split, values: tuple[Value, ...], leaves: tuple[int, ...]) -> Group:
    pure = split.pure
    program = Program(pure.inputs, values, without_the_unused(pure.equations, values), pure.known)
    alone = len(values) == 1 and _source(values[0], pure) is pure.inputs[leaves[0]]
    return Group(values, leaves, alone and len(leaves) == 1, program)


def _source(value: Value, program: Program) -> Value | None:
    """The input that ``value`` is a rearrangement of."""
    made_by = {v: equation for equation in program.equations for v in equation.outputs}
    while value in made_by:
        equation = made_by[value]
        if isinstance(equation, Operation):
            rearranged = equation.name in REARRANGE and equation.inputs[0].aval.size == value.aval.size
            if not (rearranged and equation.inputs[0].is_floating and value.is_floating):
                return None
            value = equation.inputs[0]
        else:
            below = _source_of_stack(equation, value) if isinstance(equation, Loop) else None
            if below is None:
                return None
            value = below
    return value if value in program.inputs else None


def _source_of_stack(loop: Loop, value: Value) -> Value | None:
    """The slices that a stack is a rearrangement of, turn by turn."""
    position = loop.outputs.index(value)
    inner = _source(loop.body.outputs[position], loop.body)
    _, _, slices = loop.parts(loop.body.inputs)
    if position < loop.carries or inner not in slices:
        return None
    return loop.inputs[loop.body.inputs.index(inner)]


# -- float32 whatever the compute type -----------------------------------------------------------------------
#
# Parameters cast to bfloat16 enter their uses as such. On the way back the clipped sum must not be
# rounded to bfloat16, so the pure part is differentiated as it would be without the cast.


#: operations that do the same in any floating-point type
WIDENED = REARRANGE | {
    "add", "concatenate", "cos", "div", "dot_general", "dynamic_slice", "exp", "exp2", "gather",
    "integer_pow", "log", "logistic", "max", "min", "mul", "neg", "pad", "pow", "reduce_max", "reduce_sum",
    "rsqrt", "select_n", "sin", "slice", "sqrt", "square", "stop_gradient", "sub", "tanh",
}  # fmt: skip


def _wide(x: Any) -> Any:
    return x.astype(accumulated(x.dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _run_wide(program: Program, values: Sequence[Any]) -> list:
    env = {v: jax.tree.map(_wide, jnp.asarray(x)) if v.is_floating else x for v, x in program.known.items()}
    env.update((v, x) for v, x in zip(program.inputs, values, strict=True) if x is not None)
    env.update((v, _wide(x)) for v, x in list(env.items()) if v.is_floating)
    for equation in program.equations:
        read = [env[v] for v in equation.inputs]
        env.update(zip(equation.outputs, _evaluate_wide(equation, read), strict=True))
    return [env[v] for v in program.outputs]


def _evaluate_wide(equation: Equation, read: list) -> list:
    if not _is_narrow(equation):
        return equation.evaluate(read)
    if not isinstance(equation, Operation):
        return equation.evaluate(read, _run_wide)
    params = dict(equation.params)
    for name in ("new_dtype", "preferred_element_type", "dtype"):
        dtype = params.get(name)
        if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            params[name] = accumulated(dtype)
    return equation.evaluate(read, params)


def _rounds(equation: Equation) -> bool:
    return isinstance(equation, Operation) and _is_narrow(equation) and equation.name not in WIDENED


def _is_narrow(equation: Equation) -> bool:
    def narrow(v: Value) -> bool:
        return v.is_floating and accumulated(v.aval.dtype) != v.aval.dtype

    if any(map(narrow, (*equation.inputs, *equation.outputs))):
        return True
    return not isinstance(equation, Operation) and any(map(_is_narrow, equation.body.equations))
