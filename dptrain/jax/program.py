"""A jaxpr as a list of equations over values, with calls written out.

Values are compared by identity and belong to one place in one program, so that what is found out about
them can be kept in dictionaries. Loops (``lax.scan``) and recomputed parts (``jax.checkpoint``) keep
their bodies as programs of their own; everything else is an operation that is left whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import versions


class Value:
    """What an equation reads or writes: a place in a program."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval

    @property
    def is_floating(self) -> bool:
        """Whether the rules of ``uses.py`` apply to it."""
        return jnp.issubdtype(self.aval.dtype, jnp.floating)

    @property
    def has_gradient(self) -> bool:
        """Complex values have one, and no rule."""
        return jnp.issubdtype(self.aval.dtype, jnp.inexact)


@dataclass(eq=False)
class Operation:
    """One primitive."""

    eqn: versions.JaxprEqn
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name

    @property
    def params(self) -> dict:
        return self.eqn.params

    def evaluate(self, values: list, params: dict | None = None) -> list:
        """The outputs, with the operation's own parameters or others."""
        return versions.bind(self.eqn, values, params)

    def reading(self, inputs: Sequence[Value]) -> Operation:
        """The same on other values."""
        return Operation(self.eqn, tuple(inputs), self.outputs)


@dataclass(eq=False)
class Recomputed:
    """``jax.checkpoint`` of a program."""

    eqn: versions.JaxprEqn
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    body: Program

    def call(self, function: Callable, *args: Any) -> Any:
        """``function(*args)``, recomputed in the backward pass as the original is."""
        params = self.eqn.params
        options = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
        return jax.checkpoint(function, **options)(*args)

    def evaluate(self, values: list, run_body: Callable | None = None) -> list:
        """The outputs, the body being run by ``run``, or by another function like it."""
        run_body = run_body or run
        return self.call(lambda *v: run_body(self.body, v), *values)

    def reading(self, inputs: Sequence[Value]) -> Recomputed:
        return Recomputed(self.eqn, tuple(inputs), self.outputs, self.body)


@dataclass(eq=False)
class Loop:
    """``lax.scan``: inputs and the body's inputs are constants, carries and slices in this order, outputs
    carries and stacks."""

    eqn: versions.JaxprEqn
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    body: Program
    constants: int
    carries: int

    @property
    def length(self) -> int:
        return self.eqn.params["length"]

    def parts(self, items: Sequence) -> tuple[list, list, list]:
        """Constants, carries and slices of anything that goes along with the inputs."""
        first, second = self.constants, self.constants + self.carries
        return list(items[:first]), list(items[first:second]), list(items[second:])

    def call(self, step: Callable, carry: Any, slices: Any) -> Any:
        """``lax.scan`` of another body, as often and in the same direction."""
        params = self.eqn.params
        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        return lax.scan(step, carry, slices, **options)

    def evaluate(self, values: list, run_body: Callable | None = None) -> list:
        """The outputs, the body being run by ``run``, or by another function like it."""
        run_body = run_body or run
        constants, carry, slices = self.parts(values)

        def step(carry: list, slices: list) -> tuple[list, list]:
            out = run_body(self.body, [*constants, *carry, *slices])
            return out[: self.carries], out[self.carries :]

        carry, stacks = self.call(step, carry, slices)
        return [*carry, *stacks]

    def reading(self, inputs: Sequence[Value]) -> Loop:
        return Loop(self.eqn, tuple(inputs), self.outputs, self.body, self.constants, self.carries)


Equation = Operation | Recomputed | Loop


@dataclass(eq=False)
class Program:
    """Equations in order. ``known`` holds the values of literals and closed-over arrays, and is shared with
    the programs of bodies, so that equations can be moved out of them."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    equations: list[Equation]
    known: dict[Value, Any] = field(default_factory=dict)


def run(program: Program, values: Iterable[Any]) -> list:
    """The program's outputs for the values of its inputs."""
    env = {**program.known, **dict(zip(program.inputs, values, strict=True))}
    for equation in program.equations:
        env.update(zip(equation.outputs, equation.evaluate([env[v] for v in equation.inputs]), strict=True))
    return [env[v] for v in program.outputs]


#: what only says how a value lies
REARRANGES = {"expand_dims", "reshape", "squeeze", "transpose"}


