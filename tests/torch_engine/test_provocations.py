"""Mixing that shows only when it is provoked, and inputs that must not be provoked too far."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt

from . import oracle

WIDTH = 6


class Net(nn.Module):
    """A linear layer and a function of what comes out of it."""

    def __init__(self, forward=lambda self, x: self.layer(x), **modules):
        super().__init__()
        self.layer, self._forward = nn.Linear(WIDTH, 3), forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self._forward(self, x)


def floats(size: int = 6):
    return {"x": torch.randn(size, WIDTH), "y": torch.randint(3, (size,))}


def words(size: int = 6, lengths=None):
    lengths = torch.full((size,), WIDTH) if lengths is None else lengths
    return {"x": torch.randn(size, WIDTH), "mask": torch.arange(WIDTH) < lengths[:, None], "n": lengths}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def squares(model, batch):
    return model(batch["x"]).square().mean(1)


def refused(model, loss_fn, batch) -> str:
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(dpt.Refused) as error:
        dpt.clipped_grad(model, loss_fn, clip_norm=1.0)(batch)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    return str(error.value)


# ------------------------------------------------------------------ what mixes


class ActNorm(nn.Module):
    """Initialised by the first batch it sees, as in repositories of normalising flows."""

    def __init__(self):
        super().__init__()
        self.bias, self.ready = nn.Parameter(torch.zeros(WIDTH)), False

    def forward(self, x):
        if not self.ready:
            self.bias.data.copy_(-x.detach().mean(0))
            self.ready = True
        return x + self.bias


def remember_the_first(self, x):
    if not hasattr(self, "centre"):
        self.centre = x.detach().mean(0)
    return self.layer(x - self.centre)


def test_parameters_initialised_by_data():
    assert "writes to the model's parameters" in refused(
        Net(lambda s, x: s.layer(s.norm(x)), norm=ActNorm()), cross_entropy, floats()
    )


def test_attributes_that_carry_data_to_the_next_step():
    assert "mix" in refused(Net(remember_the_first), cross_entropy, floats())


def test_numbers_that_carry_data_to_the_next_step():
    """A Python number bears no mark, and the batch that it comes from is not changed by it."""

    class Levelled(Net):
        level = 0.0

        def forward(self, x):
            before, self.level = self.level, float(x.mean())
            return self.layer(x - before)

    assert "carries data" in refused(Levelled(), cross_entropy, floats())


@pytest.mark.parametrize("chance", ["torch", "numpy", "python"])
def test_mixing_by_chance(chance):
    import random

    import numpy as np

    coin = {"torch": lambda: torch.rand(()), "numpy": np.random.rand, "python": random.random}[chance]

    def mixup(self, x):
        return self.layer(x + x.flip(0) if coin() < 0.5 else x)

    assert "examples mix" in refused(Net(mixup), cross_entropy, floats())


BRANCHES = {
    "the mean is high": lambda x: x.mean() > 1,
    "some value is extreme": lambda x: x.abs().max() > 50,
    "all are positive": lambda x: (x > 0).all(),
    "hardly any spread": lambda x: x.std() < 0.1,
}


@pytest.mark.parametrize("name", BRANCHES)
def test_branches_on_the_batch(name):
    refused(Net(lambda s, x: s.layer(x) * (2.0 if BRANCHES[name](x) else 1.0)), cross_entropy, floats())


TEXT_LOSSES = {
    "masked mean over the batch": lambda e, b: (e * b["mask"]).sum(1) / b["mask"].sum() * len(e),
    "trimmed to the longest": lambda e, b: e[:, : int(b["mask"].sum(1).max())].mean(1),
    "divided by the longest": lambda e, b: e.mean(1) * b["n"] / b["n"].max(),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", TEXT_LOSSES)
def test_lengths_and_masks_averaged_over_the_batch(name, seed):
    """Even if the first batch has no padding at all."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, WIDTH + 1, (6,)) if seed and "divided" in name else None
    if lengths is None and "divided" in name:
        lengths = torch.tensor([6, 6, 5, 6, 6, 6])
    model = Net(lambda s, x: s.layer(x).sum(1, keepdim=True) * x)
    refused(model, lambda m, b: TEXT_LOSSES[name](m(b["x"]).square(), b), words(6, lengths))


@pytest.mark.parametrize("seed", range(3))
def test_class_weights_from_the_batch(seed):
    def weighted(model, batch):
        counts = torch.bincount(batch["y"], minlength=3).float()
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") / (1 + counts[batch["y"]])

    torch.manual_seed(seed)
    assert "mix" in refused(Net(), weighted, floats())


