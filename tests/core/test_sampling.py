"""Logical batches have the distribution that is accounted; physical ones lose nothing.

Statistical tests draw from fixed seeds, so they are repeatable. ALPHA is the significance at which
a right implementation would fail one for a random seed. The law of Poisson samples is tested in
`test_sampling_law.py`.
"""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dptrain.core import sampling
from dptrain.core.entropy import Key
from dptrain.core.sampling import (
    LogicalSampler,
    physical_batch_count,
    physical_batches,
    poisson_sample,
    share,
    uniform_subset,
)
from dptrain.core.spec import Sampling

ALPHA = 1e-8


def sampler(n, q, seed=0, name="poisson", **sizes):
    return LogicalSampler(n, Sampling(name, q, **sizes), Key.from_seed(seed))


def inclusions(a_sampler, steps):
    """bool [steps, N]: who was drawn when."""
    drawn = np.zeros((steps, a_sampler.dataset_size), dtype=bool)
    for step in range(steps):
        drawn[step, a_sampler.sample(step)] = True
    return drawn


def test_subsets_are_uniform():
    rng = np.random.default_rng(0)
    counts = {}
    for _ in range(6000):
        subset = tuple(uniform_subset(rng, 6, 3).tolist())
        counts[subset] = counts.get(subset, 0) + 1
    assert len(counts) == math.comb(6, 3)
    assert stats.chisquare(list(counts.values())).pvalue > ALPHA


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
@settings(max_examples=100, deadline=None)
def test_subsets_are_distinct_sorted_and_of_the_size_asked_for(case):
    population, size = case
    subset = uniform_subset(np.random.default_rng(1), population, size)
    assert subset.dtype == np.int64
    assert len(subset) == size
    assert (np.diff(subset) > 0).all()
    assert size == 0 or (subset[0] >= 0 and subset[-1] < population)


@pytest.mark.parametrize(("population", "size"), [(40, 20), (40, 3), (1000, 400), (10**5, 2000)])
def test_marking_and_sorting_find_the_same_subset(population, size, monkeypatch):
    found = []
    for marked in (0, 10**6):
        monkeypatch.setattr(sampling, "_MARKED", marked)
        found.append(uniform_subset(np.random.default_rng(2), population, size))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(("expected", "limit"), [(10**4, 2e6), (3 * 10**5, 2e7)])