def rearranged_last(program: Program) -> tuple[Program, Program]:
    """The program in two, one after the other: the second does nothing but rearrange results of the first."""
    last: list[Equation] = []
    first: list[Equation] = []
    read: set[Value] = set()
    for equation in reversed(program.equations):
        if equation.eqn.primitive.name in REARRANGES and read.isdisjoint(equation.outputs):
            last.append(equation)
        else:
            first.append(equation)
            read.update(equation.inputs)
    made = {v for equation in last for v in equation.outputs}.union(program.known)
    wanted = [*(v for equation in last for v in equation.inputs), *program.outputs]
    between = tuple(dict.fromkeys(v for v in wanted if v not in made))
    return (
        Program(program.inputs, between, first[::-1], program.known),
        Program(between, program.outputs, last[::-1], program.known),
    )


def behind(equations: Iterable[Equation], wanted: Iterable[Value]) -> list[Equation]:
    """The equations that ``wanted`` depends on."""
    return _needed(equations, wanted, lambda equation: False)


def without_the_unused(equations: Iterable[Equation], wanted: Iterable[Value]) -> list[Equation]:
    """The equations that ``wanted`` depends on, and those with side effects."""
    return _needed(equations, wanted, lambda equation: bool(equation.eqn.effects))


def _needed(
    equations: Iterable[Equation], wanted: Iterable[Value], anyway: Callable[[Equation], bool]
) -> list[Equation]:
    needed, kept = set(wanted), []
    for equation in reversed(list(equations)):
        if anyway(equation) or needed.intersection(equation.outputs):
            kept.append(equation)
            needed.update(equation.inputs)
    return kept[::-1]


def written_out(closed: versions.ClosedJaxpr, known: dict[Value, Any] | None = None) -> Program:
    """The program of a jaxpr: calls are written out where they are made, unused equations left out."""
    known = {} if known is None else known
    inputs = [Value(v.aval) for v in closed.jaxpr.invars]
    constants = [_known(known, c) for c in closed.consts]
    equations: list[Equation] = []
    outputs = _write(closed.jaxpr, constants, inputs, equations, known)
    return Program(tuple(inputs), tuple(outputs), without_the_unused(equations, outputs), known)


def _known(known: dict[Value, Any], content: Any, aval: Any = None) -> Value:
    value = Value(versions.abstract(content) if aval is None else aval)
    known[value] = content
    return value


def _write(
    jaxpr: versions.Jaxpr,
    constants: Sequence[Value],
    inputs: Sequence[Value],
    equations: list[Equation],
    known: dict[Value, Any],
) -> list[Value]:
    env = {**dict(zip(jaxpr.constvars, constants)), **dict(zip(jaxpr.invars, inputs))}

    def read(atom: Any) -> Value:
        return _known(known, atom.val, atom.aval) if isinstance(atom, versions.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        name, read_here = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if name in versions.CALLS:
            callee, closed_over = _opened(eqn.params[versions.CALLS[name]])
            outputs = _write(callee, [_known(known, c) for c in closed_over], read_here, equations, known)
        else:
            outputs = [Value(v.aval) for v in eqn.outvars]
            equations.append(_equation(eqn, tuple(read_here), tuple(outputs), known))
        env.update(zip(eqn.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(
    eqn: versions.JaxprEqn, inputs: tuple[Value, ...], outputs: tuple[Value, ...], known: dict[Value, Any]
) -> Equation:
    name = eqn.primitive.name
    if name == versions.LOOP:
        jaxpr, closed_over = _opened(eqn.params["jaxpr"])
        body = written_out(versions.ClosedJaxpr(jaxpr, closed_over), known)
        return Loop(eqn, inputs, outputs, body, *versions.loop_parts(eqn.params))
    if name in versions.RECOMPUTED:
        jaxpr, closed_over = _opened(eqn.params[versions.RECOMPUTED[name]])
        body = written_out(versions.ClosedJaxpr(jaxpr, closed_over), known)
        return Recomputed(eqn, inputs, outputs, body)
    return Operation(eqn, inputs, outputs)


def _opened(jaxpr: Any) -> tuple[versions.Jaxpr, Sequence[Any]]:
    """A jaxpr and what it closes over, of one that is closed or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, versions.ClosedJaxpr) else (jaxpr, ())


def walk(equations: Iterable[Equation]) -> Iterator[Equation]:
    """All equations, those of bodies included."""
    for equation in equations:
        yield equation
        if not isinstance(equation, Operation):
            yield from walk(equation.body.equations)
