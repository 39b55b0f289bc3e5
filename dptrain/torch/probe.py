"""The probe: once per input signature, learn where the examples lie and that they do not mix.

It runs on stand-in rows and on a copy of the model with randomised parameters (a zero-initialised
head would hide mixing), and leaves the random state as it found it.

(a) Back-propagate the loss of one example, then of another: of every recorded gradient, the rows
    of all other examples must be exactly zero and its own not all zero.
(b) Replace one example: every other loss, and every other row of every recorded operand and
    gradient, must stay as it was up to rounding. A stop-gradient batch mean, a hand-written batch
    norm and capacity-limited routing pass (a) and still let one example move another's gradient.

Where the examples lie is found at two small prime batch sizes: an axis that holds examples grows
with the batch, whatever other sizes happen to equal it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .capture import Capture, Use
from .errors import Refused
from .guards import backward, check_losses, listed, trainable
from .layout import Layout, candidates, only_rows_of
from .pullback import Group, group_uses, leaves_of

CHANGING = (
    "the operations of the model change from call to call, so its gradients cannot be assigned to "
    "examples: make them the same for every batch of one shape."
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

    @property
    def trace(self) -> tuple:
        return self.operation, self.rule, self.value


@dataclass(frozen=True)
class Findings:
    """The structure of a model's forward pass for one input signature."""

    uses: tuple[UseFacts, ...]
    groups: tuple[Group, ...]
    layouts: dict[Any, Any]
    covered: frozenset[str]


def probe(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    mask: Tensor | None,
    batch_size: int,
) -> Findings:
    """Learn the structure of ``loss_fn(model, batch)`` and check that examples do not mix.

    Raises:
        Refused: examples mix, or it could not be shown that they do not.
    """
    with _isolated_randomness(batch):
        return _Probe(model, loss_fn, batch, mask, batch_size).run()


