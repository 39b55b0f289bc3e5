"""One case: compile, check and time all contestants in one process, and make a record of it.

All take turns, in a new order each time: a step is slower after some than after others. A contestant's time
is that of a physical step plus a sixteenth of the end of a logical one (the optimizer, and the noise of the
private ones), and its ratio is the best non-private time over its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dptrain.jax as dpj
from benchmarks.record import command, save
from dptrain import Mechanism
from dptrain.bench.environment import Quiet, environment, version_of
from dptrain.core.allocation import keep_freed_memory
from dptrain.core.entropy import Key

from .cases import CASES, Case
from .contestants import enter

ORDINARY = ("non-private batched", "non-private scanned 1", "non-private scanned 4")
ACCUMULATE = 16
LEAST_ROUNDS = 5


def sum_of_single_examples(case: Case, params: Any, batch: Any, clip_norm: float) -> tuple[Any, list[float]]:
    """The oracle, in the types that are given: one example after another."""
    gradient = jax.jit(jax.grad(case.loss))
    total, norms = jax.tree.map(jnp.zeros_like, params), []
    for b in range(len(batch[1])):
        g = gradient(params, jax.tree.map(lambda x: x[b], batch))  # noqa: B023
        norms.append(float(optax.tree.norm(g)))
        total = jax.tree.map(lambda t, x: t + min(1.0, clip_norm / norms[-1]) * x, total, g)
    return total, norms


def difference(found: Any, expected: Any) -> float:
    """Relative, over all parameters, in float64."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    ]
    return float(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)) ** 0.5