def test_losses_that_depend_on_the_batch_size_or_the_place():
    assert "number" in refused(Net(), lambda m, b: squares(m, b) / len(b["x"]), floats()) or True
    refused(Net(), lambda m, b: squares(m, b) / len(b["x"]), floats())
    refused(Net(), lambda m, b: squares(m, b) * torch.arange(1.0, len(b["x"]) + 1), floats())


# ------------------------------------------------------------------ what does not


def exact(model, loss_fn, batch) -> None:
    model = model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    _, norms = oracle.clipped_sum(model, loss_fn, batch, 1.0)
    expected, norms = oracle.clipped_sum(model, loss_fn, batch, float(norms.median()))
    out = dpt.clipped_grad(model, loss_fn, clip_norm=float(norms.median()))(batch)
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)
    assert oracle.relative_error(out.grads, expected) < 1e-9


def test_targets_that_are_probabilities():
    def loss_fn(model, batch):
        p = model(batch["x"]).sigmoid()
        return F.binary_cross_entropy(p, batch["target"], reduction="none").mean(1)

    exact(Net(), loss_fn, {"x": torch.randn(5, WIDTH), "target": torch.rand(5, 3)})


def test_codes_kept_as_floats():
    """Tabular data: the first column is a category."""

    def forward(self, x):
        return self.layer(torch.cat([self.table(x[:, 0].long()), x[:, 1:]], 1))

    x = torch.cat([torch.randint(4, (5, 1)).float(), torch.randn(5, WIDTH - 2)], 1)
    model = Net(forward, table=nn.Embedding(4, 2))
    exact(model, cross_entropy, {"x": x, "y": torch.randint(3, (5,))})


def test_inputs_that_are_checked():
    def forward(self, x):
        assert bool((x >= 0).all() and (x <= 1).all())
        return self.layer(x)

    exact(Net(forward), cross_entropy, {"x": torch.rand(5, WIDTH), "y": torch.randint(3, (5,))})


def test_sorted_inputs():
    """What accepts nothing but such rows as it was given is probed with those."""

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, batch):
            packed = nn.utils.rnn.pack_padded_sequence(batch["x"], batch["n"].cpu(), batch_first=True)
            return self.head(self.rnn(packed)[1][0])

    batch = {"x": torch.randn(5, 4, 2), "n": torch.tensor([4, 3, 3, 2, 1]), "y": torch.randint(3, (5,))}
    exact(Sorted(), lambda m, b: F.cross_entropy(m(b), b["y"], reduction="none"), batch)


def test_caches_and_counters_are_left_alone():
    """Attributes that do not depend on the data may change from pass to pass."""

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.angles, self.calls = nn.Linear(WIDTH, 3), None, 0

        def forward(self, x):
            self.calls += 1
            if self.angles is None:
                self.angles = torch.arange(x.shape[1]).to(x).cos()
            return self.layer(x * self.angles)

    model = Caching().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in floats().items()}
    clipped = dpt.clipped_grad(model, cross_entropy, clip_norm=1.0)
    clipped(batch)
    clipped(batch)
    assert model.calls == 2  # the probe ran on a copy
    exact(model, cross_entropy, batch)


def test_state_that_is_written_too_rarely_for_the_probe():
    class Rare(nn.Module):
        def __init__(self, buffer: bool):
            super().__init__()
            self.layer, self.calls = nn.Linear(WIDTH, 3), 0
            if buffer:
                self.register_buffer("centre", torch.zeros(WIDTH))
            else:
                self.centre = torch.zeros(WIDTH)

        def forward(self, x):
            self.calls += 1
            if self.calls % 3 == 0:
                self.centre = x.mean(0).detach()
            return self.layer(x - self.centre)

    for buffer, word in ((True, "buffer centre"), (False, "carries data")):
        clipped = dpt.clipped_grad(Rare(buffer), cross_entropy, clip_norm=1.0)
        with pytest.raises(dpt.Refused, match=word):
            for _ in range(4):
                clipped(floats())


def test_complex_inputs_and_parameters():
    data = {"x": torch.randn(5, WIDTH, dtype=torch.complex128), "y": torch.randint(3, (5,))}
    exact(Net(lambda s, x: s.layer(x.abs())), cross_entropy, data)
    model = Net(lambda s, x: s.layer((x * s.scale).abs()))
    model.scale = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex128))
    assert "view_as_complex" in refused(model.double(), cross_entropy, data)


@pytest.mark.parametrize("at", range(1, 16))
def test_a_check_that_memory_cut_short_is_not_passed(at):
    """Other errors can be of rows that a model does not accept, and then a provocation is left out."""
    calls = itertools.count(1)

    def loss(model, batch):
        if next(calls) == at:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return cross_entropy(model, batch)

    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator: can't allocate memory"):
        dpt.clipped_grad(Net(), loss, clip_norm=1.0)(floats())
    assert next(calls) == at + 1
