"""``clipped_grad``: the sum of exactly clipped per-example gradients of any single-example loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from dptrain.core import checks, methods
from dptrain.core.clip_rules import ClipRule, rule_of
from dptrain.core.methods import Method

from . import baselines, stopwatch
from .bookkeeping import parts
from .by_uses import ByUses
from .call import Call
from .capture import Capture
from .clipped_sum import ClippedSum
from .errors import Refused
from .on_mesh import OnMesh
from .placement import Placement, placement
from .planner import Plan, is_worth_measuring, parts_to_try, routed
from .program import written_out
from .pullback import groups
from .split import split
from .versions import calls_back, draws_together


def clipped_grad(
    loss_fn: Callable,
    *,
    clip_norm: float | ClipRule,
    method: str = "auto",
    argnums: int = 0,
    batch_argnums: int | Sequence[int] = 1,
    has_aux: bool = False,
    allow_unused: bool = False,
    memory_budget: int | None = None,
    rows: int | None = None,
    mesh: Mesh | None = None,
    shard_params: bool = False,
) -> ClippedGrad:
    """A function from a physical batch to the sum of its clipped per-example gradients.

    It is pure, can be traced by ``jax.jit`` and anything else, and is compiled once per shape when it
    is not. One example's loss is all that it knows: batching, and what cannot mix, is its own doing.

    Args:
        loss_fn: ``loss_fn(params, example) -> scalar``, the loss of one example; with ``has_aux`` it returns
            ``(scalar, aux)``. The model may be written in Flax, Haiku, Equinox or nothing.
        clip_norm: C, the largest l2 norm of an example's gradient over all parameters (flat clipping, Abadi
            et al. 2016, arXiv 1607.00133); or a rule of ``dptrain.core.clip_rules``: ``Automatic``,
            ``PerLayer``, ``GroupWise``, to which parameters are called by their path, with dots.
        method: a name or alias of the table in ``dptrain.core.methods``.
        argnums: the argument that holds the trainable parameters: floating-point arrays, in any tree.
        batch_argnums: the arguments whose leaves have the examples on their leading axis. All others are
            the same for every example, and get no gradient: frozen parameters, a temperature.
        has_aux: whether the loss comes with something besides.
        allow_unused: accept parameters that the loss does not depend on; their gradient is zero and they
            still receive noise.
        memory_budget: of ``auto``: bytes of scratch memory that a physical batch may take, by XLA's own
            account. Of the ways that fit the fastest is taken, or the smallest if none fits.
        rows: of ``auto``: examples computed at once, in place of what is fastest.
        mesh: among whose devices the examples are divided, in equal parts; of any axes. Parameters, and what
            else is the same for every example, lie on each of them, and the sum in shards.
        shard_params: on a mesh: parameters lie in shards as well, and are put together for each batch.

    Raises:
        TypeError: no function, or no number or mesh where one is needed.
        ValueError: a clip norm below 1e-9 or not finite, an unknown method, arguments that are both
            parameters and data, or ``shard_params`` without a mesh.
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (params, example), and is {checks.shown(loss_fn)}.")
    row = methods.resolve(method)
    rule = rule_of(clip_norm)
    argnums = checks.whole("argnums", argnums, minimum=0)
    listed = batch_argnums if isinstance(batch_argnums, Sequence) else (batch_argnums,)
    batched = tuple(checks.whole("each of batch_argnums", i, minimum=0) for i in listed)
    if not batched or argnums in batched or len(set(batched)) != len(batched):
        raise ValueError(
            "argnums is the one argument with parameters, batch_argnums are others with examples; both count "
            "from 0."
        )
    for option, value in (("rows", rows), ("memory_budget", memory_budget)):
        if value is not None and row.capture is not methods.Capture.PLANNED:
            raise ValueError(f"{option} is for method='auto', and not for {row.name!r}.")
        if value is not None:
            checks.whole(option, value)
    place = placement(mesh, shard_params)
    return ClippedGrad(
        loss_fn, rule, row, argnums, batched, has_aux, allow_unused, memory_budget, rows, place
    )


