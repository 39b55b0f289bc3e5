"""How long the parts of each route take for a use on this device, measured for a moment and remembered.

Whether keeping gradients or recomputing them wins depends on memory traffic as much as on arithmetic, so
operations and bytes alone do not decide it. Only shapes are timed, on random numbers: no data.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dptrain import __version__
from dptrain.core.processors import processor
from dptrain.core.remembered import Remembered, remembered

from .device_memory import ran_out_of_memory, total_memory
from .full_precision import full_precision
from .layout import Layout
from .products import onednn_is_faster
from .standardised import Standardisation
from .uses.base import squared_norm, weighted_sum
from .uses.lookup import Lookup

if TYPE_CHECKING:
    from .trace import UseFacts

#: products and additions of a use, for the whole batch, below which the cost model decides
WORTH_MEASURING = 2e8
#: kept gradients come back from memory, not from a cache: as many buffers are filled as exceed it
CACHE_BYTES = 64 * 2**20
#: one use's gradients may take this much of the device's memory
SHARE_OF_MEMORY = 0.125
#: the least of so many is taken: what else the machine does only adds to a time
REPEATS = 5


class Stopwatch:
    """Seconds by use and part of a route; one for a device and a type."""

    def __init__(self, device: torch.device, dtype: torch.dtype, remembered: Remembered | None = None):
        self.device, self.dtype = device, dtype
        self._remembered = remembered or Remembered(None)
        #: its own, so that the user's random numbers stay the same whether or not something is measured
        self._numbers = torch.Generator(device).manual_seed(0)
        self._known = self._remembered.known

    def seconds(self, fact: UseFacts, part: str, batch_size: int, standardised: bool) -> float | None:
        """What a part of a use's work takes; None for what cannot be timed by itself.

        Args:
            part: of the norm, "keep" or "drop" (materialise, to memory of its own or to scratch) or "gram";
                of the sum, "reuse" or "contract".
        """
        if fact.size is None or fact.shapes is None or not isinstance(fact.layout, Layout):
            return None
        if (
            fact.shapes[0] is None
            or fact.size.positions * fact.value.numel() * 2 * batch_size < WORTH_MEASURING
        ):
            return None
        gradients = batch_size * fact.value.numel() * self.dtype.itemsize
        if part in ("keep", "drop", "reuse") and gradients > SHARE_OF_MEMORY * total_memory(self.device):
            return float("inf")  # to try it could end the process
        name = self._name(fact, part, batch_size, standardised)
        if name not in self._known:
            try:
                with torch.no_grad(), full_precision(self.device):
                    self._known[name] = self._measure(fact, part, batch_size, standardised)
            except (RuntimeError, MemoryError) as error:
                if not ran_out_of_memory(error):
                    raise
                return float("inf")  # too large for this route now: not chosen, and not remembered
        return self._known[name]

    def remember(self) -> None:
        """Write what is new to the file, for the next run on this device."""
        self._remembered.save()

    def _name(self, fact: UseFacts, part: str, batch_size: int, standardised: bool) -> str:
        what: list[Any] = [
            fact.rule,
            tuple(fact.value),
            [None if s is None else tuple(s) for s in fact.shapes],
        ]
        what += [fact.layout, fact.channels_last, batch_size, standardised, part, self.dtype]
        return " ".join(map(str, what))

    def _measure(self, fact: UseFacts, part: str, batch_size: int, standardised: bool) -> float:
        a, g = (self._random(shape, fact.layout, batch_size) for shape in fact.shapes)
        if fact.channels_last:
            a, g = (t.contiguous(memory_format=torch.channels_last) for t in (a, g))
        if isinstance(fact.rule, Lookup):
            a = a.mul_(2**16).long().remainder_(fact.value[0])
        weights = torch.ones(batch_size, device=self.device, dtype=self.dtype)
        into = torch.zeros(fact.value, device=self.device, dtype=self.dtype)
        norms = self._standardised(fact) if standardised else None
        place = (fact.layout, batch_size)
        if part == "contract":
            return self._time([lambda: fact.rule.contract(fact.value, a, g, weights, *place, into)])
        if part == "gram" and norms:
            return self._time([lambda: norms.gram_norms(fact.rule, a, g, g, *place)])
        if part == "gram":
            return self._time([lambda: fact.rule.squared_norms(a, g, *place)])
        size = batch_size * into.numel() * into.element_size()
        count = 1 if part == "drop" else max(1, min(16, -(-CACHE_BYTES // size)))
        buffers = [into.new_zeros(batch_size, *fact.value) for _ in range(count)]
        if part == "reuse":
            return self._time([lambda b=b: weighted_sum(b, weights, into) for b in buffers])

        def fill(buffer: Tensor) -> None:
            gradients = fact.rule.example_gradients(fact.value, a, g, *place, buffer)
            norms.norms(gradients) if norms else squared_norm(gradients)

        return self._time([lambda b=b: fill(b) for b in buffers])

    def _random(self, shape: torch.Size, layout: Layout, batch_size: int) -> Tensor:
        sizes = list(shape)
        sizes[layout.axis] = layout.rows(batch_size)
        return torch.randn(sizes, device=self.device, dtype=self.dtype, generator=self._numbers)

    def _standardised(self, fact: UseFacts) -> Standardisation:
        rows = self._random(fact.value, Layout(inner=fact.value[0]), 1).flatten(1)
        return Standardisation(rows, torch.ones_like(rows[:, 0]), 0.0)

    def _time(self, works: list[Callable[[], Any]]) -> float:
        """Least seconds of one of the works, done in turn."""
        works[0]()
        samples = []
        for i in range(max(REPEATS, len(works))):
            self._finish()
            start = time.perf_counter()
            works[i % len(works)]()
            self._finish()
            samples.append(time.perf_counter() - start)
        return min(samples)

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def stopwatch(device: torch.device, dtype: torch.dtype) -> Stopwatch:
    """The one for this device, which remembers what earlier runs measured (``core/remembered.py``)."""
    if device.type == "cuda":
        name, threads = torch.cuda.get_device_name(device), ""
    else:
        name = f"{processor()} {torch.backends.cpu.get_cpu_capability()}"
        threads = f"{torch.get_num_threads()} {'oneDNN' if onednn_is_faster() else ''}"
    machine = f"{__version__} {name} {torch.__version__} {threads}"
    return Stopwatch(device, dtype, remembered("routes", machine))
