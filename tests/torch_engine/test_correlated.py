"""The noise that steps release, and its way through make_private."""

import math

import numpy as np
import pytest
import torch

import dptrain.torch as dpt
from dptrain.core.correlated import correlated, square_root
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.torch.noise import noisy_mean

STEPS = 12
MECHANISM = correlated(
    bands=4,
    steps=STEPS,
    clip_norm=1.0,
    sample_rate=0.1,
    expected_batch_size=4.0,
    delta=1e-5,
    noise_multiplier=1.5,
)
LIKE = {"w": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float64)}


def key_of(index: int) -> Key:
    return Key.from_seed(5).child("noise", index)


def drawn(steps: int = STEPS) -> list[dict[str, torch.Tensor]]:
    noise = dpt.CorrelatedNoise(square_root(4))
    return [noise.next(LIKE, MECHANISM.step(i), key_of(i)) for i in range(steps)]


def test_c_times_the_noise_is_the_independent_noise_of_the_steps():
    found, c = drawn(), square_root(4)
    for t in range(STEPS):
        spec = MECHANISM.step(t)
        want = noisy_mean(LIKE, spec.noise_stddev, spec.expected_batch_size, key_of(t))
        for name, w in want.items():
            back = sum(c[j] * found[t - j][name] for j in range(min(4, t + 1)))
            torch.testing.assert_close(back, w, rtol=1e-4, atol=1e-5)


def test_a_run_that_goes_on_draws_what_it_would_have_drawn():
    noise = dpt.CorrelatedNoise(square_root(4), 7, key_of)
    for index, want in enumerate(drawn()[7:], 7):
        again = noise.next(LIKE, MECHANISM.step(index), key_of(index))
        assert all(torch.equal(again[name], want[name]) for name in LIKE)


def test_noise_in_sums_of_steps_is_as_small_as_it_should_be():
    noise, total, wide = dpt.CorrelatedNoise(square_root(4)), 0.0, {"w": torch.zeros(200, 1000)}
    inverse = np.linalg.inv(sum(np.diag(np.full(STEPS - j, c), -j) for j, c in enumerate(square_root(4))))
    for index in range(STEPS):
        total = total + noise.next(wide, MECHANISM.step(index), key_of(index))["w"]
        expected = 1.5 / 4 * np.linalg.norm(np.tril(np.ones((STEPS, STEPS)))[index] @ inverse)
        assert float(total.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * 200_000))


def private(tmp_path, **options):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"physical_batch_size": 8, "key": Key.from_seed(1)} | options
    return dpt.make_private(model, optimizer, data, loss, MECHANISM, **options), model


def test_make_private_goes_on_with_the_noise_it_had(tmp_path):
    whole, model = private(tmp_path)
    for _ in whole.steps():
        pass
    ledger = Ledger.create(tmp_path / "ledger.jsonl", dataset="toy")
    half, halfway = private(tmp_path, ledger=ledger)
    for step in half.steps():
        if step.number == 6:
            break
    ledger.close()
    with Ledger.open(tmp_path / "ledger.jsonl") as ledger:
        rest, going_on = private(tmp_path, ledger=ledger, taken=6)
        going_on.load_state_dict(halfway.state_dict())
        assert len(list(rest.steps())) == STEPS - 6
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), going_on.parameters()))


def test_what_would_break_the_chain_is_refused(tmp_path):
    with pytest.raises(ValueError, match="same key"):
        private(tmp_path, key=None, taken=3)
    model, batch = torch.nn.Linear(3, 2), (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    out = dpt.clipped_grad(model, loss, clip_norm=1.0)(batch)
    with pytest.raises(ValueError, match="of its coefficients"):
        dpt.privatize(out, MECHANISM, key_of(0))
    with pytest.raises(ValueError, match="of its coefficients"):
        dpt.privatize(out, MECHANISM, key_of(0), noise=dpt.CorrelatedNoise((1000.0,)))
    own = dpt.CorrelatedNoise(square_root(4))
    assert dpt.privatize(out, MECHANISM, key_of(0), noise=own).noise_variance is None
    with pytest.raises(ValueError, match="with which keys"):
        dpt.CorrelatedNoise(square_root(4), 5)
