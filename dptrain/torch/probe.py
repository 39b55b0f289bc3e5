"""The probe: once per input signature, learn where the examples lie and that they do not mix.

It runs on stand-in rows and on a copy of the model with randomised parameters (a zero-initialised
head would hide mixing), and leaves the random state as it found it.

(a) Back-propagate the loss of one example (of each in turn, at the small sizes): of every recorded
    gradient, the rows of all other examples must be exactly zero and its own not all zero.
(b) Replace half of the examples: every other loss, and every other row of every recorded operand and
    gradient, must stay as it was up to rounding. A stop-gradient batch mean, a hand-written batch
    norm and capacity-limited routing pass (a) and still let one example move another's gradient.

Where the examples lie is found at two small prime batch sizes: an axis that holds examples grows
with the batch, whatever other sizes happen to equal it.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .capture import Capture, Use
from .errors import Refused
from .guards import backward, check_losses, listed, parameters_untouched, trainable
from .layout import Layout, candidates, only_rows_of
from .pullback import Group, Kind, geometry, group_uses, leaves_of
from .stand_ins import StandIns, isolated_randomness, randomise, seed

CHANGING = (
    "the operations of the model change from call to call, so its gradients cannot be assigned to "
    "examples: make them the same for every batch of one shape."
)
WRITTEN = (
    "the forward pass writes to the model's parameters, which would be released without any "
    "protection: keep such state in buffers that do not depend on the data, or freeze the module."
)
SIZES = (3, 5)
ATTEMPTS = 4


@dataclass(frozen=True)
class UseFacts:
    """What the probe learnt of one use; ``layout`` is None if no gradient ever reaches it."""

    leaves: tuple[str, ...]
    operation: str
    rule: Any
    value: torch.Size
    layout: Layout | None
    size: Any
    #: which elements of its leaf the value shows, if it is a view of one
    geometry: tuple | None = None

    @property
    def trace(self) -> tuple:
        return self.operation, self.rule, self.value, self.leaves


@dataclass(frozen=True)
class Findings:
    """The structure of a model's forward pass for one input signature."""

    uses: tuple[UseFacts, ...]
    groups: tuple[Group, ...]
    layouts: dict[Any, Any]
    covered: frozenset[str]

    @functools.cached_property
    def shared(self) -> tuple[int, ...]:
        """Uses of leaves that have several, which rely on which elements each of them shows."""
        count = collections.Counter(leaf for fact in self.uses for leaf in fact.leaves)
        general = {i for g in self.groups if g.kind is Kind.GENERAL for i in g.uses}
        return tuple(i for i, fact in enumerate(self.uses) if i not in general and count[fact.leaves[0]] > 1)


