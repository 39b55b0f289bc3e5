"""One profiled step as a line of sections, with the time that each took and the memory that it left."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from dptrain.bench.contestant import Contestant
from dptrain.torch.sections import PREFIX, section

#: in the order of a step
SECTIONS = ("data", "forward", "backward", "norms", "clip and accumulate", "noise", "optimizer step")


@dataclass(frozen=True)
class Section:
    """A stretch of a step.

    Attributes:
        start, end: nanoseconds.
        alone_s: seconds, without those of the sections within it.
        before, after, peak: bytes of tensors alive, beside those that were there before the step.
    """

    name: str
    start: int
    end: int
    alone_s: float
    before: int
    after: int
    peak: int


def profiled(
    contestant: Contestant,
    device: str,
    trace: Path | None = None,
    fetch: Callable[[], object] = lambda: None,
    memory: bool = False,
) -> list[Section]:
    """The sections of a logical step of one physical one, in the order in which they begin.

    trace: a file for chrome://tracing, Perfetto or TensorBoard.
    fetch: gets a batch, which is the section ``data``.
    memory: whether to see memory as well, which takes its time.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.startswith("cuda")
    with profile(activities=activities, profile_memory=memory) as profiler:
        with section("data"):
            fetch()
        contestant.step()
        contestant.end()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    assert profiler.profiler is not None
    return sections(profiler.profiler.kineto_results.events(), device)


def sections(events: Sequence[Any], device: str) -> list[Section]:
    """From a profiler's events; see `profiled`."""
    kind = "CUDA" if device.startswith("cuda") else "CPU"
    memory, marks = [], []
    for event in events:
        name = event.name()
        if name == "[memory]" and str(event.device_type()).endswith(kind):
            memory.append((event.start_ns(), event.nbytes()))
        elif name.startswith(PREFIX) and str(event.device_type()).endswith("CPU"):
            marks.append((event.start_ns(), event.start_ns() + event.duration_ns(), name[len(PREFIX) :]))
    memory.sort(key=lambda moment: moment[0])
    marks.sort(key=lambda mark: (mark[0], -mark[1]))
    return [_section(mark, _within(i, marks), memory) for i, mark in enumerate(marks)]


def seconds_by_section(steps: Sequence[Sequence[Section]]) -> dict[str, list[float]]:
    """Seconds of each section, one for each step."""
    return {
        name: [sum(s.alone_s for s in step if s.name == name) for step in steps]
        for name in SECTIONS
        if any(s.name == name for step in steps for s in step)
    }


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """Of each section."""
    return {name: statistics.median(values) for name, values in samples.items()}


def _within(index: int, marks: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """The sections directly within one, whose end is before its own."""
    _, end, _ = marks[index]
    inside, reached = [], 0
    for mark in marks[index + 1 :]:
        if mark[0] >= end:
            break
        if mark[0] >= reached:
            inside.append(mark)
            reached = mark[1]
    return inside


def _section(mark: tuple[int, int, str], inside: list, memory: list[tuple[int, int]]) -> Section:
    start, end, name = mark
    alive = before = after = peak = 0
    for moment, size in memory:
        if moment < start:
            before = alive + size
        elif moment > end:
            break
        alive += size
        peak = max(peak, alive) if moment >= start else peak
        after = alive
    alone = (end - start) - sum(e - s for s, e, _ in inside)
    return Section(name, start, end, alone * 1e-9, before, after, max(peak, before))
