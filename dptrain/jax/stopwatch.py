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
REPEATS = 5
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
    found = {way: _known(memory, f"{name} {way}") for way in ways}
    unknown = {way: ways[way] for way, known in found.items() if known is None}
    for way, (size, seconds) in _measured(unknown, shapes).items():
        found[way] = size, seconds
        if math.isfinite(seconds):  # what does not fit the device today may fit it tomorrow
            memory.known |= {f"{name} {way} bytes": size, f"{name} {way} seconds": seconds}
    memory.save()
    fitting = [way for way, (size, _) in found.items() if budget is None or size <= budget]
    if not fitting:
        return min(found, key=lambda way: found[way][0])
    return min(fitting, key=lambda way: found[way][1])


def _known(memory: Remembered, name: str) -> tuple[float, float] | None:
    """Bytes and seconds, where they are remembered."""
    size, seconds = memory.known.get(f"{name} bytes"), memory.known.get(f"{name} seconds")
    return None if size is None or seconds is None else (size, seconds)


def _measured(ways: dict[str, Callable], shapes: Sequence) -> dict[str, tuple[float, float]]:
    """Bytes of scratch memory and seconds; infinite where the device has not enough.

    The ways take turns, so that they meet alike what else the machine does.
    """
    steps = {way: _unless_exhausted(_compiled, function, shapes) for way, function in ways.items()}
    sizes = {way: _scratch(step) if step else math.inf for way, step in steps.items()}
    running = {way: step for way, step in steps.items() if step and _fits(sizes[way])}
    times = dict.fromkeys(ways, math.inf)
    with jax.ensure_compile_time_eval():  # whoever asks may be tracing
        arguments = jax.device_put(jax.tree.map(_random, shapes)) if running else []
    for turn in range(1 + REPEATS):
        for way, step in list(running.items()):
            seconds = _unless_exhausted(_seconds, step, arguments) or math.inf
            if turn or seconds > LONG:
                times[way] = min(times[way], seconds)
            if seconds > LONG:
                del running[way]
    return {way: (sizes[way], times[way]) for way in ways}


def _compiled(function: Callable, shapes: Sequence) -> Any:
    return jax.jit(function).lower(*shapes).compile()


def _scratch(step: Any) -> float:
    analysis = step.memory_analysis()
    return float(analysis.temp_size_in_bytes if analysis is not None else 0)


def _seconds(step: Any, arguments: Sequence) -> float:
    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - start


def _unless_exhausted(function: Callable, *args: Any) -> Any:
    """Its result, or None where the device has not enough memory."""
    try:
        return function(*args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


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
