"""Contestants of JAX: ordinary training, batched and scanned, dptrain's methods, and jax-privacy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from dptrain.bench.contestant import Contestant, accounted
from dptrain.bench.jax_task import PRODUCTS, JaxTask

LEARNING_RATE = 1e-4
#: of the clipped sum, relative, in float32: see ``dptrain.bench.exactness``
TOLERANCE = 1e-2

#: ``(params, batch, mask) -> gradients`` like the parameters
Step = Callable[[Any, Any, Any], Any]


def baselines(task: JaxTask) -> dict[str, Callable[[], Contestant]]:
    """Ways of ordinary training by name, as functions that set them up: what is best depends on the model."""
    size = task.case.batch_size
    rows = [None, *(r for r in (1, 4) if size > r and size % r == 0)]
    names = {r: "non-private batched" if r is None else f"non-private scanned {r}" for r in rows}
    return {name: lambda r=r, name=name: _ordinary(task, name, r) for r, name in names.items()}


def private(task: JaxTask) -> Contestant:
    """dptrain by a method of its table."""
    import dptrain.jax as dpj

    clipped = dpj.clipped_grad(task.loss, clip_norm=task.clip_norm, method=task.case.method)
    return with_noise(
        task, f"jax {task.case.method}", lambda params, batch, mask: clipped(params, batch, mask=mask).grads
    )


def with_noise(task: JaxTask, name: str, gradients: Step) -> Contestant:
    """A contestant whose clipped sums are made private by dptrain's noise."""
    import jax.numpy as jnp
    import optax

    import dptrain.jax as dpj
    from dptrain.core.entropy import Key

    mechanism = accounted(task)
    key, taken, none = Key.from_entropy(), iter(range(10**9)), jnp.zeros(0)

    def noisy(total: Any) -> Any:
        summed = dpj.ClippedSum(total, none, none, None, task.clip_norm)
        return dpj.privatize(summed, mechanism, key.child(next(taken)), donate=True)

    return _contestant(task, name, "case", gradients, dpj.private(optax.adam(LEARNING_RATE)), noisy)


def _ordinary(task: JaxTask, name: str, rows: int | None) -> Contestant:
    """Gradients of ``rows`` examples at a time, added in a scan; of the whole batch at once for None."""
    import jax
    import jax.numpy as jnp
    import optax

    def of(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jax.vmap(task.loss, (None, 0))(p, batch)))(params)

    def gradients(params: Any, batch: Any, mask: Any) -> Any:
        if rows is None:
            return of(params, batch)
        parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), batch)

        def turn(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, of(params, part)), None

        return jax.lax.scan(turn, jax.tree.map(jnp.zeros_like, params), parts)[0]

    divided = jax.jit(lambda total: jax.tree.map(lambda g: g / task.logical_batch_size, total))
    return _contestant(task, name, "baseline", gradients, optax.adam(LEARNING_RATE), divided)


def _contestant(
    task: JaxTask,
    name: str,
    role: Any,
    gradients: Step,
    optimizer: Any,
    released: Callable[[Any], Any],
) -> Contestant:
    """``released`` makes of a sum what the optimizer takes."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    params, batch = task.params, task.batch
    everyone = jax.device_put(np.ones(task.case.batch_size, bool), task.device)
    with jax.default_matmul_precision(PRODUCTS[task.case.precision]):

        def more(total: Any, params: Any, batch: Any, mask: Any) -> Any:
            return jax.tree.map(jnp.add, total, gradients(params, batch, mask))

        added = jax.jit(more, donate_argnums=0).lower(params, params, batch, everyone).compile()
    zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, params))

    @jax.jit
    def apply(gradient: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, total = optimizer.init(params), None

    def step() -> None:
        nonlocal total
        total = added(zeros() if total is None else total, params, batch, everyone)
        jax.block_until_ready(total)

    def end() -> None:
        nonlocal total
        jax.block_until_ready(apply(released(total), state, params))
        total = None

    def clipped_sum(n: int) -> dict[str, Any]:
        return added(zeros(), params, batch, jnp.arange(task.case.batch_size) < n)

    return Contestant(name, role, step, end, None if role == "baseline" else clipped_sum)


def median_norm(task: JaxTask) -> float:
    """The median norm of the batch's single-example gradients: half of them are clipped there."""
    import optax

    return statistics.median(float(optax.tree.norm(task.gradient(task.params, e))) for e in task.examples())


def judge(contestant: Contestant, task: JaxTask) -> dict[str, Any]:
    """How far the clipped sum is from that of single examples, relative."""
    import numpy as np
    import optax

    assert contestant.clipped_sum is not None
    total = {name: np.zeros(p.shape) for name, p in task.params.items()}
    for example in task.examples():
        g = task.gradient(task.params, example)
        factor = min(1.0, task.clip_norm / (float(optax.tree.norm(g)) + contestant.stabiliser))
        for name, x in g.items():
            total[name] += factor * np.asarray(x, np.float64)
    error = _distance(contestant.clipped_sum(task.case.batch_size), total)
    wrong = not error <= TOLERANCE
    return {
        "verdict": "WRONG" if wrong else "exact",
        "error_of_sum": error if math.isfinite(error) else None,
        "sentence": f"The relative error of the clipped sum is {error:.1e}." if wrong else None,
    }


def trains(task: JaxTask) -> dict[str, Any]:
    """Gradients are by the parameters' tree: none can be left out."""
    count = sum(p.size for p in task.params.values())
    return {"parameters": count, "of": count, "skipped": []}


def _distance(found: dict[str, Any], expected: dict[str, Any]) -> float:
    import numpy as np

    squared = sum(float(((np.asarray(found[n], np.float64) - e) ** 2).sum()) for n, e in expected.items())
    return (squared / sum(float((e**2).sum()) for e in expected.values())) ** 0.5
