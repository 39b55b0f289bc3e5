"""The engine on a mesh of four fake devices: sums, steps and noise are those of one device.

All methods on four devices with whole parameters, and with sharded ones those that differ most; the whole
product, with one and two devices, is marked slow.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dptrain.jax as dpj
from dptrain import Mechanism
from dptrain.core import methods
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.jax import noise
from dptrain.jax.release import OfAnyStep

from . import oracle

ALL = [row.name for row in methods.TABLE]
LAYOUTS = pytest.mark.parametrize("shard_params", [False, True], ids=["replicated", "sharded"])
SHARDED = pytest.mark.parametrize(
    "shard_params",
    [pytest.param(False, id="replicated", marks=pytest.mark.slow), pytest.param(True, id="sharded")],
)
KEY = Key.from_seed(7)
CLIP_NORM = 0.5
MECHANISM = Mechanism.constant(
    noise_multiplier=1.0, clip_norm=CLIP_NORM, sample_rate=0.25, steps=5, expected_batch_size=10, delta=1e-5
)
# Two physical batches of four devices with two rows each. Of the first, the second device has no real
# example; of the second only the first has one.
MASK = np.array([1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
ROWS = 8


def mesh(devices: int) -> jax.sharding.Mesh:
    if len(jax.devices()) < 4:
        pytest.fail("JAX was started before tests/jax_engine/conftest.py could ask for four devices.")
    return jax.make_mesh((devices,), ("devices",), devices=jax.devices()[:devices])


def loss(p, e):
    h = jnp.tanh(e["x"] @ p["w"] + p["b"])
    return jnp.sum((h @ p["v"] + p["c"] - e["y"]) ** 2)


@functools.cache
def problem(dtype: str = "float64", size: int = len(MASK)):
    """Parameters, of which c has no dimension that 2 or 4 divides, and examples."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    params = {"w": normal(5, 8), "b": normal(8), "v": normal(8, 3), "c": normal(3)}
    return params, {"x": normal(size, 2, 5), "y": normal(size, 2, 3)}


def clipped_grad(method: str, devices: int, shard_params: bool = False, **options) -> dpj.ClippedGrad:
    given = {"clip_norm": CLIP_NORM, "method": method, "mesh": mesh(devices), "shard_params": shard_params}
    return dpj.clipped_grad(loss, **(given | options))


def pieces(batch, mask):
    """As they come from the host; masked rows hold what no sum survives, or what does not show."""
    others = np.where(np.arange(len(mask)) % 2, np.nan, 3.0)
    hostile = jax.tree.map(lambda x: np.where(mask[:, None, None], x, others[:, None, None]), batch)
    for i in range(0, len(mask), ROWS):
        yield jax.tree.map(lambda x: x[i : i + ROWS], hostile), mask[i : i + ROWS]  # noqa: B023


@functools.cache
def expected(is_private: bool):
    """The sum by single examples."""
    params, batch = problem()
    return oracle.clipped_sum(loss, params, batch, CLIP_NORM if is_private else float("inf"), MASK)[0]


@functools.cache
def noise_of_one_device(dtype: str = "float64"):
    params, _ = problem(dtype)
    nothing = jax.device_put(
        jax.tree.map(np.zeros_like, params), jax.NamedSharding(mesh(1), jax.sharding.PartitionSpec())
    )
    return noise.noisy_mean(nothing, CLIP_NORM, MECHANISM.expected_batch_size, KEY)