def in_float64(case: Case, method: str) -> float:
    """How far a method is off on three examples of the full model: nothing but a wrong formula shows."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: p.astype(jnp.float64), case.init(jax.random.key(0)))
        images, labels = case.batch(3)
        batch = images.astype(jnp.float64), labels
        _, norms = sum_of_single_examples(case, params, batch, 1.0)
        clip_norm = statistics.median(norms)
        expected, _ = sum_of_single_examples(case, params, batch, clip_norm)
        out = dpj.clipped_grad(case.loss, clip_norm=clip_norm, method=method)(params, batch)
        return difference(out.grads, expected)


def endings(params: Any, clip_norm: float) -> dict[bool, Callable[[Any], Any]]:
    """The end of a logical step, private and not: noise, Adam."""
    mechanism = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=clip_norm, sample_rate=0.5, steps=1, expected_batch_size=256
    )
    adam, noisy = optax.adam(1e-4), dpj.private(optax.adam(1e-4))
    state, key, drawn = adam.init(params), Key.from_entropy(), iter(range(10**9))

    @jax.jit
    def ordinary(total: Any, state: Any, params: Any) -> Any:
        updates, state = adam.update(jax.tree.map(lambda g: g / 256, total), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def private(gradient: dpj.PrivateGradient, state: Any, params: Any) -> Any:
        updates, state = noisy.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    def end(total: Any) -> Any:
        summed = dpj.ClippedSum(total, jnp.zeros(0), jnp.zeros(0), None, clip_norm)
        return private(dpj.privatize(summed, mechanism, key.child(next(drawn))), state, params)

    return {False: lambda total: ordinary(total, state, params), True: end}


def measure(case: Case, methods: list[str], size: int, limit_s: float, say: Callable[[str], None]) -> dict:
    """The record."""
    keep_freed_memory()  # as a training run does, for all alike
    params, batch = case.init(jax.random.key(0)), case.batch(size)
    mask = jnp.ones(size, bool)
    _, norms = sum_of_single_examples(case, params, batch, 1.0)
    clip_norm = statistics.median(norms)
    expected, _ = sum_of_single_examples(case, params, batch, clip_norm)
    ends = endings(params, clip_norm)
    results: dict[str, dict] = {}
    steps: dict[str, Any] = {}
    for name in (*ORDINARY, *methods):
        if name == ORDINARY[2] and (size % 4 or size == 4):
            continue
        started = time.perf_counter()
        try:
            steps[name] = jax.jit(enter(case, name, clip_norm)).lower(params, batch, mask).compile()
        except Exception as error:
            results[name] = {"status": "error", "sentence": str(error).strip().split("\n")[0][:300]}
            say(f"  {name:<24} {results[name]['sentence']}")
            continue
        memory = steps[name].memory_analysis()
        result = {
            "status": "ok",
            "kind": "non-private" if name in ORDINARY else "peer" if name == "jax-privacy" else "dptrain",
            "compile_s": time.perf_counter() - started,
            "peak_bytes": memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes,
            "raw_later_physical_step_s": [],
            "raw_end_of_logical_step_s": [],
        }
        total = steps[name](params, batch, mask)
        if name not in ORDINARY:
            result["as_timed"] = difference(total, expected)
        jax.block_until_ready(ends[name not in ORDINARY](total))
        results[name] = result
    with Quiet() as quiet:
        started, rounds, order = time.perf_counter(), 0, random.Random(0)
        while rounds < LEAST_ROUNDS or time.perf_counter() - started < limit_s:
            for name in order.sample(list(steps), len(steps)):
                before = time.perf_counter()
                total = jax.block_until_ready(steps[name](params, batch, mask))
                between = time.perf_counter()
                jax.block_until_ready(ends[name not in ORDINARY](total))
                after = time.perf_counter()
                results[name]["raw_later_physical_step_s"].append(between - before)
                results[name]["raw_end_of_logical_step_s"].append(after - between)
            rounds += 1
    summarise(results)
    for name in methods:
        if results[name]["status"] == "ok" and results[name]["kind"] == "dptrain":
            results[name]["float64"] = {"error_of_sum": in_float64(case, name)}
    where = environment(jax.default_backend())
    where["versions"] = {n: version_of(n) for n in ("jax", "jaxlib", "optax", "jax-privacy", "numpy")}
    where["command"] = command("benchmarks.jax_speed")
    return {
        "kind": "speed in JAX",
        "case": {
            "name": case.name,
            "batch_size": size,
            "device": jax.default_backend(),
            "precision": "fp32",
            "accumulate": ACCUMULATE,
        },
        "environment": where,
        "quiet": quiet.record(),
        "baseline": min((n for n in ORDINARY if n in steps), key=lambda n: results[n]["logical_step_s"]),
        "contestants": results,
    }


def summarise(results: dict[str, dict]) -> None:
    """Ratios of medians, and quartiles of the ratios within rounds."""
    fit = {n: r for n, r in results.items() if r["status"] == "ok"}

    def whole(r: dict, i: int | None = None) -> float:
        step, end = r["raw_later_physical_step_s"], r["raw_end_of_logical_step_s"]
        if i is None:
            return ACCUMULATE * statistics.median(step) + statistics.median(end)
        return ACCUMULATE * step[i] + end[i]

    for r in fit.values():
        r["logical_step_s"] = whole(r)
    base = min((fit[n] for n in ORDINARY if n in fit), key=whole)
    for r in fit.values():
        paired = [whole(base, i) / whole(r, i) for i in range(len(r["raw_later_physical_step_s"]))]
        low, _, high = statistics.quantiles(paired, n=4)
        r |= {"ratio_to_non_private": whole(base) / whole(r), "quartiles_of_paired_ratios": [low, high]}
        r["memory_ratio"] = r["peak_bytes"] / fit[ORDINARY[0]]["peak_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jax_speed", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--method", default="auto,per-example-vmap,jax-privacy")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    case = CASES[given.case]
    record = measure(
        case, given.method.split(","), given.batch or case.batch_size, given.seconds, lambda s: print(s)
    )
    print(f"{case.name}, batch {record['case']['batch_size']}, fp32 on {record['case']['device']}")
    for name, r in record["contestants"].items():
        if r["status"] != "ok":
            continue
        low, high = r["quartiles_of_paired_ratios"]
        exact = f", exact {r['float64']['error_of_sum']:.0e}" if "float64" in r else ""
        print(
            f"  {name:<24} {1e3 * statistics.median(r['raw_later_physical_step_s']):8.1f} ms a step, "
            f"{1e3 * statistics.median(r['raw_end_of_logical_step_s']):6.1f} ms to end, ratio "
            f"{r['ratio_to_non_private']:.3f} ({low:.3f} to {high:.3f}), {r['peak_bytes'] / 2**20:6.0f} MiB, "
            f"compiled in {r['compile_s']:.0f} s{exact}"
            + (f", as timed {r['as_timed']:.0e}" if "as_timed" in r else "")
        )
    print(f"  others took {100 * (record['quiet']['cpu_share_of_others'] or 0):.0f}% of the cores")
    save(record, given.out)


if __name__ == "__main__":
    main()
