"""What the ranks compute on, taken together, is a Poisson sample.

Every law is a test with a p-value that is right for any seed (Bonferroni over all that it looks at), and is
failed below ALPHA = 1e-8: fewer than a hundred such tests, here and in `test_sampling.py`, so a right sampler
would fail in one of a million sets of seeds. The seeds are fixed, so that what passes once always passes.
Samplers that are wrong in the ways that distributed ones have been are refused by the same tests.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dptrain.core import sampling
from dptrain.core.entropy import Key
from dptrain.core.sampling import LogicalSampler, poisson_sample, share
from dptrain.core.spec import Sampling

ALPHA = 1e-8
STEPS, N, RANKS = 2000, 24, 4
LAGS = (0, 1, 2, 3)


def ours(q, seed):
    """Every rank draws the whole sample, as it would in a process of its own, and takes its share."""
    ranks = [LogicalSampler(N, Sampling("poisson", q), Key.from_seed(seed)) for _ in range(RANKS)]
    return lambda step, rank: share(ranks[rank].sample(step), rank, RANKS)


# Samplers that are wrong


def same_key_on_every_shard(q, seed):
    shard = LogicalSampler(N // RANKS, Sampling("poisson", q), Key.from_seed(seed))
    return lambda step, rank: RANKS * shard.sample(step) + rank


def rank_added_to_the_step(q, seed):
    shard = LogicalSampler(N // RANKS, Sampling("poisson", q), Key.from_seed(seed))
    return lambda step, rank: RANKS * shard.sample(step + rank) + rank


def own_key_of_each_rank(q, seed):
    """Shares of different samples: nobody agreed on whom they share out."""
    samplers = [LogicalSampler(N, Sampling("poisson", q), Key.from_seed(seed + r)) for r in range(RANKS)]
    return lambda step, rank: share(samplers[rank].sample(step), rank, RANKS)


def with_replacement(q, seed):
    def draw(step, rank):
        rng = Key.from_seed(seed).child("step", step).numpy_generator()
        return share(np.sort(rng.integers(N, size=rng.binomial(N, q))), rank, RANKS)

    return draw


def fixed_size(q, seed):
    sampler = LogicalSampler(N, Sampling("fixed-size", q, N), Key.from_seed(seed))
    return lambda step, rank: share(sampler.sample(step), rank, RANKS)


def fixed_size_on_every_shard(q, seed):
    shards = [
        LogicalSampler(N // RANKS, Sampling("fixed-size", q, N // RANKS), Key.from_seed(seed + rank))
        for rank in range(RANKS)
    ]
    return lambda step, rank: RANKS * shards[rank].sample(step) + rank


def last_example_forgotten(q, seed):
    """Shards of equal length, as of a sampler that drops what is left over."""
    sampler = LogicalSampler(N - 1, Sampling("poisson", q), Key.from_seed(seed))
    return lambda step, rank: share(sampler.sample(step), rank, RANKS)


def equal_shares(q, seed):
    """So many for each rank, so that none has a surplus: the rest of the sample is dropped."""
    sampler = LogicalSampler(N, Sampling("poisson", q), Key.from_seed(seed))

    def draw(step, rank):
        drawn = sampler.sample(step)
        return share(drawn, rank, RANKS)[: len(drawn) // RANKS]

    return draw


def one_stream_without_steps(q, seed):
    """The generator goes on from step to step, but starts afresh every second one."""

    def draw(step, rank):
        rng = Key.from_seed(seed).child("step", step // 2).numpy_generator()
        return share(poisson_sample(rng, N, q), rank, RANKS)

    return draw


# What must hold


def everywhere(sampler):
    """int64 [STEPS, N]: how often each example is computed on in each step, over all ranks."""
    counts = np.zeros((STEPS, N), dtype=np.int64)
    for step in range(STEPS):
        for rank in range(RANKS):
            np.add.at(counts[step], sampler(step, rank), 1)
    return counts


def at_most_once(counts, q):
    return float(counts.max() <= 1)


def at_the_right_rate(counts, q):
    """Each example's number of inclusions is Binomial(steps, q)."""
    return two_sided((counts > 0).sum(axis=0), STEPS, q)


