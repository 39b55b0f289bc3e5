"""Canaries are orthogonal and of norm C, whoever computes their gradients."""

from __future__ import annotations

import numpy as np
import pytest

import dptrain.torch as dpt
from dptrain.audit.adversaries import Watching, log_likelihood_ratio, low_digits
from dptrain.audit.canaries import ORDINARY, Game
from dptrain.audit.linear import NAMES
from dptrain.audit.torch_subject import Examples
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

GAME = Game(90, 4.0, Key.from_seed(3), repeats=4)


def sums_of(indices) -> dict[str, np.ndarray]:
    clipped = dpt.clipped_grad(GAME.torch_model(), GAME.torch_loss, clip_norm=4.0, method="per-example")
    return {name: g.numpy() for name, g in clipped(Examples(GAME).__getitems__(indices)).grads.items()}


def test_each_canary_that_is_present_moves_its_own_direction_by_one():
    members = int(GAME.present.sum())
    assert np.allclose(GAME.observed(sums_of(range(members))), GAME.present, atol=1e-5)
    for number, canary in enumerate(np.flatnonzero(GAME.present)[::15]):
        seen = GAME.observed(sums_of([number * 15]))
        assert np.allclose(seen, np.arange(90) == canary, atol=1e-6)


def test_ordinary_examples_move_none_of_them():
    sums = sums_of(range(GAME.size - ORDINARY, GAME.size))
    assert np.allclose(GAME.observed(sums), 0, atol=1e-6)
    assert all(abs(sums[name]).max() > 0.1 for name in NAMES)


def test_the_kinds_of_canaries():
    assert GAME.alone.sum() == 45 and GAME.repeated.sum() == 22 and not (GAME.repeated & ~GAME.alone).any()
    assert not Game(90, 4.0, Key.from_seed(3)).repeated.any()
    assert 20 < GAME.present.sum() < 70


def test_observed_noise_is_white():
    rng = np.random.default_rng(0)
    game = Game(10_000, 2.0, Key.from_seed(0))
    noise = {name: 3 * rng.standard_normal((game.rows, game.columns)) for name in NAMES}
    seen = game.observed(noise)
    assert seen.std() == pytest.approx(1.5, rel=0.03) and abs(seen.mean()) < 0.06


def test_the_likelihood_ratio_is_that_of_a_mixture():
    spec = Mechanism.constant(
        noise_multiplier=1.5, clip_norm=2, sample_rate=0.3, steps=1, expected_batch_size=1
    ).step(0)
    y = np.array([-1.0, 0.2, 2.5])

    def density(mean: float) -> np.ndarray:
        return np.exp(-((y - mean) ** 2) / (2 * 1.5**2))

    expected = np.log((0.7 * density(0) + 0.3 * density(1)) / density(0))
    assert np.allclose(log_likelihood_ratio(y, spec), expected)


def test_low_digits_tell_noise_of_few_digits_from_any_other():
    import torch

    noise = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for present in (0, 1):
        coarse = low_digits((noise.bfloat16().float() + 4.0 * present).double().numpy() / 4, 4.0)
        assert np.mean(coarse * (1 if present else -1) > 0) > 0.7
        fine = low_digits((noise + 4.0 * present).double().numpy() / 4, 4.0)
        assert abs(fine.mean()) < 0.05


def test_noise_that_repeats_leaves_no_spread_where_nobody_is():
    mechanism = Mechanism.constant(
        noise_multiplier=1, clip_norm=4, sample_rate=0.5, steps=6, expected_batch_size=1
    )
    watching, rng = Watching(GAME, mechanism), np.random.default_rng(0)
    noise = rng.standard_normal(90)
    for _ in range(6):
        watching.see(noise + GAME.present * (rng.random(90) < 0.5))
    spread = next(e for e in watching.evidence() if e.adversary == "spread over the steps")
    absent, present = spread.sorted_by_truth()
    assert absent.max() < 1e-9 and np.median(present) > 0.5