def test_memory_follows_the_batch_not_the_data_set(expected, limit):
    """A billion examples: a permutation, or one number for each, would take 8 GB."""
    tracemalloc.start()
    drawn = sampler(10**9, expected / 10**9).sample(0)
    count = physical_batch_count(len(drawn), 64, 8)
    batches = list(physical_batches(share(drawn, 0, 8), 64, count=count))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert abs(len(drawn) - expected) < 6 * math.sqrt(expected)
    assert sum(b.mask.sum() for b in batches) == -(-len(drawn) // 8)
    assert peak < limit
    assert drawn.max() > 9e8


def test_a_batch_depends_on_key_and_step_alone():
    one, same, other = sampler(1000, 0.1, 5), sampler(1000, 0.1, 5), sampler(1000, 0.1, 6)
    later = one.sample(7)
    np.testing.assert_array_equal(later, same.sample(7))
    assert not np.array_equal(later, one.sample(8))
    assert not np.array_equal(later, other.sample(7))


def test_everyone_is_drawn_at_q_of_one():
    np.testing.assert_array_equal(sampler(50, 1.0).sample(0), np.arange(50))


def test_truncated_poisson_is_cut_uniformly():
    steps, n, q, most = 4000, 20, 0.3, 5
    drawn = inclusions(sampler(n, q, name="truncated-poisson", dataset_size=n, max_batch_size=most), steps)
    sizes = drawn.sum(axis=1)
    assert sizes.max() == most
    expected = np.minimum(np.arange(n + 1), most) @ stats.binom.pmf(np.arange(n + 1), n, q)
    error = sizes.std() / math.sqrt(steps)
    assert abs(sizes.mean() - expected) < stats.norm.isf(ALPHA / 2) * error
    rate = expected / n
    deviation = (drawn.mean(axis=0) - rate) / math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(deviation).max() < stats.norm.isf(ALPHA / 2 / n)


def test_fixed_size_batches_have_it():
    drawn = inclusions(sampler(20, 0.25, name="fixed-size", dataset_size=20), 2000)
    assert (drawn.sum(axis=1) == 5).all()
    deviation = (drawn.mean(axis=0) - 0.25) / math.sqrt(0.25 * 0.75 / 2000)
    assert np.abs(deviation).max() < stats.norm.isf(ALPHA / 2 / 20)


@pytest.mark.parametrize("n", [30, 31, 2])
def test_a_shuffled_epoch_uses_everyone_once(n):
    a_sampler = sampler(n, 1 / 3, name="shuffle-without-amplification")
    drawn = inclusions(a_sampler, 9)
    for epoch in range(3):
        assert (drawn[3 * epoch : 3 * epoch + 3].sum(axis=0) == 1).all()
    if n == 30:
        assert not np.array_equal(drawn[:3], drawn[3:6])


def test_a_data_set_other_than_the_accounted_one_is_refused():
    with pytest.raises(ValueError, match="accounted for 100"):
        sampler(99, 0.1, name="fixed-size", dataset_size=100)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        sampler(0, 0.5)


# Physical batches


def test_an_empty_logical_batch_is_one_masked_physical_batch():
    assert len(poisson_sample(np.random.default_rng(0), 10, 1e-9)) == 0
    batches = list(physical_batches(np.empty(0, dtype=np.int64), 4))
    assert len(batches) == 1
    assert batches[0].indices.shape == batches[0].mask.shape == (4,)
    assert not batches[0].mask.any()


def test_padding_is_masked_and_points_at_an_example_that_exists():
    (batch,) = physical_batches(np.array([7, 9]), 5)
    assert batch.indices.dtype == np.int64
    assert batch.mask.dtype == np.bool_
    np.testing.assert_array_equal(batch.indices, [7, 9, 0, 0, 0])
    np.testing.assert_array_equal(batch.mask, [True, True, False, False, False])


@given(st.lists(st.integers(0, 10**6), max_size=40, unique=True), st.integers(1, 17))
@settings(max_examples=100, deadline=None)
def test_physical_batches_hold_every_example_exactly_once(indices, rows):
    batches = list(physical_batches(np.array(indices, dtype=np.int64), rows))
    assert len(batches) == max(1, math.ceil(len(indices) / rows))
    assert all(b.indices.shape == b.mask.shape == (rows,) for b in batches)
    real = np.concatenate([b.indices[b.mask] for b in batches])
    assert real.tolist() == indices
    assert all((b.indices[~b.mask] == 0).all() for b in batches)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_physical_batch_needs_rows(rows):
    with pytest.raises(ValueError, match="physical_batch_size"):
        list(physical_batches(np.arange(3), rows))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 17))
@settings(max_examples=100, deadline=None)
def test_ranks_share_a_batch_in_equal_numbers_of_physical_batches(n, ranks, rows):
    drawn = 3 * np.arange(n) + 1
    parts = [share(drawn, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} <= {n // ranks, -(-n // ranks)}
    assert sorted(np.concatenate(parts).tolist()) == drawn.tolist()
    count = physical_batch_count(n, rows, ranks)
    # No more than the busiest rank needs.
    assert count == max(1, *(math.ceil(len(part) / rows) for part in parts))
    for part in parts:
        batches = list(physical_batches(part, rows, count=count))
        assert len(batches) == count
        assert all(b.indices.shape == b.mask.shape == (rows,) for b in batches)
        assert np.concatenate([b.indices[b.mask] for b in batches]).tolist() == part.tolist()


def test_surplus_physical_batches_are_masked_throughout():
    batches = list(physical_batches(np.array([7, 9]), 2, count=3))
    assert [b.mask.sum() for b in batches] == [2, 0, 0]
    assert all((b.indices[~b.mask] == 0).all() for b in batches)


def test_examples_that_do_not_fit_are_refused_rather_than_left_out():
    with pytest.raises(ValueError, match="5 examples do not fit into 2 physical batches of 2"):
        list(physical_batches(np.arange(5), 2, count=2))


@pytest.mark.parametrize(
    ("rank", "ranks", "error"),
    [(2, 2, "rank 2 does not exist"), (-1, 2, "rank must be at least 0"), (0, 0, "ranks must be at least 1")],
)
def test_a_rank_must_exist(rank, ranks, error):
    with pytest.raises(ValueError, match=error):
        share(np.arange(3), rank, ranks)
