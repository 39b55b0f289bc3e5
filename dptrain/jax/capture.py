"""One example through the data's part of a loss, with what its gradient is made of.

Where a rule fits, the parameter-only value enters a use without a gradient: the other operand is recorded,
and the gradient of the use's output is caught by a *tag*, an identity whose backward pass also hands what
it receives to a second argument that nothing reads. Everywhere else the value takes part in ordinary
differentiation, and since all of this happens under ``vmap`` and the value is the same for all examples, its
gradient is that of each example. So every operation of JAX is covered, by a rule or without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from .program import Equation, Loop, Operation, Program, Recomputed, Value, behind
from .split import Leaves, Split
from .uses import Rule, Stacking, rule_for

#: arrays by number of use
ByUse = dict[int, Any]


@dataclass(frozen=True, eq=False)
class Use:
    """An operation by which a value meets data.

    Attributes:
        value: the parameter-only value at the top of the program.
        stacking: the loops around it.
        rule: what it knows of the operation.
    """

    number: int
    value: Value
    stacking: Stacking
    rule: Rule


@dataclass(frozen=True, eq=False)
class Captured:
    """Of a batch, with examples on the leading axis of everything but nothing else.

    Attributes:
        losses: ``[B]``.
        aux: what the loss function returned besides.
        operands, gradients: by number of use, the other operand and the gradient of the output,
            ``[B, loops..., *shape]``.
        direct: by value, its gradient by way of operations without a rule, ``[B, *shape]``.
    """

    losses: Array
    aux: list[Array]
    operands: ByUse
    gradients: ByUse
    direct: dict[Value, Array]


class Capture:
    """How a split loss is run. Made once per program.

    Attributes:
        uses: those with a rule.
        direct: the values with leaves that something without a rule reads.
    """

    def __init__(self, split: Split):
        self.split = split
        self.uses: list[Use] = []
        self.direct: dict[Value, None] = {}
        self._use_of: dict[Operation, Use] = {}
        here = {v: (v, Stacking()) for v in split.values if split.leaves.get(v) and v.has_gradient}
        # What the loss returns besides, or prints, has no part in its gradient.
        loss = split.data.outputs[:1]
        self._look(behind(split.data.equations, loss), loss, here)

    @property
    def leaves(self) -> Leaves:
        """The parameters that have a part in the loss."""
        return self.split.leaves_of([use.value for use in self.uses] + list(self.direct))

    def _look(
        self,
        equations: Sequence[Equation],
        outputs: Sequence[Value],
        names: dict[Value, tuple[Value, Stacking]],
    ) -> None:
        """Find the uses; ``names`` says which value of the top each value of this body is."""
        for equation in equations:
            if isinstance(equation, Operation):
                self._look_at(equation, names)
                continue
            inside: dict[Value, tuple[Value, Stacking]] = {}
            for position, (outer, inner) in enumerate(zip(equation.inputs, equation.body.inputs)):
                if outer not in names:
                    continue
                value, stacking = names[outer]
                if isinstance(equation, Recomputed):
                    inside[inner] = value, stacking
                elif equation.constants <= position < equation.constants + equation.carries:
                    self.direct[value] = None  # the first state of a loop
                elif equation.length == 0:
                    self.direct[value] = None
                else:
                    sliced = position >= equation.constants
                    inside[inner] = value, stacking.within(equation.length, sliced)
            self._look(equation.body.equations, equation.body.outputs, inside)
        self.direct.update((names[v][0], None) for v in outputs if v in names)

    def _look_at(self, operation: Operation, names: dict[Value, tuple[Value, Stacking]]) -> None:
        for position, v in enumerate(operation.inputs):
            if v not in names:
                continue
            rule = rule_for(operation, position)
            if rule is None:
                self.direct[names[v][0]] = None
            else:
                use = Use(len(self.uses), *names[v], rule)
                self.uses.append(use)
                self._use_of[operation] = use

    def __call__(self, values: Sequence[Array], data: Sequence[Array]) -> Captured:
        """Run a batch.

        Args:
            values: those of ``split.values``.
            data: flat, examples leading.
        """
        given = dict(zip(self.split.values, values, strict=True))
        live = {v: given[v] for v in self.direct}
        nothing = {
            use.number: jnp.zeros((*use.stacking.lengths, *use.rule.out.shape), use.rule.out.dtype)
            for use in self.uses
        }

        def one(example: Sequence[Array]) -> tuple:
            def loss(live: dict[Value, Array], tags: ByUse) -> tuple:
                known = {**given, **live}
                inputs = [*example, *(known[v] for v in self.split.values)]
                (loss, *aux), operands = self._run(self.split.data, inputs, tags)
                return loss, (aux, operands)

            keyed = list(live)
            (out, (aux, operands)), (direct, gradients) = jax.value_and_grad(
                lambda live, tags: loss(dict(zip(keyed, live)), tags), argnums=(0, 1), has_aux=True
            )(list(live.values()), nothing)
            return out, aux, operands, gradients, direct

        losses, aux, operands, gradients, direct = jax.vmap(one)(data)
        return Captured(losses, aux, operands, gradients, dict(zip(live, direct)))

    def _run(self, program: Program, values: Sequence[Array], tags: ByUse) -> tuple[list, ByUse]:
        """Outputs, and the operands of the uses inside."""
        env = {**program.known, **dict(zip(program.inputs, values, strict=True))}
        operands: ByUse = {}
        for equation in program.equations:
            read = [env[v] for v in equation.inputs]
            out, met = self._evaluate(equation, read, tags)
            operands |= met
            env.update(zip(equation.outputs, out, strict=True))
        return [env[v] for v in program.outputs], operands

    def _evaluate(self, equation: Equation, read: list, tags: ByUse) -> tuple[list, ByUse]:
        if isinstance(equation, Operation):
            use = self._use_of.get(equation)
            if use is None:
                return equation.evaluate(read), {}
            position = use.rule.position
            read[position] = lax.stop_gradient(read[position])
            (out,) = equation.evaluate(read)
            return [_tagged(out, tags[use.number])], {use.number: read[1 - position]}
        tags = {n: tags[n] for n in self._inside(equation.body)}
        if isinstance(equation, Recomputed):
            return equation.call(lambda read, tags: self._run(equation.body, read, tags), read, tags)
        constants, carry, slices = equation.parts(read)

        def step(carry: list, slices: tuple) -> tuple:
            slices, tags = slices
            out, operands = self._run(equation.body, [*constants, *carry, *slices], tags)
            return out[: equation.carries], (out[equation.carries :], operands)

        carry, (stacks, operands) = equation.call(step, carry, (slices, tags))
        return [*carry, *stacks], operands

    def _inside(self, body: Program) -> list[int]:
        found = [self._use_of[e].number for e in body.equations if e in self._use_of]
        for equation in body.equations:
            if isinstance(equation, Loop | Recomputed):
                found += self._inside(equation.body)
        return found


@jax.custom_vjp
def _tagged(out: Array, tag: Array) -> Array:
    return out


def _tagged_forward(out: Array, tag: Array) -> tuple[Array, None]:
    return out, None


def _tagged_backward(_: None, gradient: Array) -> tuple[Array, Array]:
    return gradient, gradient


_tagged.defvjp(_tagged_forward, _tagged_backward)
