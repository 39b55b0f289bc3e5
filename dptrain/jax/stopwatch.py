"""How long ways to clip a batch take on this device, measured for a moment and remembered.

XLA compiles a step as a whole, so steps are timed as a whole: on random numbers of the shapes at hand,
never on data. Each way costs a compilation, once for a loss, its shapes and a machine.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dptrain import __version__
from dptrain.core.processors import processor
from dptrain.core.remembered import Remembered, remembered

from . import versions

#: a way may take this much of a CPU's memory for its scratch
SHARE_OF_MEMORY = 0.5
#: of as many runs the fastest counts: what else the machine does only adds to a time
REPEATS = 3
#: seconds after which a way is not run again
LONG = 5.0


def fingerprint(jaxpr: Any, *more: Any) -> str:
    """A name for a loss: its jaxpr, without what changes from process to process."""
    text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr)) + repr(more)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def fastest(ways: dict[str, Callable], shapes: Sequence, name: str, budget: int | None) -> str:
    """The fastest of several ways, by name.

    Args:
        ways: functions by name.
        shapes: ``jax.ShapeDtypeStruct`` trees of their arguments.
        name: under which the times are remembered.
        budget: bytes of scratch memory that a way may take; the one that takes least where none fits.
    """
    memory = remembered("jax-ways", _machine())
    found = {way: _known(memory, f"{name} {way}", function, shapes) for way, function in ways.items()}
    memory.save()
    fitting = [way for way, (size, _) in found.items() if budget is None or size <= budget]
    if not fitting:
        return min(found, key=lambda way: found[way][0])
    return min(fitting, key=lambda way: found[way][1])


def _known(memory: Remembered, name: str, function: Callable, shapes: Sequence) -> tuple[float, float]:
    """Bytes and seconds, from memory where they are remembered."""
    size, seconds = f"{name} bytes", f"{name} seconds"
    if size not in memory.known or seconds not in memory.known:
        measured = _measured(function, shapes)
        if not math.isfinite(measured[1]):  # what does not fit the device today may fit it tomorrow
            return measured
        memory.known[size], memory.known[seconds] = measured
    return memory.known[size], memory.known[seconds]


def _measured(function: Callable, shapes: Sequence) -> tuple[float, float]:
    """Bytes of scratch memory and seconds; infinite where the device has not enough."""
    size = float("inf")
    try:
        step = jax.jit(function).lower(*shapes).compile()
        analysis = step.memory_analysis()
        size = float(analysis.temp_size_in_bytes if analysis is not None else 0)
        return size, _seconds(step, shapes) if _fits(size) else float("inf")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return size, float("inf")


def _seconds(step: Any, shapes: Sequence) -> float:
    arguments = jax.tree.map(_random, shapes)
    times: list[float] = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        times.append(time.perf_counter() - start)
        if times[-1] > LONG:
            break
    return min(times[1:] or times)


def _random(shape: jax.ShapeDtypeStruct) -> Any:
    """Small numbers for parameters and data alike, zeros for indices, True for masks."""
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return versions.keys_like(shape)
    if shape.dtype == bool:
        return np.ones(shape.shape, bool)
    if not jax.numpy.issubdtype(shape.dtype, jax.numpy.floating):
        return np.zeros(shape.shape, shape.dtype)
    numbers = np.random.default_rng(0).standard_normal(shape.shape, np.float32)
    return (0.1 * numbers).astype(shape.dtype)


def _fits(size: float) -> bool:
    if jax.default_backend() != "cpu":
        return True
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return size <= SHARE_OF_MEMORY * pages


def _machine() -> str:
    device = jax.devices()[0]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{__version__} {device.device_kind} {processor()} {threads} jax {jax.__version__}"