@dataclass(frozen=True)
class Stage:
    """A copy of the model on stand-in rows, for a rehearsal of the method that was chosen."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]
    size: int
    rows: Any
    findings: Findings
    #: buffers and randomness as at the start of every forward pass
    reset: Callable[[], None]


def probe(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    mask: Tensor | None,
    batch_size: int,
    allow_unused: bool = False,
) -> tuple[Findings, Stage]:
    """Learn the structure of ``loss_fn(model, batch)`` and check that examples do not mix.

    Raises:
        Refused: examples mix, or it could not be shown that they do not.
    """
    with isolated_randomness(batch):
        return _Probe(model, loss_fn, batch, mask, batch_size).run(allow_unused)


class _Probe:
    def __init__(self, model, loss_fn, batch, mask, batch_size):
        self.original = model
        try:
            self.model = copy.deepcopy(model)
        except Exception as error:
            raise Refused(
                f"the model cannot be copied for probing ({error}): use torch.nn.utils."
                "parametrizations in place of the older weight_norm and spectral_norm."
            ) from error
        self.model.zero_grad(set_to_none=True)
        self.loss_fn, self.batch_size = loss_fn, batch_size
        self.stand_ins = StandIns(batch, mask, batch_size)
        self.parameters = trainable(self.model)
        self.buffers = {n: b.clone() for n, b in self.model.named_buffers()}

    # ---------------------------------------------------------------- ingredients

    def reset(self) -> None:
        """Buffers and randomness as at the start."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])
        seed(7)

    def _forward(self, rows: Any, size: int, sink, layouts) -> tuple[Capture, Tensor]:
        self.reset()
        capture = Capture(self.parameters, size, sink, layouts)
        batch = tree_map(lambda t: capture.mark_data(t.clone()) if isinstance(t, Tensor) else t, rows)
        with parameters_untouched(self.model), torch.enable_grad(), capture:
            losses = self.loss_fn(self.model, batch)
        check_losses(losses, size)
        return capture, losses

    def _backward(self, capture: Capture, target: Tensor, last: bool) -> None:
        backward(capture, target, self.parameters, retain_graph=not last)

    # ---------------------------------------------------------------- the parts

    def run(self, allow_unused: bool) -> tuple[Findings, Stage]:
        sizes = self._small_sizes()
        facts, groups, layouts = self._structure(sizes)
        waiting = {i for i, fact in enumerate(facts) if fact.layout is not None}
        for attempt in range(ATTEMPTS):
            for size in dict.fromkeys((sizes[0], self.batch_size)):
                if size > 1:
                    waiting -= self._examples_stay_apart(facts, layouts, size, attempt)
            if not waiting:
                break
        else:
            names = sorted({leaf for i in waiting for leaf in facts[i].leaves})
            if not allow_unused:
                raise Refused(
                    "could not show that examples do not mix: no stand-in example moved "
                    f"{listed(names)}. Freeze the parameters with requires_grad_(False), or pass "
                    "allow_unused=True if their gradient is meant to be zero."
                )
            for i in waiting:  # should a gradient come all the same, the step refuses it
                facts[i] = dataclasses.replace(facts[i], layout=None)
        covered = frozenset(leaf for f in facts if f.layout is not None for leaf in f.leaves)
        small = Findings(tuple(facts), tuple(groups), layouts, covered)
        randomise(self.model, self.original, 0)
        stage = Stage(self.model, self.loss_fn, sizes[0], self.stand_ins(sizes[0], 0), small, self.reset)
        return self._at_full_size(facts, layouts, covered), stage

    def _at_full_size(self, facts: list[UseFacts], layouts, covered) -> Findings:
        """The facts at the real batch size: values, and which overlap, can vary with the examples."""
        rows = self.stand_ins(self.batch_size, 0)
        capture, _ = self._forward(rows, self.batch_size, lambda *_: None, layouts)
        if len(capture.uses) != len(facts):
            raise Refused(CHANGING)
        full = [
            dataclasses.replace(
                fact,
                rule=use.rule,
                value=use.value.shape,
                geometry=geometry(use.value, self.parameters[fact.leaves[0]]),
            )
            for fact, use in zip(facts, capture.uses)
        ]
        groups = group_uses(capture.uses, capture.names, self.parameters)
        return Findings(tuple(full), tuple(groups), layouts, covered)

    def _small_sizes(self) -> tuple[int, ...]:
        """Two primes if the model takes any batch size, else the one that it was given."""
        randomise(self.model, self.original, 0)
        try:
            for size in SIZES:
                self._forward(self.stand_ins(size, 0), size, lambda *_: None, None)
            return SIZES
        except Refused:
            raise
        except Exception:
            return (self.batch_size,)

    def _structure(self, sizes: tuple[int, ...]):
        layouts = self._generic_layouts(sizes)
        size = sizes[0]
        found: dict[int, list[Layout]] = {}
        canonical: dict[int, Any] = {}
        shapes: dict[int, list[torch.Size]] = {}
        for attempt in range(ATTEMPTS):
            randomise(self.model, self.original, attempt)
            example = [0]

            def look(use: Use, a: Tensor | None, g: Tensor, example=example) -> None:
                if use.index not in found:
                    found[use.index] = candidates(g.shape, size, use.rule.features)
                    canonical[use.index] = (a, g)
                found[use.index] = [
                    layout for layout in found[use.index] if only_rows_of(example[0], g, layout, size)
                ]

            capture, losses = self._forward(self.stand_ins(size, attempt), size, look, layouts)
            for example[0] in range(size):
                self._backward(capture, losses[example[0]], example[0] == size - 1)
            if len(found) == len(capture.uses):
                break
        if len(sizes) > 1:  # an axis of examples grows with the batch

            def measure(use: Use, a: Tensor | None, g: Tensor) -> None:
                shapes.setdefault(use.index, []).append(g.shape)

            other, losses = self._forward(self.stand_ins(sizes[1], 0), sizes[1], measure, layouts)
            self._backward(other, losses.sum(), True)
            for index, options in found.items():
                for shape in shapes.get(index, []):
                    options[:] = [
                        o for o in options
                        if len(shape) > o.axis and shape[o.axis] == o.rows(sizes[1])
                    ]  # fmt: skip
        names = capture.names
        facts = []
        for use in capture.uses:
            leaves = leaves_of(use.value, names)
            options = found.get(use.index)
            if options is not None and not options:
                raise Refused(
                    f"examples mix, or lie on no axis, in {use.operation} with {listed(leaves)}: one "
                    "example's loss moves another's part of its gradient."
                )
            layout = options[0] if options else None
            sized = None
            if layout is not None:
                a, g = canonical[use.index]
                sized = use.rule.size(use.value.shape, a, g, size)
            view = geometry(use.value, self.parameters[leaves[0]])
            shape = use.value.shape
            facts.append(UseFacts(leaves, use.operation, use.rule, shape, layout, sized, view))
        groups = group_uses(capture.uses, names, self.parameters)
        return facts, groups, layouts

    def _generic_layouts(self, sizes: tuple[int, ...]) -> dict[Any, Any]:
        """Where the generic rule finds the examples: the axes that differ between two sizes."""
        seen = []
        for size in sizes:
            capture, _ = self._forward(self.stand_ins(size, 0), size, lambda *_: None, None)
            seen.append(capture.generic)
        if not seen[0]:
            return {}
        if len(sizes) < 2:
            raise Refused(
                f"{seen[0][0][0]} has no rule of its own, and the model takes batches of one size only."
            )
        layouts: dict[Any, Any] = {}

        def axis(small: tuple, large: tuple, name: str) -> int | None:
            grown = [i for i, (s, t) in enumerate(zip(small, large)) if s != t]
            fits = all(s * sizes[1] == t * sizes[0] for s, t in zip(small, large) if s != t)
            if len(grown) > 1 or not fits:
                raise Refused(f"{name} has no rule of its own and its examples lie on no single axis.")
            return grown[0] if grown else None

        for position, (small, large) in enumerate(zip(*seen)):
            name = small[0]
            inputs = [axis(s, t, name) for s, t in zip(small[1], large[1])]
            outputs = [axis(s, t, name) for s, t in zip(small[2], large[2])]
            if None in outputs:
                raise Refused(f"{name} with parameters has an output without an axis of examples.")
            layouts[("generic", position)] = (inputs, outputs)
        return layouts

    def _examples_stay_apart(self, facts, layouts, size: int, attempt: int) -> set[int]:
        """(a) and (b) at one batch size; returns the uses for which (a) was conclusive."""
        randomise(self.model, self.original, attempt)
        rows = self.stand_ins(size, attempt)
        generator = torch.Generator().manual_seed(attempt)
        order = torch.randperm(size, generator=generator)
        kept, moved = int(order[0]), int(order[1])
        conclusive: set[int] = set()
        example = [kept]

        def alone(use: Use, a: Tensor | None, g: Tensor) -> None:
            fact = facts[use.index] if use.index < len(facts) else None
            if fact is None or fact.layout is None or not fact.layout.fits(g, size):
                raise Refused(CHANGING)
            if not only_rows_of(example[0], g, fact.layout, size):
                raise Refused(
                    f"examples mix in {use.operation} with {listed(fact.leaves)}: the loss of one "
                    "example moves another's part of its gradient."
                )
            if bool((g != 0).any()):
                conclusive.add(use.index)

        summaries: list[dict[int, Tensor]] = []

        def summarise(use: Use, a: Tensor | None, g: Tensor) -> None:
            layout = facts[use.index].layout
            parts = [_digest(layout.split(g, size))]
            if a is not None and layout.fits(a, size):
                parts.append(_digest(layout.split(a, size)))
            summaries[-1][use.index] = torch.stack(parts, 1)

        written = _parameter_digest(self.model)
        capture, losses = self._forward(rows, size, alone, layouts)
        if not bool(losses.isfinite().all()):
            return set()
        if _parameter_digest(self.model) != written:
            raise Refused(WRITTEN)
        values = [_value_digest(use) for use in capture.uses]
        # at a small size each example has been back-propagated by itself already
        for example[0] in (kept,) if size > max(SIZES) else (kept, moved):
            self._backward(capture, losses[example[0]], False)
        capture.sink = summarise
        summaries.append({})
        self._backward(capture, losses.sum(), True)
        before = {n: b.clone() for n, b in self.model.named_buffers()}

        # replacing several at once is as good a test of independence as replacing one, and finds
        # routing with a capacity sooner; half of them keep their place to be looked at
        others = torch.ones(size, dtype=torch.bool, device=losses.device)
        others[order[1 : 1 + max(1, size // 2)]] = False
        summaries.append({})
        capture, changed = self._replaced(rows, others, size, attempt, summarise, layouts)
        self._backward(capture, changed.sum(), True)
        if [_value_digest(use) for use in capture.uses] != values:
            raise Refused(
                "data reaches a value made of parameters by a way that cannot be followed, such as "
                "numpy or torch.func.vmap: compute it with ordinary tensor operations."
            )
        if bool(losses[moved] == changed[moved]) or not bool(changed.isfinite().all()):
            return set()
        for name, buffer in self.model.named_buffers():
            if not torch.equal(buffer, before[name]):
                raise Refused(
                    f"the buffer {name} of the model depends on the data, which would be released "
                    "without any protection: freeze it, for example with .eval() on its module."
                )
        self._check_losses_apart(losses, changed, others)
        first, second = summaries
        for index in first.keys() & second.keys():
            if not _same(first[index], second[index], others):
                raise Refused(
                    f"examples mix in {facts[index].operation} with {listed(facts[index].leaves)}: "
                    "replacing one example changes another's part of the gradient."
                )
        self._loud(rows, losses, others, size, layouts)
        self._crowded(layouts, size, attempt)
        return conclusive

    def _loud(self, rows, losses, others, size: int, layouts) -> None:
        """(b) with some rows a thousand times as large: what a threshold or a maximum would notice."""

        def amplify(t):
            if not isinstance(t, Tensor) or not t.is_floating_point():
                return t
            return torch.where(_column(others, t), t, 1e3 * t)

        try:
            _, changed = self._forward(tree_map(amplify, rows), size, lambda *_: None, layouts)
        except Refused:
            raise
        except Exception:  # such rows can be outside what a loss accepts
            return
        self._check_losses_apart(losses, changed, others)

    def _crowded(self, layouts, size: int, attempt: int) -> None:
        """(b) with rows nearly alike and then half of them another: what fills a router's capacity."""
        rows = self.stand_ins.crowd(size, attempt)
        others = torch.arange(size) >= (size + 1) // 2  # routing favours whoever comes first
        _, losses = self._forward(rows, size, lambda *_: None, layouts)
        others = others.to(losses.device)
        for salt in range(3):  # a row that is routed elsewhere must be met
            new = self.stand_ins.crowd(size, attempt + 1, 1 + salt, -1.0 if salt == 0 else 1.0)
            _, changed = self._forward(_choose(others, rows, new), size, lambda *_: None, layouts)
            self._check_losses_apart(losses, changed, others)

    def _replaced(self, rows, others, size, attempt, sink, layouts) -> tuple[Capture, Tensor]:
        """A forward pass on the same rows for ``others`` and new ones for the rest."""
        new = self.stand_ins(size, attempt + 1, salt=1)
        return self._forward(_choose(others, rows, new), size, sink, layouts)

    def _check_losses_apart(self, losses: Tensor, changed: Tensor, others: Tensor) -> None:
        if not _same(losses.detach(), changed.detach(), others):
            raise Refused("examples mix: replacing one example changes the loss of another.")


def _column(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device).reshape(-1, *[1] * (like.dim() - 1))


def _choose(keep: Tensor, rows: Any, new: Any) -> Any:
    """The rows in ``keep`` from one batch, the others from another."""
    return tree_map(
        lambda t, u: torch.where(_column(keep, t), t, u) if isinstance(t, Tensor) else t, rows, new
    )


def _parameter_digest(model: nn.Module) -> list[float]:
    return [float(p.detach().double().sum()) for p in model.parameters()]


def _value_digest(use: Use) -> tuple[float, float] | None:
    """Of a value that is no leaf: data must not change it."""
    if use.value.grad_fn is None:
        return None
    # masks hold -inf or the lowest number there is, next to which everything else would drown
    flat = use.value.detach().double().flatten().nan_to_num(0, 0, 0)
    flat = flat.where(flat.abs() < 1e30, 0)
    wave = torch.cos(torch.arange(flat.numel(), device=flat.device, dtype=flat.dtype) * 1.7)
    return float(flat.sum()), float(flat @ wave)


def _digest(split: Tensor) -> Tensor:
    """Two numbers a row: a random projection and the norm; ``[B, 2]`` in float64."""
    flat = split.reshape(split.shape[0], -1)
    flat = flat.double() if not flat.is_floating_point() or flat.dtype == torch.float64 else flat.float()
    direction = torch.cos(torch.arange(flat.shape[1], device=flat.device, dtype=flat.dtype) * 1.7)
    return torch.stack([flat @ direction, flat.square().sum(1).sqrt()], 1).double()


def _same(first: Tensor, second: Tensor, others: Tensor) -> bool:
    """Equal up to rounding in the rows of the other examples; what is not finite must stay so."""
    first, second = first[others].double(), second[others].double()
    finite = first.isfinite()
    if bool((finite != second.isfinite()).any()):
        return False
    first, second = first.where(finite, 0), second.where(finite, 0)
    scale = first.abs().amax(0, keepdim=True)
    tolerance = 3e-5 * scale + 1e-30  # a batch mean of a thousand examples moves by 1e-3
    return bool(((first - second).abs() <= tolerance).all())
