"""``make_private`` on an existing loop: what it trains, what it leaves alone, what it refuses."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

SIZE = 64


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def setting():
    torch.manual_seed(0)
    centres = 3 * torch.randn(3, 5)
    labels = torch.randint(3, (SIZE,))
    dataset = TensorDataset(centres[labels] + torch.randn(SIZE, 5), labels)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, torch.optim.Adam(model.parameters(), lr=0.05), dataset


def mechanism(**changes):
    options = {
        "noise_multiplier": 0.5,
        "clip_norm": 1.0,
        "sample_rate": 0.25,
        "steps": 30,
        "expected_batch_size": SIZE / 4,
        "delta": 1e-3,
    }
    return Mechanism.constant(**(options | changes))


def test_trains_and_ends():
    model, optimizer, dataset = setting()
    before = float(loss_fn(model, dataset.tensors).detach().mean())
    private = dpt.make_private(model, optimizer, dataset, loss_fn, mechanism(), physical_batch_size=8)
    assert private.epsilon == 0
    seen = list(private.steps())
    assert [s.number for s in seen] == list(range(1, 31)) and seen[0].steps == 30
    assert all(a.epsilon <= b.epsilon for a, b in pairwise(seen))
    assert 0 < seen[0].epsilon < seen[-1].epsilon
    assert seen[-1].epsilon == pytest.approx(mechanism().epsilon())
    assert float(loss_fn(model, dataset.tensors).detach().mean()) < before
    assert all(p.grad is None for p in model.parameters())
    assert list(private.steps()) == [], "a mechanism's steps are taken once"


def test_the_physical_batch_size_does_not_matter():
    """One key, three sizes: the same sample, the same noise, the same weights."""
    weights = []
    for physical in (1, 8, 64):
        model, _, dataset = setting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        private = dpt.make_private(
            model, optimizer, dataset, loss_fn, mechanism(steps=4),
            physical_batch_size=physical, key=Key.from_seed(5),
        )  # fmt: skip
        list(private.steps())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in weights[1:]:
        torch.testing.assert_close(weights[0], other, rtol=1e-4, atol=1e-5)


def test_without_a_key_two_runs_differ():
    results = []
    for _ in range(2):
        model, optimizer, dataset = setting()
        chosen = mechanism(steps=1)
        list(dpt.make_private(model, optimizer, dataset, loss_fn, chosen, physical_batch_size=64).steps())
        results.append(model[0].weight.detach().clone())
    assert not torch.equal(*results)


def test_a_loader_lends_its_collation_and_says_that_it_is_not_the_sampler():
    model, optimizer, dataset = setting()
    loader = DataLoader(dataset, batch_size=7, shuffle=True)
    with pytest.warns(UserWarning, match="replaced by the mechanism's poisson sampling"):
        private = dpt.make_private(
            model, optimizer, loader, loss_fn, mechanism(steps=2), physical_batch_size=16
        )
    assert len(list(private.steps())) == 2


def test_no_sample_is_used_twice_by_two_loops_at_once():
    """A loop draws its batches ahead: one that goes on after another would release an old sample again."""
    model, optimizer, dataset = setting()
    private = dpt.make_private(
        model, optimizer, dataset, loss_fn, mechanism(steps=4), physical_batch_size=SIZE
    )
    first, second = private.steps(), private.steps()
    assert [next(loop).number for loop in (first, second, second)] == [1, 2, 3]
    with pytest.raises(RuntimeError, match="another loop"):
        next(first)
    assert [step.number for step in private.steps()] == [4]


def test_schedules_of_the_sample_rate_are_followed():
    model, optimizer, dataset = setting()
    first, second = mechanism(steps=1), mechanism(steps=1, sample_rate=1.0, expected_batch_size=SIZE)
    both = Mechanism((*first.segments, *second.segments), delta=1e-3)
    private = dpt.make_private(model, optimizer, dataset, loss_fn, both, physical_batch_size=SIZE)
    real = []
    inner = private._clipped
    private._clipped = lambda batch, mask, into, **how: (
        real.append(int(mask.sum())),
        inner(batch, mask, into),
    )[1]
    list(private.steps())
    assert real[0] < SIZE and real[1] == SIZE


def test_automatic_physical_batch_size():
    model, optimizer, dataset = setting()
    private = dpt.make_private(model, optimizer, dataset, loss_fn, mechanism(steps=2))
    assert len(list(private.steps())) == 2 and private.physical_batch_size >= 1


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()


def test_refusals():
    model, optimizer, dataset = setting()

    def refused(match, *, model=model, optimizer=optimizer, dataset=dataset, chosen=None, **kwargs):
        with pytest.raises((TypeError, ValueError), match=match), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dpt.make_private(model, optimizer, dataset, loss_fn, chosen or mechanism(), **kwargs)

    refused("iterable", dataset=Stream())
    refused("iterable", dataset=DataLoader(Stream()))
    refused("LBFGS", optimizer=torch.optim.LBFGS(model.parameters()))
    refused("GradScaler", optimizer=torch.amp.GradScaler("cpu", enabled=False))
    refused("not the model's trainable", optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1))
    refused("missing", optimizer=torch.optim.SGD(model[0].parameters(), lr=1))
    refused("within 1 %", chosen=mechanism(expected_batch_size=20))
    refused("at least 1", physical_batch_size=0)
    refused("a positive integer or", physical_batch_size="large")
    refused("Mechanism", chosen="epsilon 8")
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    refused("gradient from before")


def test_a_refusal_of_the_engine_comes_before_any_budget():
    _, _, dataset = setting()
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = dpt.make_private(model, optimizer, dataset, loss_fn, mechanism(), physical_batch_size=16)
    with pytest.raises(dpt.Refused, match="BatchNorm"):
        next(private.steps())
    assert private.epsilon == 0