def error(found, wanted) -> float:
    """The largest difference, relative to the largest element of each leaf."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / (np.abs(b).max() or 1)) for a, b in pairs)


def check_step(out: dpj.ClippedSum, total, dtype: str, tolerance: float) -> None:
    assert error(out.grads, total) < tolerance
    gradient = dpj.privatize(out, MECHANISM, KEY)
    z = noise_of_one_device(dtype)
    noisy = jax.tree.map(lambda s, z: s / MECHANISM.expected_batch_size + z, total, z)
    assert error(gradient.grads, noisy) < tolerance


def _cases():
    for method in ALL:
        for devices in (1, 2, 4):
            for shard_params in (False, True):
                is_quick = devices == 4 and (
                    not shard_params or method in ("per-example-loop", "ghost", "auto")
                )
                name = f"{method}-{devices}-{'sharded' if shard_params else 'replicated'}"
                marks = [] if is_quick else pytest.mark.slow
                yield pytest.param(method, devices, shard_params, id=name, marks=marks)


@pytest.mark.parametrize(("method", "devices", "shard_params"), list(_cases()))
def test_sums_and_steps_are_those_of_one_device(method, devices, shard_params):
    params, batch = problem()
    accumulator = dpj.Accumulator(clipped_grad(method, devices, shard_params))
    out = accumulator(params, pieces(batch, MASK))
    total = expected(method != "non-private")
    if method == "non-private":
        assert error(out.grads, total) < 1e-12
        return
    check_step(out, total, "float64", 1e-12)
    nobody = np.zeros(ROWS, bool)
    empty = accumulator(params, pieces(jax.tree.map(lambda x: x[:ROWS], batch), nobody))
    check_step(empty, jax.tree.map(np.zeros_like, params), "float64", 1e-12)
    assert accumulator.compilations == 1


@SHARDED
def test_in_float32(shard_params):
    params, batch = problem("float32")
    out = dpj.Accumulator(clipped_grad("bk-mix-opt", 4, shard_params))(params, pieces(batch, MASK))
    assert {x.dtype for x in jax.tree.leaves(out.grads)} == {jnp.dtype("float32")}
    total = jax.tree.map(lambda x: np.asarray(x, np.float32), expected(True))
    check_step(out, total, "float32", 1e-5)


COLLECTIVES = re.compile(
    r"= \w+\[([\d,]*)\]\S* (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\("
)


def sent(step, *args) -> dict[str, int]:
    """By collective operation: elements that each device gets from it, in the compiled program."""
    found: dict[str, int] = {}
    for shape, name in COLLECTIVES.findall(step.lower(*args).compile().as_text()):
        size = int(np.prod([int(n) for n in shape.split(",") if n]))
        found[name] = found.get(name, 0) + size
    return found


@LAYOUTS
def test_what_devices_tell_each_other(shard_params):
    """Replicated: nothing for a physical batch; for a logical one each gradient is reduced once and each
    parameter gathered once. Sharded: one of each for a physical batch, and nothing for a logical one, but for
    the parameter that does not divide."""
    params, batch = problem()
    task = dpj.make_private(
        loss, params, optax.adam(0.1), batch, _mechanism(), physical_batch_size=2, mesh=mesh(4),
        shard_params=shard_params, key=KEY,
    )  # fmt: skip
    accumulator, clipped = task.accumulator, task.accumulator.clipped
    args, mask = clipped.checked((params, *[b for b, _ in list(pieces(batch, MASK))[:1]]), MASK[:ROWS])
    total = accumulator.zeros(params)
    out = accumulator.finish(total)
    divided, rest = 5 * 8 + 8 + 8 * 3, 3
    gradient = dpj.privatize(out, MECHANISM, KEY)
    for_a_physical_batch = sent(
        accumulator._add, accumulator.zeros(params).grads, args, mask, clipped.thresholds
    )
    for_a_logical_batch = sent(accumulator._finish, accumulator.zeros(params).grads)
    for_a_step = sent(task._apply, task.params, task.optimizer_state, OfAnyStep(gradient))
    of_noise = sent(noise._drawn, out.grads, noise.noise_words(KEY), 1.0, 1.0)
    if shard_params:
        assert for_a_physical_batch == {"all-gather": divided, "reduce-scatter": divided // 4}
        assert for_a_logical_batch == {"all-reduce": rest}
        assert for_a_step == {}
    else:
        assert for_a_physical_batch == {}
        assert for_a_logical_batch == {"reduce-scatter": divided // 4, "all-reduce": rest}
        assert for_a_step == {"all-gather": divided}
    assert of_noise == {}
    for tree in (gradient.grads, task.optimizer_state, *[task.params] * shard_params):
        for x in jax.tree.leaves(tree):
            held = {shard.data.size for shard in x.addressable_shards}
            assert held == {x.size // 4 if x.size % 4 == 0 else x.size}


def _mechanism(**options):
    given = {
        "noise_multiplier": 1.0, "clip_norm": CLIP_NORM, "sample_rate": 0.5, "steps": 6,
        "expected_batch_size": len(MASK) / 2,
    }  # fmt: skip
    return Mechanism.constant(**(given | options))


def zeros_on(devices: int, *shape: int):
    """A sum of nothing, as it lies on a mesh."""
    params = {"w": np.zeros(shape, np.float32)}
    clipped = dpj.clipped_grad(
        lambda p, e: jnp.sum(p["w"] * e), clip_norm=1.0, method="per-example-loop", mesh=mesh(devices)
    )
    accumulator = dpj.Accumulator(clipped)
    return accumulator.finish(accumulator.zeros(params)).grads


def test_noise_is_drawn_once_and_each_device_draws_its_own():
    """The variance over all devices is (sigma C)^2 / L^2: with 2^18 numbers its estimate has a standard
    deviation of 0.28 %, so that 2 % is exceeded by chance with probability 5e-13, and a factor of 1.05 is
    seen with certainty."""
    shape, stddev, batch_size = (2**9, 2**9), 3.0, 2.0
    drawn = {n: noise.noisy_mean(zeros_on(n, *shape), stddev, batch_size, KEY)["w"] for n in (1, 2, 4)}
    z = np.asarray(drawn[4], np.float64)
    for n in (1, 2):
        np.testing.assert_allclose(drawn[n], z, rtol=1e-6, atol=1e-6)
    assert abs(np.mean(z**2) / (stddev / batch_size) ** 2 - 1) < 0.02
    assert abs(np.mean(z)) < 5 * stddev / batch_size / 2**9
    shards = [np.asarray(shard.data).reshape(-1) for shard in drawn[4].addressable_shards]
    assert len(shards) == 4 and sum(map(len, shards)) == z.size
    for i in range(4):
        assert abs(np.mean(shards[i] ** 2) / (stddev / batch_size) ** 2 - 1) < 0.04  # as unlikely
        for j in range(i):  # not the same noise, nor the same in part: 6 standard deviations
            assert abs(np.corrcoef(shards[i], shards[j])[0, 1]) < 6 / len(shards[i]) ** 0.5
    compiled = noise._drawn.lower(zeros_on(4, *shape), noise.noise_words(KEY), 1.0, 1.0).compile().as_text()
    assert "[128,512]" in compiled and "[512,512]" not in compiled


@pytest.mark.parametrize("is_partitionable", [False, True])
def test_noise_is_the_same_whatever_the_users_setting(is_partitionable):
    with jax.threefry_partitionable(is_partitionable):
        drawn = noise.noisy_mean(zeros_on(4, 6, 8), 1.0, 1.0, KEY)["w"]
    np.testing.assert_array_equal(drawn, noise.noisy_mean(zeros_on(4, 6, 8), 1.0, 1.0, KEY)["w"])


def train(devices: int, shard_params: bool, **options):
    params, batch = problem("float32")
    return dpj.make_private(
        loss, params, optax.adam(0.1), batch, _mechanism(), physical_batch_size=2, method="bk-mix-opt",
        shard_params=shard_params, **({"mesh": mesh(devices), "key": KEY} | options),
    )  # fmt: skip


@functools.cache
def trained_on_one():
    task = train(1, False)
    list(task.steps())
    return jax.tree.map(np.asarray, task.params)


@pytest.mark.parametrize(("devices", "shard_params"), [(2, True), (4, False)])
def test_training_is_the_same_on_any_number_of_devices(devices, shard_params):
    task = train(devices, shard_params)
    assert len(list(task.steps())) == 6
    assert task.accumulator.compilations == task._apply._cache_size() == 1
    for name, x in trained_on_one().items():
        np.testing.assert_allclose(task.params[name], x, atol=1e-5)


@SHARDED
def test_an_interrupted_training_goes_on(tmp_path, shard_params):
    with Ledger.create(tmp_path / "ledger", dataset="made up") as ledger:
        task = train(4, shard_params, ledger=ledger)
        taking = task.steps()
        next(taking), next(taking)
        saved = jax.tree.map(np.array, (task.params, task.optimizer_state))
        next(taking)
    with Ledger.open(tmp_path / "ledger") as ledger:
        again = train(4, shard_params, ledger=ledger, taken=2)
        again.params, again.optimizer_state = saved
        assert len(list(again.steps())) == 4
        assert len(ledger.releases) == 6  # the third was repeated bit for bit
    for name, x in trained_on_one().items():
        np.testing.assert_allclose(again.params[name], x, atol=1e-5)


@SHARDED
def test_buffers_and_single_batches(shard_params):
    params, batch = problem()
    clipped = clipped_grad("auto", 4, shard_params)
    out = jax.jit(lambda *a: dpj.accumulate(clipped, *a, physical_batch_size=8))(params, batch, MASK)
    assert error(out.grads, expected(True)) < 1e-12
    once = clipped(params, batch, mask=MASK)
    assert error(once.grads, expected(True)) < 1e-12
    np.testing.assert_allclose(out.norms, once.norms, rtol=1e-12)
    np.testing.assert_allclose(out.losses, once.losses, rtol=1e-12)
    assert clipped.plan(params, batch).rows == 4  # of each device


def test_meshes_of_several_axes_and_what_the_loss_is_given_besides():
    def with_more(frozen, params, x, y):
        return loss(params, {"x": x * frozen, "y": y}), {"x": x}

    params, batch = problem()
    grid = jax.make_mesh((2, 2), ("hosts", "chips"), devices=jax.devices()[:4])
    clipped = dpj.clipped_grad(
        with_more, clip_norm=CLIP_NORM, argnums=1, batch_argnums=(2, 3), has_aux=True, mesh=grid,
        shard_params=True, method="bk-ghost",
    )  # fmt: skip
    out = clipped(1.0, params, batch["x"], batch["y"], mask=MASK)
    assert error(out.grads, expected(True)) < 1e-12
    np.testing.assert_array_equal(np.asarray(out.aux["x"])[MASK], batch["x"][MASK])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": jax.sharding.AbstractMesh((4,), ("devices",))}, "must be a jax.sharding.Mesh"),
        ({"mesh": None}, "pass mesh="),
        ({"mesh": "four"}, "must be a jax.sharding.Mesh"),
        ({"masked": False}, "one device"),
    ],
)
def test_make_private_refuses(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(4, True, **change)


def test_a_context_that_types_arrays_by_their_sharding_is_refused():
    with jax.set_mesh(mesh(4)), pytest.raises(ValueError, match="outside of it"):
        train(4, False)


def test_batches_that_do_not_divide_are_refused():
    params, batch = problem()
    clipped = clipped_grad("auto", 4)
    six = jax.tree.map(lambda x: x[:6], batch)
    with pytest.raises(ValueError, match="cannot be divided among 4 devices"):
        clipped(params, six)
    with pytest.raises(ValueError, match="cannot be divided among 4 devices"):
        dpj.accumulate(
            clipped, params, jax.tree.map(lambda x: x[:12], batch), MASK[:12], physical_batch_size=6
        )


def test_what_is_not_added_up_cannot_be_released():
    params, batch = problem()
    accumulator = dpj.Accumulator(clipped_grad("per-example-loop", 4))
    part = accumulator.add(accumulator.zeros(params), params, batch, mask=MASK)
    with pytest.raises(TypeError, match="PartialSum"):
        dpj.privatize(part, MECHANISM, KEY)
    assert error(accumulator.finish(part).grads, expected(True)) < 1e-12
