"""A loop of the user's own that is interrupted goes on, on its ledger."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dptrain.torch as dpt
from dptrain import Mechanism
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger

MECHANISM = Mechanism.constant(
    noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.5, steps=6, expected_batch_size=20, delta=1e-5
)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Loop:
    """Model, optimizer and how far they are, as a user would save them."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.data = TensorDataset(torch.randn(40, 4), torch.randint(3, (40,)))
        self.taken = 0

    def train(self, ledger, key=None, steps=100):
        """At most so many steps; returns the training."""
        private = dpt.make_private(
            self.model, self.optimizer, self.data, loss_fn, MECHANISM, physical_batch_size=8, key=key,
            ledger=ledger, taken=self.taken,
        )  # fmt: skip
        taking = private.steps()
        for _ in range(steps):
            if next(taking, None) is None:
                break
        taking.close()
        self.taken = private.taken
        return private


def test_every_release_is_on_record(tmp_path):
    with Ledger.create(tmp_path / "ledger", dataset="made up") as ledger:
        private = Loop().train(ledger)
    assert private.taken == 6
    assert Ledger.read(tmp_path / "ledger").epsilon(1e-5) == private.epsilon == MECHANISM.epsilon()


def test_lost_steps_are_paid_for(tmp_path):
    with Ledger.create(tmp_path / "ledger", dataset="made up") as ledger:
        loop = Loop()
        loop.train(ledger, steps=2)
        saved = copy.deepcopy(loop)
        loop.train(ledger, steps=3)
    with Ledger.open(tmp_path / "ledger") as ledger:
        private = saved.train(ledger)
    assert private.taken == 3
    assert private.epsilon == MECHANISM.epsilon()


@pytest.mark.parametrize("differs", [False, True])
def test_with_a_key_they_are_repeated_if_they_are_the_same(tmp_path, differs):
    key = Key.from_seed(0)
    with Ledger.create(tmp_path / "whole", dataset="made up") as ledger:
        whole = Loop()
        whole.train(ledger, key)
    with Ledger.create(tmp_path / "ledger", dataset="made up") as ledger:
        loop = Loop()
        loop.train(ledger, key, steps=2)
        saved = copy.deepcopy(loop)
        loop.train(ledger, key, steps=3)
    if differs:
        saved.model.weight.data[0, 0] += 1e-6
    with Ledger.open(tmp_path / "ledger") as ledger:
        private = saved.train(ledger, key)
    if differs:
        assert private.taken == 3 and len(ledger.releases) == 6
    else:
        assert private.taken == 6 and len(ledger.releases) == 6
        assert torch.equal(saved.model.weight, whole.model.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"taken": 2}, "fewer releases"),
        ({"taken": -1}, "at least 0"),
        ({"ledger": "ledger.jsonl"}, r"is a dptrain\.core\.ledger\.Ledger"),
        ({"key": "secret"}, "Key.from_entropy"),
    ],
)
def test_what_is_of_no_use_is_refused(changes, message):
    loop = Loop()
    with pytest.raises((TypeError, ValueError), match=message):
        dpt.make_private(
            loop.model, loop.optimizer, loop.data, loss_fn, MECHANISM, physical_batch_size=8, **changes
        )


def test_a_ledger_of_another_relation_is_refused(tmp_path):
    with (
        Ledger.create(tmp_path / "ledger", dataset="made up", neighbours="replace-one") as ledger,
        pytest.raises(ValueError, match="accounted under 'replace-one'"),
    ):
        Loop().train(ledger)