def pairwise_independent(counts, q):
    """Two examples, whatever ranks they fall to, in one step or in steps up to three apart.

    Steps are paired so that none is used twice, wherefore each number of joint inclusions is
    Binomial(pairs of steps, q²).
    """
    drawn = (counts > 0).astype(np.float64)
    worst = 1.0
    for lag in LAGS:
        first = np.arange(STEPS - lag)
        if lag:
            first = first[first // lag % 2 == 0]
        together = drawn[first].T @ drawn[first + lag]
        together = together[np.triu_indices(N, 1)] if lag == 0 else together.ravel()
        worst = min(worst, two_sided(together.astype(np.int64), len(first), q * q))
    return min(1.0, len(LAGS) * worst)


def of_binomial_size(counts, q):
    """The size of the sample is Binomial(N, q), by χ² over sizes expected twenty times or more."""
    expected = STEPS * stats.binom.pmf(np.arange(N + 1), N, q)
    sizes = np.minimum(counts.sum(axis=1), N)
    seen = np.bincount(sizes, minlength=N + 1)
    usual = expected >= 20
    expected = np.append(expected[usual], expected[~usual].sum())
    seen = np.append(seen[usual], seen[~usual].sum())
    return float(stats.chisquare(seen, expected).pvalue)


def two_sided(counts, trials, rate):
    """The p-value of the most unlikely of some Binomial counts, exact but for Bonferroni's bound."""
    binomial = stats.binom(trials, rate)
    tail = np.minimum(binomial.cdf(counts), binomial.sf(counts - 1))
    return float(min(1.0, 2 * counts.size * tail.min()))


LAWS = (at_most_once, at_the_right_rate, pairwise_independent, of_binomial_size)


def refused(counts, q):
    """The laws that do not hold."""
    return {law for law in LAWS if law(counts, q) < ALPHA}


# 0.75 takes the way of the complement; without marks, subsets are drawn by sorting.
@pytest.mark.parametrize(("q", "marked"), [(0.02, 32), (0.25, 32), (0.75, 32), (0.25, 0)])
def test_the_union_of_the_ranks_samples_is_a_poisson_sample(q, marked, monkeypatch):
    monkeypatch.setattr(sampling, "_MARKED", marked)
    assert refused(everywhere(ours(q, seed=1)), q) == set()


@pytest.mark.parametrize(
    ("wrong", "broken"),
    [
        (same_key_on_every_shard, {pairwise_independent, of_binomial_size}),
        (rank_added_to_the_step, {pairwise_independent}),
        (own_key_of_each_rank, {at_the_right_rate}),
        (with_replacement, {at_most_once, at_the_right_rate}),
        (fixed_size, {of_binomial_size}),
        (fixed_size_on_every_shard, {pairwise_independent, of_binomial_size}),
        (last_example_forgotten, {at_the_right_rate}),
        (equal_shares, {at_the_right_rate, of_binomial_size}),
        (one_stream_without_steps, {pairwise_independent}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_sampler_is_seen(wrong, broken):
    assert broken <= refused(everywhere(wrong(0.5, seed=1)), 0.5)


@pytest.mark.parametrize("q", [0.02, 0.25, 0.75])
def test_any_number_of_ranks_takes_the_same_sample(q):
    sampler = LogicalSampler(1000, Sampling("poisson", q), Key.from_seed(3))
    for step in range(20):
        drawn = sampler.sample(step)
        for ranks in (1, 2, 4, 7, 1001):
            parts = [share(drawn, rank, ranks) for rank in range(ranks)]
            np.testing.assert_array_equal(np.sort(np.concatenate(parts)), drawn)


def test_a_resumed_rank_takes_the_shares_that_it_would_have_taken():
    whole, resumed = ours(0.25, seed=5), ours(0.25, seed=5)
    taken = {(step, rank): whole(step, rank) for step in range(20) for rank in range(RANKS)}
    for step in reversed(range(10, 20)):
        for rank in range(RANKS):
            np.testing.assert_array_equal(resumed(step, rank), taken[step, rank])