@contextlib.contextmanager
def _isolated_randomness(batch: Any):
    devices = {t.device for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.is_cuda}
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(d.index or 0 for d in devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _Probe:
    def __init__(self, model, loss_fn, batch, mask, batch_size):
        self.original = model
        self.model = copy.deepcopy(model)
        self.model.zero_grad(set_to_none=True)
        self.loss_fn, self.batch, self.mask, self.batch_size = loss_fn, batch, mask, batch_size
        self.parameters = trainable(self.model)
        self.buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        self.layouts: dict[Any, Any] | None = None

    # ---------------------------------------------------------------- ingredients

    def _seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    @torch.no_grad()
    def _randomise(self, attempt: int) -> None:
        """Parameters near the model's own, but with no zero left to hide behind."""
        scale = (0.5, 0.2, 0.05, 1.0)[attempt % 4]
        generator = torch.Generator().manual_seed(1000 + attempt)
        for name, mine in self.model.named_parameters():
            own = self.original.get_parameter(name)
            if not mine.is_floating_point():
                continue
            fan_in = mine[0].numel() if mine.dim() > 1 else 9
            noise = torch.randn(mine.shape, generator=generator) * (scale / max(1, fan_in) ** 0.5)
            mine.copy_(own.nan_to_num() + noise.to(mine.device, mine.dtype))

    def _stand_ins(self, size: int, attempt: int, salt: int = 0) -> Any:
        """``size`` finite rows like those of the batch: mixtures for floats, rows for the rest."""
        generator = torch.Generator().manual_seed(17 * attempt + salt)
        leaves, tree = tree_flatten(self.batch)
        usable = torch.ones(self.batch_size, dtype=torch.bool)
        if self.mask is not None:
            usable &= self.mask.cpu()
        for t in leaves:
            if isinstance(t, Tensor) and t.is_floating_point():
                usable &= t.detach().reshape(self.batch_size, -1).isfinite().all(1).cpu()
        rows = usable.nonzero().flatten()
        if len(rows) == 0:
            rows = torch.arange(self.batch_size)
        order = torch.randperm(len(rows), generator=generator)
        first = rows[order[torch.arange(size) % len(rows)]]
        second = rows[torch.randint(len(rows), (size,), generator=generator)]
        weight = torch.rand(size, generator=generator)
        jitter = attempt > 0 or not any(
            bool((t[rows[0]] != t[rows[-1]]).any()) for t in leaves if isinstance(t, Tensor)
        )
        out = []
        for t in leaves:
            if not isinstance(t, Tensor):
                out.append(t)
                continue
            x, y = t.detach()[first.to(t.device)], t.detach()[second.to(t.device)]
            if t.is_floating_point():
                x, y = x.nan_to_num(0.5, 0.5, 0.5), y.nan_to_num(0.5, 0.5, 0.5)
                w = weight.to(t.device, t.dtype).reshape(-1, *[1] * (t.dim() - 1))
                x = w * x + (1 - w) * y
                if jitter:
                    noise = torch.randn(x.shape, generator=generator).to(t.device, t.dtype)
                    x = x + noise * (0.1 + x.std() if x.numel() > 1 else 0.1)
            out.append(x.clone())
        return tree_unflatten(out, tree)

    def _forward(self, rows: Any, size: int, sink, layouts) -> tuple[Capture, Tensor]:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])
        self._seed(7)
        capture = Capture(self.parameters, size, sink, layouts)
        batch = tree_map(lambda t: capture.mark_data(t.clone()) if isinstance(t, Tensor) else t, rows)
        with torch.enable_grad(), capture:
            losses = self.loss_fn(self.model, batch)
        check_losses(losses, size)
        return capture, losses

    def _backward(self, capture: Capture, target: Tensor, last: bool) -> None:
        backward(capture, target, self.parameters, retain_graph=not last)

    # ---------------------------------------------------------------- the parts

    def run(self) -> Findings:
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
            raise Refused(
                f"could not show that examples do not mix: no stand-in example moved {listed(names)}. "
                "Freeze the parameters with requires_grad_(False) if they are meant not to learn."
            )
        covered = frozenset(leaf for fact in facts for leaf in fact.leaves)
        facts = self._at_full_size(facts, layouts)
        return Findings(tuple(facts), tuple(groups), layouts, covered)

    def _at_full_size(self, facts: list[UseFacts], layouts) -> list[UseFacts]:
        """The facts with the shapes of the real batch size: a value can vary with the examples."""
        rows = self._stand_ins(self.batch_size, 0)
        capture, _ = self._forward(rows, self.batch_size, lambda *_: None, layouts)
        if len(capture.uses) != len(facts):
            raise Refused(CHANGING)
        return [
            dataclasses.replace(fact, rule=use.rule, value=use.value.shape)
            for fact, use in zip(facts, capture.uses)
        ]

    def _small_sizes(self) -> tuple[int, ...]:
        """Two primes if the model takes any batch size, else the one that it was given."""
        self._randomise(0)
        try:
            for size in SIZES:
                self._forward(self._stand_ins(size, 0), size, lambda *_: None, None)
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
            self._randomise(attempt)
            example = [0]

            def look(use: Use, a: Tensor | None, g: Tensor, example=example) -> None:
                if use.index not in found:
                    found[use.index] = candidates(g.shape, size, use.rule.features)
                    canonical[use.index] = (a, g)
                found[use.index] = [
                    layout for layout in found[use.index] if only_rows_of(example[0], g, layout, size)
                ]

            capture, losses = self._forward(self._stand_ins(size, attempt), size, look, layouts)
            for example[0] in range(size):
                self._backward(capture, losses[example[0]], example[0] == size - 1)
            if len(found) == len(capture.uses):
                break
        if len(sizes) > 1:  # an axis of examples grows with the batch

            def measure(use: Use, a: Tensor | None, g: Tensor) -> None:
                shapes.setdefault(use.index, []).append(g.shape)

            other, losses = self._forward(self._stand_ins(sizes[1], 0), sizes[1], measure, layouts)
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
            facts.append(UseFacts(leaves, use.operation, use.rule, use.value.shape, layout, sized))
        groups = group_uses(capture.uses, names, self.parameters)
        return facts, groups, layouts

    def _generic_layouts(self, sizes: tuple[int, ...]) -> dict[Any, Any]:
        """Where the generic rule finds the examples: the axes that differ between two sizes."""
        seen = []
        for size in sizes:
            capture, _ = self._forward(self._stand_ins(size, 0), size, lambda *_: None, None)
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
        self._randomise(attempt)
        rows = self._stand_ins(size, attempt)
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

        capture, losses = self._forward(rows, size, alone, layouts)
        if not bool(losses.isfinite().all()):
            return set()
        for example[0] in (kept, moved):
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
        self._losses_stay_apart(layouts, size, attempt + 1)
        return conclusive

    def _losses_stay_apart(self, layouts, size: int, attempt: int) -> None:
        """(b) for the losses alone, with other parameters and rows: a forward pass is cheap."""
        self._randomise(attempt)
        rows = self._stand_ins(size, attempt, salt=2)
        others = torch.arange(size) >= (size + 1) // 2  # routing favours whoever comes first
        _, losses = self._forward(rows, size, lambda *_: None, layouts)
        others = others.to(losses.device)
        _, changed = self._replaced(rows, others, size, attempt, lambda *_: None, layouts)
        if bool(losses.isfinite().all()) and bool(changed.isfinite().all()):
            self._check_losses_apart(losses, changed, others)

    def _replaced(self, rows, others, size, attempt, sink, layouts) -> tuple[Capture, Tensor]:
        """A forward pass on the same rows for ``others`` and new ones for the rest."""
        new = self._stand_ins(size, attempt + 1, salt=1)

        def swap(t, u):
            if not isinstance(t, Tensor):
                return t
            keep = others.to(t.device).reshape(-1, *[1] * (t.dim() - 1))
            return torch.where(keep, t, u)

        return self._forward(tree_map(swap, rows, new), size, sink, layouts)

    def _check_losses_apart(self, losses: Tensor, changed: Tensor, others: Tensor) -> None:
        if not _same(losses.detach(), changed.detach(), others):
            raise Refused("examples mix: replacing one example changes the loss of another.")


def _digest(split: Tensor) -> Tensor:
    """Two numbers a row: a random projection and the norm; ``[B, 2]`` in float64."""
    flat = split.reshape(split.shape[0], -1)
    flat = flat.double() if not flat.is_floating_point() or flat.dtype == torch.float64 else flat.float()
    direction = torch.cos(torch.arange(flat.shape[1], device=flat.device, dtype=flat.dtype) * 1.7)
    return torch.stack([flat @ direction, flat.square().sum(1).sqrt()], 1).double()


def _same(first: Tensor, second: Tensor, others: Tensor) -> bool:
    """Equal up to rounding in the rows of the other examples."""
    scale = first.abs().amax(0, keepdim=True)
    tolerance = 3e-5 * scale + 1e-30  # a batch mean of a thousand examples moves by 1e-3
    return bool(((first - second).abs() <= tolerance)[others].all())
