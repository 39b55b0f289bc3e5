"""The largest physical batch that a memory budget admits, from what small batches need.

Each allocation of a step is a constant plus a multiple of the batch size. On a CPU the bytes alive
at every moment are counted at two sizes, each moment is extended on its own line, and the highest
of them is the peak: which moment that is may change with the size. Loops over examples make the
larger batch's list longer, so that moments are matched by their operations. On a GPU the
allocator's own peaks are extended.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dptrain.core.clip_rules import Flat

from .batch import clip_batch
from .clipping import ClippedGrad
from .device_memory import total_memory
from .errors import Refused
from .guards import trainable
from .live_bytes import LiveBytes
from .planner import Plan
from .stand_ins import isolated_randomness

#: of a budget, what the allocator loses to fragments, and what Python and its libraries occupy
LOST_SHARE = 0.05
RUNTIME_BYTES = 800 * 2**20


#: an operation that allocates, and the bytes alive then
Moment = tuple[str, int]


@dataclass(frozen=True)
class Line:
    """``fixed + per_example * B`` bytes."""

    fixed: float
    per_example: float

    def at(self, size: int) -> float:
        return self.fixed + self.per_example * size


@dataclass(frozen=True)
class Forecast:
    """Peak memory of one physical batch, and what fits.

    Attributes:
        budget_bytes: what was asked about.
        resident_bytes: parameters, buffers, and the sum over the logical batch.
        measured: (batch size, peak bytes beyond those) that were seen.
        lines: the peak is the highest of them.
        largest: the largest physical batch predicted to fit; 0 if not even one example does.
    """

    budget_bytes: int
    resident_bytes: int
    measured: tuple[tuple[int, int], ...]
    lines: tuple[Line, ...]

    def peak_bytes(self, size: int) -> int:
        """Predicted peak for one physical batch: tensors only."""
        return round(self.resident_bytes + max(line.at(size) for line in self.lines))

    @property
    def largest(self) -> int:
        room = self.budget_bytes * (1 - LOST_SHARE) - RUNTIME_BYTES
        if self.peak_bytes(1) > room:
            return 0
        low, high = 1, 2
        while self.peak_bytes(high) <= room and high < 2**30:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak_bytes(middle) <= room else (low, middle)
        return low


def forecast(task: ClippedGrad, plan: Plan, batch: Any, budget_bytes: int | None) -> Forecast:
    """Measure steps of two small sizes by ``plan`` and extend them.

    The optimizer's own state is not counted.

    Raises:
        Refused: the model does other than what was planned.
    """
    parameters = trainable(task.model)
    device = next(iter(parameters.values())).device
    tensors = [*task.model.parameters(), *task.model.buffers()]
    resident = sum(t.numel() * t.element_size() for t in tensors)
    resident += sum(p.numel() * max(4, p.element_size()) for p in parameters.values())
    budget = total_memory(device) if budget_bytes is None else budget_bytes
    sizes = _sizes(plan.batch_size)
    step = _step(task, plan, parameters)
    with isolated_randomness(batch), _buffers_kept(task.model):
        small, large = (_moments(step, _rows(batch, size), task.model) for size in sizes)
    peaks = [max(alive for _, alive in each) for each in (small, large)]
    lines = [_through(sizes, *pair) for pair in [peaks, *_matched(small, large)]]
    return Forecast(budget, resident, tuple(zip(sizes, peaks)), _highest(lines))


@contextlib.contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Power iterations and counters move in a forward pass; the model is not ours."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(before[name])


def _sizes(batch_size: int) -> tuple[int, int]:
    """The batch's own size, for which the plan was made, and about half of it.

    Not one: tensors of one example take ways of their own.
    """
    large = max(3, batch_size)
    return (large + 1) // 2, large


def _rows(batch: Any, size: int) -> Any:
    """``size`` rows of a batch, repeated where it has fewer."""

    def take(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t[torch.arange(size, device=t.device) % len(t)].clone()

    return tree_map(take, batch)


def _step(task: ClippedGrad, plan: Plan, parameters: dict[str, Tensor]) -> Callable[[Any], None]:
    def run(rows: Any) -> None:
        size = len(next(t for t in tree_leaves(rows) if isinstance(t, Tensor)))
        clipping = SimpleNamespace(model=task.model, loss_fn=task.loss_fn, rule=Flat(1.0))
        try:
            clip_batch(clipping, plan, parameters, rows, None, size)
        except Refused:  # a value depends on the batch size: this size gets its own plan
            clip_batch(clipping, task.plan(rows), parameters, rows, None, size)

    return run


def _moments(step: Callable[[Any], None], rows: Any, model: nn.Module) -> list[Moment]:
    given = [t for t in tree_leaves(rows) if isinstance(t, Tensor)]
    size = sum(t.numel() * t.element_size() for t in given)
    if given[0].is_cuda:
        return [("peak", size + _allocator_peak(step, rows, given[0].device))]
    live = LiveBytes()
    live.forget([given, *model.parameters(), *model.buffers()])
    with live:
        step(rows)
    return [(operation, size + alive) for operation, alive in live.moments]


def _allocator_peak(step: Callable[[Any], None], rows: Any, device: torch.device) -> int:
    step(rows)  # workspaces of libraries are made once
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(rows)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _matched(small: list[Moment], large: list[Moment]) -> list[tuple[int, int]]:
    """Bytes of the same moment at both sizes."""
    operations = [[operation for operation, _ in each] for each in (small, large)]
    blocks = difflib.SequenceMatcher(None, *operations, autojunk=False).get_matching_blocks()
    return [(small[i + k][1], large[j + k][1]) for i, j, length in blocks for k in range(length)]


def _through(sizes: tuple[int, int], first: int, second: int) -> Line:
    slope = (second - first) / (sizes[1] - sizes[0])
    return Line(first - slope * sizes[0], slope)


def _highest(lines: list[Line]) -> tuple[Line, ...]:
    """The lines that are highest at some size from one upwards."""
    best: dict[float, Line] = {}
    for line in lines:
        held = best.get(line.per_example)
        if held is None or line.fixed > held.fixed:
            best[line.per_example] = line
    upper: list[Line] = []
    for line in sorted(best.values(), key=lambda x: x.per_example):
        while upper and line.at(1) >= upper[-1].at(1):  # steeper and not lower from one on
            upper.pop()
        while len(upper) > 1 and _meet(upper[-2], line) <= _meet(upper[-2], upper[-1]):
            upper.pop()
        upper.append(line)
    return tuple(upper)


def _meet(flat: Line, steep: Line) -> float:
    return (flat.fixed - steep.fixed) / (steep.per_example - flat.per_example)
