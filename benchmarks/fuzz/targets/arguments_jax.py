"""What Python code may call dptrain with: JAX's engine, which is imported when it is first fed.

A worker is forked from a server, and a process that has loaded JAX should not be forked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz.target import Target, Wrong
from benchmarks.fuzz.targets.arguments import NUMBERS, mechanism

NAN = float("nan")
SIZE = 3


def _loss(params: Any, example: Any) -> Any:
    import jax.numpy as jnp

    x = example["x"] if isinstance(example, dict) else example[0] if isinstance(example, tuple) else example
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


def _params() -> dict[str, np.ndarray]:
    return {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "b": np.ones(3, np.float32)}


def _rows(value: float = 0.5) -> np.ndarray:
    x = np.linspace(-1, 1, SIZE * 4, dtype=np.float32).reshape(SIZE, 4)
    x[1] = value
    return x


BATCHES: tuple[tuple[str, Any], ...] = (
    ("plain", _rows()),
    ("one", _rows()[:1]),
    ("none", _rows()[:0]),
    ("scalar", np.float32(1)),
    ("number", 3.0),
    ("nan", _rows(NAN)),
    ("inf", _rows(float("inf"))),
    ("double", _rows().astype(np.float64)),
    ("integers", np.ones((SIZE, 4), np.int32)),
    ("bool", _rows() > 0),
    ("complex", _rows().astype(np.complex64)),
    ("objects", np.array([[None] * 4] * SIZE, dtype=object)),
    ("text", "batch"),
    ("nothing", None),
    ("empty tree", {}),
    ("dictionary", {"x": _rows(), "y": np.zeros(SIZE)}),
    ("pair", (_rows(), np.zeros((SIZE, 2)))),
    ("other lengths", (_rows(), np.zeros(SIZE + 1))),
    ("with a number", (_rows(), 3)),
    ("with a text", (_rows(), "name")),
    ("strided", np.linspace(-1, 1, SIZE * 8, dtype=np.float32).reshape(SIZE, 8)[:, ::2]),
)
MASKS: tuple[Any, ...] = (
    None,
    np.array([True, False, True]),
    np.zeros(SIZE, bool),
    np.ones(SIZE, bool),
    np.array([1, 0, 1]),
    np.array([1.0, 0.0, 1.0]),
    np.ones(SIZE + 1, bool),
    np.ones((SIZE, 1), bool),
    [True, False, True],
    True,
    "mask",
    {},
    object(),
)
PARAMS: tuple[Any, ...] = (
    None,
    3,
    "params",
    {},
    {"w": None},
    {"w": "x", "b": 1.0},
    {"w": np.ones((4, 3), int), "b": 1},
    {"w": np.ones((4, 3), complex), "b": np.ones(3)},
    {"w": np.array([object()]), "b": 1.0},
)


def _made(chance: random.Random) -> dict[str, int]:
    given = {"batch": chance.randrange(len(BATCHES)), "mask": 0, "params": 0, "method": chance.randrange(3)}
    for name in chance.sample(
        ("mask", "params", "clip_norm", "argnums", "batch_argnums", "rows", "memory_budget", "loss"),
        chance.choice((0, 1, 1, 2)),
    ):
        given[name] = chance.randrange(1, 200)
    return given


def _feed(given: dict[str, int], scratch: Path) -> None:
    import dptrain.jax as dpj

    method = ("per-example", "per-example-vmap", "bk-ghost")[given["method"]]
    batch_name, batch = BATCHES[given["batch"]]
    mask = MASKS[given["mask"] % len(MASKS)]
    params = PARAMS[given["params"] % len(PARAMS)] if given["params"] else _params()
    options: dict[str, Any] = {"clip_norm": 0.5, "method": method}
    for name in ("clip_norm", "argnums", "batch_argnums", "rows", "memory_budget"):
        if name in given:
            options[name] = (*NUMBERS, [0], [1, 1], (1, 2), "1")[given[name] % (len(NUMBERS) + 4)]
    losses = (
        _loss,
        None,
        3,
        "loss",
        lambda p, x: 3,
        lambda p, x: None,
        lambda p, x: p["w"],
        lambda p, x: 1.0,
    )
    loss = losses[given.get("loss", 0) % len(losses)]
    try:
        out = dpj.clipped_grad(loss, **options)(params, batch, mask=mask)
    except (ValueError, TypeError, dpj.Refused):
        raise
    except Exception as error:
        if type(error) is not _own_error(loss, params, batch):
            raise
        raise ValueError(f"The loss itself raises {type(error).__name__}.") from error
    if loss is _loss and not given["params"] and batch_name != "complex":
        _compare(out, batch, mask, float(options["clip_norm"]))


def _own_error(loss: Any, params: Any, batch: Any) -> type[BaseException] | None:
    import jax

    try:
        jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    except Exception as error:
        return type(error)
    return None


def _compare(out: Any, batch: Any, mask: Any, clip_norm: float) -> None:
    """With one example at a time, in float64."""
    x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
    x, params = np.asarray(x, np.float64), {k: v.astype(np.float64) for k, v in _params().items()}
    total = {name: np.zeros_like(value) for name, value in params.items()}
    for row, example in enumerate(x):
        if mask is not None and not np.asarray(mask)[row]:
            continue
        with np.errstate(all="ignore"):
            residual = 2 * (example @ params["w"] + params["b"]) / 3
            grads = {"w": np.outer(example, residual), "b": residual}
            norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        if not math.isfinite(norm):
            continue
        for name, gradient in grads.items():
            total[name] += gradient * min(1.0, clip_norm / max(norm, 1e-300))
    for name, value in total.items():
        if not np.allclose(np.asarray(out.grads[name]), value, rtol=1e-3, atol=1e-4 * min(1.0, clip_norm)):
            raise Wrong(f"{name} is {out.grads[name]} and should be {value}.")


def _trained(chance: random.Random) -> dict[str, int]:
    names = ("loss", "params", "optimizer", "dataset", "mechanism", "physical_batch_size", "method", "key")
    return {name: chance.randrange(1, 100) for name in chance.sample(names, chance.choice((0, 1, 1, 1, 2)))}


def _feed_trained(given: dict[str, int], scratch: Path) -> None:
    import optax

    import dptrain.jax as dpj
    from dptrain.core.entropy import Key

    rows = np.tile(_rows(), (6, 1))[:16]
    pools: dict[str, tuple[Any, ...]] = {
        "loss": (_loss, None, 3, "loss", lambda p, x: None),
        "params": (_params(), *PARAMS),
        "optimizer": (optax.sgd(0.1), None, 3, "sgd", optax.sgd, object()),
        "dataset": (
            rows,
            None,
            3,
            "data",
            [],
            {},
            (),
            rows[:15],
            rows[:0],
            {"x": rows, "y": rows[:3]},
            iter(rows),
            [rows[0]] * 16,
            {"x": rows},
        ),
        "mechanism": (
            mechanism(),
            None,
            3,
            {},
            mechanism().step(0),
            mechanism,
            mechanism(expected_batch_size=9),
        ),
        "physical_batch_size": (4, *NUMBERS),
        "method": ("per-example", "x", None, 3, "ghost"),
        "key": (Key.from_seed(1), None, 3, "key", b"k" * 32, Key, 0, False),
    }
    chosen = {name: pool[given.get(name, 0) % len(pool)] for name, pool in pools.items()}
    private = dpj.make_private(
        chosen.pop("loss"),
        chosen.pop("params"),
        chosen.pop("optimizer"),
        chosen.pop("dataset"),
        chosen.pop("mechanism"),
        **chosen,
    )
    if len(list(private.steps())) != 2:
        raise Wrong("another number of steps was taken.")


REFUSALS = (ValueError, TypeError)


def _refused(feed: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
    """JAX's `Refused` as a ValueError: to name it here would load JAX."""

    def fed(given: Any, scratch: Path) -> None:
        from dptrain.jax import Refused

        try:
            feed(given, scratch)
        except Refused as error:
            raise ValueError(str(error)) from error

    return fed


TARGETS: tuple[Target, ...] = (
    Target("jax-clipped-grad", _made, _refused(_feed), REFUSALS, 3),
    Target("jax-make-private", _trained, _refused(_feed_trained), REFUSALS, 2),
)
