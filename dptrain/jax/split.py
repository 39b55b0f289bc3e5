"""A loss split in two: what is made of parameters alone, and what depends on the example.

A value is *data* if the example enters it, else it is *pure*: it is made of parameters and constants
(a parameter, a standardised weight, a LoRA product, a mask of ones). Pure equations are computed once,
the data's for each example; where the second read a pure value that depends on a parameter, the
parameter is *used*.

Loops are divided as well. What is pure in the body of a ``lax.scan`` and the same in each turn is moved
out of it; what is pure and changes from turn to turn (a layer's weight, cast or standardised) becomes a loop
of its own, whose stacked results the data's loop reads as slices. So all pure values live at the top, and
a use inside of loops names the value there and says, loop by loop, whether it takes a slice or the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax

from .program import Equation, Loop, Operation, Program, Recomputed, Value, without_the_unused

#: rearranges or repeats what it reads: computed again for the data where the source is smaller, so
#: that the gradient of a bias has the size of the bias and not of what it is added to
REPEATS = {
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "expand_dims",
    "reshape",
    "squeeze",
    "transpose",
}

Leaves = frozenset[int]


@dataclass(eq=False)
class Split:
    """The two parts of a loss.

    Attributes:
        pure: program from all inputs that are not data to ``values``.
        data: program whose inputs are the data's and then ``values``.
        values: the pure values that the data's part reads.
        leaves: for each pure value, the numbers of the parameters that it depends on.
    """

    pure: Program
    data: Program
    values: tuple[Value, ...]
    leaves: dict[Value, Leaves]

    def leaves_of(self, values: Iterable[Value]) -> Leaves:
        return frozenset().union(*(self.leaves.get(v, frozenset()) for v in values))


def split(program: Program, parameters: Sequence[Value], data: Sequence[Value]) -> Split:
    """Split a program; its inputs are ``parameters``, ``data`` and perhaps others, which are constants."""
    splitter = _Splitter(program.known)
    splitter.data.update(data)
    for number, leaf in enumerate(parameters):
        splitter.leaves[leaf] = frozenset((number,))
    pure, rest = splitter.sort(program.equations)
    rest = without_the_unused(rest, program.outputs)
    values = tuple(_read_from_outside(rest, program.outputs, splitter.data, program.known))
    inputs = tuple(v for v in program.inputs if v not in splitter.data)
    pure = without_the_unused(pure, values)
    return Split(
        pure=Program(inputs, values, pure, program.known),
        data=Program((*data, *values), program.outputs, rest, program.known),
        values=values,
        leaves=splitter.leaves,
    )


def _read_from_outside(
    equations: Iterable[Equation], outputs: Iterable[Value], data: set[Value], known: dict
) -> dict[Value, None]:
    """The pure values that data equations read, once each, in order."""
    read = [v for equation in equations for v in equation.inputs]
    return dict.fromkeys(v for v in [*read, *outputs] if v not in data and v not in known)


class _Splitter:
    def __init__(self, known: dict):
        self.known = known
        #: values that depend on the example, or are computed along with it
        self.data: set[Value] = set()
        self.leaves: dict[Value, Leaves] = {}

    def of(self, values: Iterable[Value]) -> Leaves:
        return frozenset().union(*(self.leaves.get(v, frozenset()) for v in values))

    def reads_data(self, equation: Equation) -> bool:
        return not self.data.isdisjoint(equation.inputs)

    def sort(self, equations: Iterable[Equation]) -> tuple[list[Equation], list[Equation]]:
        """Pure and data equations, in order; bodies are divided and what is pure in them moved out."""
        pure: list[Equation] = []
        data: list[Equation] = []
        for equation in equations:
            if not self.reads_data(equation):
                self._settle(equation)
                pure.append(equation)
            elif isinstance(equation, Loop):
                before, now = self._divide_loop(equation)
                pure += before
                data.append(now)
            elif isinstance(equation, Recomputed):
                before, now = self._divide_recomputed(equation)
                pure += before
                data.append(now)
            else:
                self.data.update(equation.outputs)
                data.append(equation)
        return pure, self._with_repeats(data, pure)

    def _settle(self, equation: Equation) -> None:
        leaves = self.of(equation.inputs)
        if isinstance(equation, Operation) and equation.name == "stop_gradient":
            leaves = frozenset()
        self.leaves.update((v, leaves if v.has_gradient else frozenset()) for v in equation.outputs)

    # -- repeated values -----------------------------------------------------------------------------------

    def _with_repeats(self, data: list[Equation], pure: list[Equation]) -> list[Equation]:
        """Data equations that make larger pure values from smaller ones themselves."""
        made_by = {v: equation for equation in pure for v in equation.outputs}
        copies: dict[Value, Value] = {}
        out: list[Equation] = []

        def smallest(value: Value) -> int:
            equation = made_by.get(value)
            if not (isinstance(equation, Operation) and equation.name in REPEATS):
                return value.aval.size
            return min(value.aval.size, *(smallest(v) for v in equation.inputs))

        def near(value: Value) -> Value:
            if value in self.data or not self.leaves.get(value) or smallest(value) == value.aval.size:
                return value
            if value not in copies:
                equation = made_by[value]
                copy = Operation(equation.eqn, tuple(near(v) for v in equation.inputs), (Value(value.aval),))
                out.append(copy)
                copies[value] = copy.outputs[0]
                self.data.add(copies[value])
            return copies[value]

        for equation in data:
            inputs = tuple(near(v) for v in equation.inputs)
            out.append(equation if inputs == equation.inputs else equation.reading(inputs))
        return out

    # -- bodies --------------------------------------------------------------------------------------------

    def _enter(self, outside: Sequence[Value], inside: Sequence[Value]) -> None:
        """Give the body's inputs what is known of the values outside."""
        for here, there in zip(outside, inside, strict=True):
            if here in self.data:
                self.data.add(there)
            else:
                self.leaves[there] = self.leaves.get(here, frozenset())

    def _divide_recomputed(self, equation: Recomputed) -> tuple[list[Equation], Recomputed]:
        body = equation.body
        self._enter(equation.inputs, body.inputs)
        pure, data = self.sort(body.equations)
        data = without_the_unused(data, body.outputs)
        outside = dict(zip(body.inputs, equation.inputs))
        moved = _renamed(pure, outside)
        needed = _read_from_outside(data, body.outputs, self.data, self.known)
        taken = [v for v in body.inputs if v in self.data]
        inputs = [outside[v] for v in taken] + [outside.get(v, v) for v in needed]
        inside = [*taken, *needed]
        # Moved values keep their names outside, so the body needs names of its own for them.
        fresh = {v: Value(v.aval) for v in needed}
        self.leaves.update((fresh[v], self.leaves.get(v, frozenset())) for v in needed)
        inside = [fresh.get(v, v) for v in inside]
        data = _renamed(data, fresh)
        outputs = tuple(fresh.get(v, v) for v in body.outputs)
        self.data.update(equation.outputs)
        divided = Program(tuple(inside), outputs, data, self.known)
        return moved, Recomputed(equation.eqn, tuple(inputs), equation.outputs, divided)

    def _divide_loop(self, loop: Loop) -> tuple[list[Equation], Loop]:
        body = loop.body
        constants, carries, slices = loop.parts(body.inputs)
        self._follow_carries(loop)
        pure, data = self.sort(body.equations)
        outside = dict(zip(constants, loop.parts(loop.inputs)[0]))

        # 1. What is the same in each turn moves out.
        changing = {v for v in (*carries, *slices) if v not in self.data}
        moved, turning = [], []
        for equation in pure:
            if changing.isdisjoint(equation.inputs):
                moved.append(equation)
            else:
                changing.update(equation.outputs)
                turning.append(equation)
        moved = _renamed(moved, outside)

        # 2. What is pure and changes becomes a loop of its own.
        results, stacks = body.outputs[: loop.carries], body.outputs[loop.carries :]
        kept = [i for i, v in enumerate(carries) if v in self.data]
        steady = [i for i, v in enumerate(carries) if v not in self.data]
        own = [i for i, v in enumerate(stacks) if v in self.data or v not in changing]
        theirs = [i for i, v in enumerate(stacks) if v not in self.data and v in changing]
        outputs = [*(results[i] for i in kept), *(stacks[i] for i in own)]
        data = without_the_unused(data, outputs)
        needed = _read_from_outside(data, outputs, self.data, self.known)
        stacked = [v for v in needed if v in changing and v not in slices]
        pure_outputs = [*(results[i] for i in steady), *stacked, *(stacks[i] for i in theirs)]
        turning = without_the_unused(turning, pure_outputs)
        before: list[Equation] = []
        stacked_outside: dict[Value, Value] = {}
        if pure_outputs:
            before.append(
                self._pure_loop(
                    loop, turning, steady, stacked, theirs, pure_outputs, outside, stacked_outside
                )
            )

        # 3. The data's loop takes them as constants and slices.
        all_outside = dict(zip(body.inputs, loop.inputs)) | stacked_outside
        const_in = [v for v in constants if v in self.data] + [v for v in needed if v not in changing]
        slice_in = [v for v in slices if v in self.data] + [v for v in needed if v in changing]
        carry_in = [carries[i] for i in kept]
        inputs = [all_outside.get(v, v) for v in (*const_in, *carry_in, *slice_in)]
        fresh = {v: Value(v.aval) for v in needed}
        self.leaves.update((fresh[v], self.leaves.get(v, frozenset())) for v in needed)
        divided = Program(
            tuple(fresh.get(v, v) for v in (*const_in, *carry_in, *slice_in)),
            tuple(fresh.get(v, v) for v in outputs),
            _renamed(data, fresh),
            self.known,
        )
        here = [*(loop.outputs[i] for i in kept), *(loop.outputs[loop.carries + i] for i in own)]
        self.data.update(here)
        now = Loop(loop.eqn, tuple(inputs), tuple(here), divided, len(const_in), len(carry_in))
        return [*moved, *before], now

    def _follow_carries(self, loop: Loop) -> None:
        """Mark the body's inputs: a carry is data as soon as any turn makes it so."""
        body = loop.body
        _, carries, _ = loop.parts(body.inputs)
        self._enter(loop.inputs, body.inputs)
        while True:
            trial = _Splitter(self.known)
            trial.data, trial.leaves = set(self.data), dict(self.leaves)
            trial.sort(body.equations)
            new = False
            for carry, result in zip(carries, body.outputs):
                if result in trial.data and carry not in self.data:
                    self.data.add(carry)
                    self.leaves.pop(carry, None)
                    new = True
                elif carry not in self.data:
                    both = self.leaves.get(carry, frozenset()) | trial.leaves.get(result, frozenset())
                    new |= both != self.leaves.get(carry, frozenset())
                    self.leaves[carry] = both
            if not new:
                return

    def _pure_loop(
        self,
        loop: Loop,
        turning: list[Equation],
        steady: list[int],
        stacked: list[Value],
        theirs: list[int],
        outputs: list[Value],
        outside: dict[Value, Value],
        stacked_outside: dict[Value, Value],
    ) -> Loop:
        _, carries, slices = loop.parts(loop.body.inputs)
        own_carries, own_slices = [carries[i] for i in steady], [v for v in slices if v not in self.data]
        inside = {*own_carries, *own_slices}.union(*(e.outputs for e in turning))
        read = [v for e in turning for v in e.inputs] + outputs
        const_in = list(dict.fromkeys(v for v in read if v not in inside and v not in self.known))
        all_outside = dict(zip(loop.body.inputs, loop.inputs)) | outside
        # The body of the data's loop reads values of the same names: here they get others.
        fresh = {v: Value(v.aval) for v in (*const_in, *own_carries, *own_slices)}
        fresh |= {v: Value(v.aval) for e in turning for v in e.outputs}
        for value, name in fresh.items():
            self.leaves[name] = self.leaves.get(value, frozenset())
        body = Program(
            tuple(fresh[v] for v in (*const_in, *own_carries, *own_slices)),
            tuple(fresh.get(v, v) for v in outputs),
            _renamed(turning, fresh),
            self.known,
        )
        inputs = [all_outside.get(v, v) for v in (*const_in, *own_carries, *own_slices)]
        for value in stacked:
            aval = jax.ShapeDtypeStruct((loop.length, *value.aval.shape), value.aval.dtype)
            stacked_outside[value] = Value(aval)
        here = [
            *(loop.outputs[i] for i in steady),
            *(stacked_outside[v] for v in stacked),
            *(loop.outputs[loop.carries + i] for i in theirs),
        ]
        pure = Loop(loop.eqn, tuple(inputs), tuple(here), body, len(const_in), len(own_carries))
        for value, inner in zip(here, body.outputs):
            self.leaves[value] = self.of([inner])
        # A carry may come back unchanged: what it depends on came in from outside.
        for i in steady:
            self.leaves[loop.outputs[i]] |= self.of([loop.inputs[loop.constants + i]])
        return pure


def _renamed(equations: Iterable[Equation], names: dict[Value, Value]) -> list[Equation]:
    """The equations with other inputs, and other outputs where ``names`` has them."""
    out = []
    for equation in equations:
        renamed = equation.reading([names.get(v, v) for v in equation.inputs])
        renamed.outputs = tuple(names.get(v, v) for v in equation.outputs)
        out.append(renamed)
    return out
