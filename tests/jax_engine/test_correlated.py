"""The noise that steps release, alone and on a mesh, and its way through make_private."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import dptrain.jax as dpj
from dptrain.core.correlated import correlated, square_root
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.jax.noise import noisy_mean
from dptrain.jax.placement import placement
from dptrain.optim.with_optax import build_optax

STEPS = 8
MECHANISM = correlated(
    bands=4,
    steps=STEPS,
    clip_norm=1.0,
    sample_rate=0.1,
    expected_batch_size=4.0,
    delta=1e-5,
    noise_multiplier=1.5,
)
LIKE = {"w": jnp.zeros((4, 8), jnp.float32), "b": jnp.zeros(8, jnp.float64)}
DATA = np.random.default_rng(0).standard_normal((40, 4))
KEY = Key.from_seed(1)


def key_of(index: int) -> Key:
    return Key.from_seed(5).child("noise", index)


def on_devices(count: int):
    """LIKE alone, or in shards."""
    if not count:
        return LIKE
    place = placement(Mesh(np.array(jax.devices()[:count]), ("devices",)), True)
    return place.put_shards(LIKE)


def drawn(like, steps: int = STEPS) -> list:
    noise = dpj.CorrelatedNoise(square_root(4))
    return [noise.next(like, MECHANISM.step(i), key_of(i)) for i in range(steps)]


@pytest.mark.parametrize("devices", [0, 4])
def test_c_times_the_noise_is_the_independent_noise_of_the_steps(devices):
    like, c = on_devices(devices), square_root(4)
    found = drawn(like)
    for t in range(STEPS):
        spec = MECHANISM.step(t)
        want = noisy_mean(like, spec.noise_stddev, spec.expected_batch_size, key_of(t))
        for name, w in want.items():
            back = sum(c[j] * found[t - j][name] for j in range(min(4, t + 1)))
            np.testing.assert_allclose(back, w, rtol=1e-4, atol=1e-5)
            assert found[t][name].sharding.is_equivalent_to(like[name].sharding, w.ndim)


def test_it_is_the_same_on_any_number_of_devices():
    for one, four in zip(drawn(on_devices(1)), drawn(on_devices(4)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, four)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn():
    noise = dpj.CorrelatedNoise(square_root(4), 5, key_of)
    for index, want in enumerate(drawn(LIKE)[5:], 5):
        again = noise.next(LIKE, MECHANISM.step(index), key_of(index))
        jax.tree.map(np.testing.assert_array_equal, again, want)


def begin(params=None, **options):
    params = {"w": jnp.ones(4)} if params is None else params
    loss = lambda p, example: jnp.sum((example @ p["w"]) ** 2)  # noqa: E731
    options = {"optimizer": optax.sgd(0.1), "physical_batch_size": 8, "key": KEY} | options
    return dpj.make_private(loss, params, dataset=DATA, mechanism=MECHANISM, **options)


@pytest.mark.parametrize("devices", [0, 4])
def test_make_private_goes_on_with_the_noise_it_had(tmp_path, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("devices",)) if devices else None
    whole = begin(mesh=mesh)
    for _ in whole.steps():
        pass
    with Ledger.create(tmp_path / "ledger", dataset="toy") as ledger:
        half = begin(ledger=ledger, mesh=mesh)
        for step in half.steps():
            if step.number == 3:
                break
    with Ledger.open(tmp_path / "ledger") as ledger:
        rest = begin(jax.tree.map(np.array, half.params), ledger=ledger, taken=3, mesh=mesh)
        assert len(list(rest.steps())) == STEPS - 3
    jax.tree.map(np.testing.assert_array_equal, rest.params, whole.params)


def test_the_noise_of_a_step_is_that_of_its_place(monkeypatch):
    """Where an example has no gradient, what is released is the correlated noise of the steps."""
    task = begin(params={"w": jnp.zeros(4)}, optimizer=optax.sgd(0.0))
    released = []

    def heard(before):
        return lambda index, spec, numbers: (released.append(numbers()), before(index, spec, numbers))

    monkeypatch.setattr(task._releases, "before", heard(task._releases.before))
    for _ in task.steps():
        pass
    c = square_root(4)
    for t in range(STEPS):
        spec = MECHANISM.step(t)
        want = noisy_mean({"w": jnp.zeros(4)}, spec.noise_stddev, 4.0, KEY.child("noise", t))["w"]
        back = sum(c[j] * next(iter(released[t - j].values())) for j in range(min(4, t + 1)))
        np.testing.assert_allclose(back, want, rtol=1e-9, atol=1e-12)


def test_what_would_break_the_chain_is_refused():
    with pytest.raises(ValueError, match="same key"):
        begin(key=None, taken=3)
    adam = build_optax("adam-bc", 0.1, 0.0, "constant", STEPS, 1.0)
    with pytest.raises(ValueError, match="noise"):
        begin(optimizer=adam)
    params = {"w": jnp.ones(4)}
    out = dpj.clipped_grad(lambda p, x: jnp.sum(x @ p["w"]), clip_norm=1.0)(params, DATA[:4])
    with pytest.raises(ValueError, match="of its coefficients"):
        dpj.privatize(out, MECHANISM, key_of(0))
    with pytest.raises(ValueError, match="of its coefficients"):
        dpj.privatize(out, MECHANISM, key_of(0), noise=dpj.CorrelatedNoise((1000.0,)))
    own = dpj.CorrelatedNoise(square_root(4))
    assert dpj.privatize(out, MECHANISM, key_of(0), noise=own).noise_variance is None
    with pytest.raises(ValueError, match="with which keys"):
        dpj.CorrelatedNoise(square_root(4), 5)


def test_two_loops_at_once_are_refused():
    task = begin()
    first, second = task.steps(), task.steps()
    next(first), next(second)
    with pytest.raises(RuntimeError, match="another loop"):
        next(first)
