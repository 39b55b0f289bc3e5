"""PyTorch libraries, by the adapters of measurements: sampling is ours, clipping and noise are theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dptrain.audit.subjects import Problem, Training, Weights
from dptrain.audit.torch_subject import Examples, weights
from dptrain.bench.case import Case
from dptrain.bench.peers import Peer
from dptrain.bench.torch_task import Task
from dptrain.core.entropy import Key
from dptrain.core.sampling import LogicalSampler, physical_batches


class Library:
    """A library in one of its modes."""

    def __init__(self, peer: Peer, mode: str):
        self.peer, self.mode, self.name = peer, mode, f"{peer.name} {mode}"

    def train(self, problem: Problem, how: Training) -> Iterator[Weights]:
        """They draw their noise from PyTorch's generator, which is seeded here."""
        key = Key.from_entropy()
        torch.manual_seed(key.child("torch").seed64() % 2**63)
        mechanism, examples = how.mechanism, Examples(problem)
        task = PeerTask(Case(device=how.device), mechanism.clip_norm, problem, how)
        training = self.peer.training(task, self.mode, mechanism.noise_multiplier)
        yield weights(training.model)
        for step in range(mechanism.steps):
            sampler = LogicalSampler(problem.size, mechanism.step(step).sampling, key.child("sampling"))
            for piece in physical_batches(sampler.sample(step), how.physical_batch_size):
                x, y = examples.__getitems__(piece.indices[piece.mask].tolist())
                training.accumulate((x.to(how.device), y.to(how.device)))
            training.release()
            yield weights(training.model)

    def for_many_trainings(self) -> Library:
        return self


@dataclass(frozen=True)
class PeerTask(Task):
    """A problem as the adapters take it, with plain gradient descent."""

    problem: Any = None
    how: Any = None

    @property
    def batch(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Some examples, to see which layers a library knows."""
        x, y = Examples(self.problem).__getitems__(range(min(4, self.problem.size)))
        return x.to(self.how.device), y.to(self.how.device)

    def model(self) -> nn.Module:
        return self.problem.torch_model().to(self.how.device).train()

    def loss_fn(self, model: nn.Module, batch: Any) -> Tensor:
        return self.problem.torch_loss(model, batch)

    @property
    def logical_batch_size(self) -> int:
        return round(self.how.mechanism.expected_batch_size)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=self.how.learning_rate)