class ClippedGrad:
    """What ``clipped_grad`` returns: call it on batches; ``plan`` tells what it would do with one."""

    def __init__(
        self,
        loss_fn: Callable,
        rule: ClipRule,
        method: Method,
        argnums: int,
        batched: tuple[int, ...],
        has_aux: bool,
        allow_unused: bool,
        memory_budget: int | None = None,
        rows: int | None = None,
        place: Placement | None = None,
    ):
        self.loss_fn, self._rule, self.method = loss_fn, rule, method
        self.argnums, self.batched, self.has_aux = argnums, batched, has_aux
        self.allow_unused, self.memory_budget, self.rows = allow_unused, memory_budget, rows
        self.on_mesh = None if place is None else OnMesh(self, place)
        self._compiled = jax.jit(self.local if self.on_mesh is None else self.on_mesh.clip)

    def __call__(self, *args: Any, mask: Array | None = None) -> ClippedSum:
        """The clipped sum of one physical batch.

        Args:
            args: those of the loss, with batches in place of examples.
            mask: bool ``[B]``; masked rows have loss, norm and gradient 0, whatever they hold.

        Raises:
            ValueError: leaves of the batch with different numbers of examples, or parameters that are not
                floating-point arrays; or rows that cannot be divided among the devices of the mesh.
            Refused: parameters that the loss does not depend on.
        """
        out = self._compiled(*self.checked(args, mask), self.thresholds)
        return replace(out, clip_norm=self.bound)

    def checked(self, args: tuple, mask: Any = None) -> tuple[tuple, Array]:
        """The arguments and the mask of a call; on a mesh, where they belong."""
        for leaf in jax.tree.leaves(args):
            _array("a leaf of the arguments", leaf)
        size = self._batch_size(args)
        if self.on_mesh is not None:
            args, mask, size = self.on_mesh.placed(args, mask, size)
        mask = jnp.ones(size, bool) if mask is None else _array("the mask", mask)
        if mask.shape != (size,) or mask.dtype != bool:
            raise ValueError(
                f"the mask must be bool of shape ({size},), one for each example, and is {mask.dtype} of "
                f"shape {mask.shape}."
            )
        return args, mask

    @property
    def rule(self) -> ClipRule:
        """Of the next sum. One of the same kind may take its place: nothing is compiled again.

        A function that was compiled around this one keeps the rule that it was traced with.

        Raises:
            TypeError, ValueError: it is no rule that could be clipped by, of another kind, or of other parts.
        """
        return self._rule

    @rule.setter
    def rule(self, rule: float | ClipRule) -> None:
        rule = rule_of(rule)
        if _kind(rule) != _kind(self._rule):
            raise ValueError(
                f"this was made for {self._rule.name} clipping in {len(self._rule.thresholds)} parts: for a "
                "rule of another kind or of other parts, make another clipped_grad."
            )
        self._rule = rule

    @property
    def thresholds(self) -> np.ndarray:
        """Of the rule's parts, as an argument of what is compiled."""
        return np.array(self._rule.thresholds, jnp.result_type(float))

    @property
    def clip_norm(self) -> float:
        """C: the largest norm of an example's clipped gradient, by the rule."""
        return self.rule.sensitivity

    @property
    def bound(self) -> float:
        """On the norm of each example's part of the sum: infinite for the method that does not clip."""
        return self.clip_norm if self.method.is_private else math.inf

    def plan(self, *args: Any) -> Plan:
        """What would be done with these arguments, or with ``jax.ShapeDtypeStruct`` of their shapes; on a
        mesh, by each device."""
        return self._look(args if self.on_mesh is None else self.on_mesh.shapes(args))[0]

    def way(self, args: tuple) -> str:
        """The name of what is fastest with such arguments, for ``local``."""
        if self.method.capture is not methods.Capture.PLANNED:
            return "whole"
        return self._look(args)[2]

    def _look(self, args: tuple) -> tuple[Plan, Callable, str]:
        found: list[tuple] = []
        jax.eval_shape(lambda args: found.append(self._planned(self._flat(args, self.thresholds)[0])), args)
        return found[0]

    def _batch_size(self, args: Sequence[Any]) -> int:
        if max(self.argnums, *self.batched) >= len(args):
            raise ValueError(
                f"the loss was called with {len(args)} arguments, but argnums and batch_argnums name number "
                f"{max(self.argnums, *self.batched)}, counted from 0."
            )
        leaves = [x for i in self.batched for x in jax.tree.leaves(args[i])]
        sizes = {jnp.shape(x)[:1] for x in leaves}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "every leaf of a batch needs its examples on the leading axis, and the same number of them; "
                f"the shapes are {[jnp.shape(x) for x in leaves]}."
            )
        (size,) = sizes.pop()
        if size == 0:
            raise ValueError("a batch needs at least one row: pass any row, and a mask that is False for it.")
        return size

    def local(self, args: tuple, mask: Array, thresholds: Array, way: str | None = None) -> ClippedSum:
        """What one device does with its rows: ``way`` says how, or it is looked for."""
        call, tree, aux_tree = self._flat(args, thresholds)
        _, step, _ = self._planned(call, way)
        call = replace(call, data=_stand_ins(call.data, mask))
        sums, norms, losses, aux = step(call, mask)
        grads = jax.tree.unflatten(tree, sums)
        aux = jax.tree.unflatten(aux_tree(), aux) if self.has_aux else None
        return ClippedSum(grads, jnp.where(mask, norms, 0), jnp.where(mask, losses, 0), aux, self.bound)

    def _flat(self, args: tuple, thresholds: Any) -> tuple[Call, Any, Callable]:
        trees = [jax.tree.flatten(a) for a in args]
        paths = jax.tree_util.tree_leaves_with_path(args[self.argnums])
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        parameters = list(trees[self.argnums][0])
        for name, p in zip(names, parameters):
            if not jnp.issubdtype(jnp.result_type(p), jnp.floating):
                raise ValueError(
                    f"parameter {name} is of type {jnp.result_type(p)} and has no gradient: pass what is not "
                    "trained as an argument of its own."
                )
        if not parameters:
            raise ValueError("there are no parameters to train.")
        widths = [len(leaves) for leaves, _ in trees]
        aux_trees: list = []

        def loss(parameters: Sequence, data: Sequence, others: Sequence) -> list:
            sources = {True: iter(data), False: iter(others)}
            rebuilt = []
            for i, (_, tree) in enumerate(trees):
                leaves = (
                    list(parameters)
                    if i == self.argnums
                    else [next(sources[i in self.batched]) for _ in range(widths[i])]
                )
                rebuilt.append(jax.tree.unflatten(tree, leaves))
            out = self.loss_fn(*rebuilt)
            if self.has_aux != (isinstance(out, tuple) and len(out) == 2):
                raise ValueError(
                    "with has_aux=True a loss returns (scalar, aux), and without it the scalar alone; "
                    f"has_aux is {self.has_aux}, and it returned {type(out).__name__}."
                )
            value, aux = out if self.has_aux else (out, None)
            _array("the loss of one example", value)
            if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                raise ValueError(
                    "the loss of one example must be a floating-point scalar, and is "
                    f"{jnp.result_type(value)} of shape {jnp.shape(value)}."
                )
            leaves, aux_tree = jax.tree.flatten(aux)
            aux_trees[:] = [aux_tree]
            return [value, *leaves]

        # In the order of the arguments, as ``loss`` takes them.
        data = [x for i in sorted(self.batched) for x in trees[i][0]]
        fixed = [i for i in range(len(args)) if i != self.argnums and i not in self.batched]
        others = [x for i in fixed for x in trees[i][0]]
        call = Call(parameters, data, others, loss, names, thresholds)
        return call, trees[self.argnums][1], lambda: aux_trees[0]

    def _planned(self, call: Call, way: str | None = None) -> tuple[Plan, Callable, str]:
        """The plan, what follows it, ``(call, mask) -> (sums, norms, losses, aux)``, and the way's name."""
        capture, size = self.method.capture, call.size
        closed = self._traced(call)
        n, m = len(call.parameters), len(call.data)
        program = written_out(closed)
        divided = split(program, program.inputs[:n], program.inputs[n : n + m])
        found = Capture(divided)
        self._check_coverage(call, found)
        looped = Plan(methods.Capture.LOOP, 1), baselines.looped(self.rule), "loop"
        if capture is methods.Capture.NONE:
            return Plan(capture, size), baselines.non_private, "whole"
        if capture is methods.Capture.LOOP:
            return looped
        if draws_together(closed):
            if capture is methods.Capture.PLANNED:
                return looped
            raise Refused(
                "the loss draws random numbers by keys of the kind rbg, which under vmap all come from the "
                "first example's key: use threefry keys, or method='per-example-loop'."
            )
        if capture is methods.Capture.VMAP:
            return Plan(capture, size), baselines.vectorised(self.rule), "whole"
        used = dict.fromkeys([use.value for use in found.uses] + list(found.direct))
        grouped = groups(divided, used)
        if rounding := next((g.rounds for g in grouped if g.rounds), None):
            if capture is methods.Capture.PLANNED:
                return looped
            raise Refused(
                f"parameters pass through {rounding} in a type narrower than float32 before they meet data, "
                "where a clipped sum would be rounded: do that in float32, or use method='per-example-loop'."
            )
        routes = routed(self.method, parts(found, grouped), jax.default_backend())
        second = self.method.sum is methods.Sum.SECOND_BACKWARD
        by_uses = Plan(methods.Capture.USES, self.rows or size, second, routes)
        ways = {"whole": (by_uses, ByUses(found, by_uses, self.rule))}
        measured = self.memory_budget is not None or is_worth_measuring(routes, size)
        if capture is methods.Capture.PLANNED and self.rows is None and measured:
            ways["loop"] = looped[:2]
            for rows in parts_to_try(size):
                plan = replace(by_uses, rows=rows)
                ways[f"rows {rows}"] = plan, ByUses(found, plan, self.rule)
            way = way or self._fastest(call, closed, ways)
        way = way or "whole"
        return *ways[way], way

    def _fastest(self, call: Call, closed: Any, ways: dict[str, tuple[Plan, Callable]]) -> str:
        # The loss closes over values of a function that is being traced, or does more than to compute.
        if any(isinstance(c, jax.core.Tracer) for c in closed.consts) or calls_back(closed):
            return "whole"
        shapes = [
            [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
            for leaves in (call.parameters, call.data, call.others)
        ]
        mask = jax.ShapeDtypeStruct((call.size,), bool)

        def stepping(step: Callable) -> Callable:
            def go(parameters: list, data: list, others: list, mask: Array) -> tuple:
                known = jnp.asarray(self.thresholds)  # those of the call are being traced
                here = replace(call, parameters=parameters, data=data, others=others, thresholds=known)
                return step(here, mask)

            return go

        name = stopwatch.fingerprint(closed, call.size, shapes)
        steps = {name: stepping(step) for name, (_, step) in ways.items()}
        return stopwatch.fastest(steps, [*shapes, mask], name, self.memory_budget)

    def _traced(self, call: Call) -> Any:
        example = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in call.data]
        return jax.make_jaxpr(call.loss)(call.parameters, example, call.others)

    def _check_coverage(self, call: Call, found: Capture) -> None:
        """Every parameter has a part in the loss."""
        used = found.leaves
        unused = [name for i, name in enumerate(call.names) if i not in used]
        if unused and not self.allow_unused:
            listed = ", ".join(unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
            raise Refused(
                f"the loss does not depend on {listed}: leave out of the parameters what is not trained, or "
                "pass allow_unused=True to give it noise and nothing else."
            )


def _kind(rule: ClipRule) -> tuple:
    """All of a rule that a compiled step depends on."""
    return type(rule), rule.stability, len(rule.thresholds), getattr(rule, "patterns", None)


def _stand_ins(data: list[Array], mask: Array) -> list[Array]:
    """The data with a real row in place of each masked one, which takes part in everything with factor 0."""
    first, some = jnp.argmax(mask), jnp.any(mask)

    def one(x: Array) -> Array:
        here = mask.reshape(-1, *[1] * (x.ndim - 1))
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x  # nothing can be wrong with a key
        return jnp.where(here, x, jnp.where(some, x[first], jnp.zeros((), x.dtype)))

    return [one(x) for x in data]


def _array(what: str, value: Any) -> Any:
    """A leaf, if JAX takes it for an array or a number."""
    try:
        if value is None:
            raise TypeError
        jnp.result_type(value)
        return value if hasattr(value, "shape") else jnp.asarray(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{what} must be an array, and is {checks.shown(value)}.") from None
