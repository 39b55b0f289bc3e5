"""How often a run of Poisson batches is compiled, and what that takes.

Three loops take the same 50 steps on the same samples, all with gradients under ``vmap``:

* ours, whose physical batches have one shape and a mask;
* the masked loop of arXiv 2406.17298, whose *logical* batches are padded to a multiple of the physical size
  and then masked: one compilation for each number of physical batches that comes up;
* the naive loop, whose last physical batch has as many examples as are left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from dptrain.core.sampling import LogicalSampler
from dptrain.models.jax import ViT

EXAMPLES, PHYSICAL, CLASSES, METHOD = 2000, 16, 100, "per-example-vmap"
MECHANISM = Mechanism.constant(
    noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.1, steps=50, expected_batch_size=0.1 * EXAMPLES
)
MODEL = ViT(192, 12, 3, image_size=32, classes=CLASSES)
ADAM = optax.adam(1e-4)


def loss(params: Any, example: tuple) -> jax.Array:
    image, label = example
    return -jax.nn.log_softmax(MODEL(params, image))[label]


def by_dptrain(params: Any, data: tuple, key: Key, masked: bool) -> int:
    """Compilations of the physical step."""
    task = dpj.make_private(
        loss, params, ADAM, data, MECHANISM,
        physical_batch_size=PHYSICAL, method=METHOD, masked=masked, key=key,
    )  # fmt: skip
    for _ in task.steps():
        pass
    return task.accumulator.compilations


def by_padded_logical_batches(params: Any, data: tuple, key: Key) -> int:
    """Compilations of the logical step."""
    clipped = dpj.clipped_grad(loss, clip_norm=1.0, method=METHOD)

    @jax.jit
    def logical(params: Any, batch: tuple, mask: jax.Array) -> dpj.ClippedSum:
        parts = jax.tree.map(lambda x: x.reshape(-1, PHYSICAL, *x.shape[1:]), (batch, mask))

        def turn(total: Any, part: tuple) -> tuple[Any, None]:
            batch, mask = part
            return jax.tree.map(jnp.add, total, clipped(params, batch, mask=mask).grads), None

        total, _ = jax.lax.scan(turn, jax.tree.map(jnp.zeros_like, params), parts)
        return dpj.ClippedSum(total, jnp.zeros(0), jnp.zeros(0), None, clipped.bound)

    private = dpj.private(ADAM)
    update = jax.jit(lambda gradient, state, params: _updated(private, gradient, state, params))
    state = private.init(params)
    sampler = LogicalSampler(EXAMPLES, MECHANISM.step(0).sampling, key.child("sampling"))
    for step in range(MECHANISM.steps):
        chosen = sampler.sample(step)
        mask = np.arange(-(-len(chosen) // PHYSICAL) * PHYSICAL) < len(chosen)
        batch = tuple(x[np.resize(chosen, len(mask))] for x in data)
        gradient = dpj.privatize(logical(params, batch, mask), MECHANISM, key.child("noise", step))
        params, state = update(gradient, state, params)
    jax.block_until_ready(params)
    return logical._cache_size()


def _updated(private: Any, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    updates, state = private.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


@contextmanager
def compiling() -> Iterator[list[float]]:
    """Seconds that JAX has traced, lowered and compiled meanwhile."""
    spent: list[float] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            spent.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield spent
    jax.monitoring.clear_event_listeners()


def measured(run: Callable[[], int]) -> dict[str, Any]:
    jax.clear_caches()
    with compiling() as spent:
        started = time.perf_counter()
        compilations = run()
        elapsed = time.perf_counter() - started
    return {"compilations": compilations, "compiling_s": sum(spent), "elapsed_s": elapsed}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jax_compilations", description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    keep_freed_memory()  # as a training run does, for all alike
    rng, key = np.random.default_rng(0), Key.from_seed(0)
    data = rng.standard_normal((EXAMPLES, 3, 32, 32), np.float32), np.arange(EXAMPLES) % CLASSES
    params = MODEL.init(jax.random.key(0))
    loops = {
        "dptrain, masked": lambda: by_dptrain(params, data, key, masked=True),
        "padded logical batches": lambda: by_padded_logical_batches(params, data, key),
        "naive": lambda: by_dptrain(params, data, key, masked=False),
    }
    with Quiet() as quiet:
        results = {name: measured(run) for name, run in loops.items()}
    for name, r in results.items():
        print(
            f"{name:<24} {r['compilations']:3} compilations, {r['compiling_s']:6.1f} s compiling of "
            f"{r['elapsed_s']:6.1f} s"
        )
    where = environment(jax.default_backend())
    where["versions"] = {n: version_of(n) for n in ("jax", "jaxlib", "optax", "numpy")}
    where["command"] = command("benchmarks.jax_compilations")
    case = {
        "name": "vit-tiny at 32 pixels", "batch_size": PHYSICAL, "examples": EXAMPLES,
        "device": jax.default_backend(), "steps": MECHANISM.steps, "sample_rate": 0.1, "method": METHOD,
    }  # fmt: skip
    record = {
        "kind": "compilations in JAX", "case": case, "environment": where, "quiet": quiet.record(),
        "loops": results,
    }  # fmt: skip
    save(record, given.out)


if __name__ == "__main__":
    main()
