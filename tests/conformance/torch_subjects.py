"""PyTorch: ``make_private``, and a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.sampling import LogicalSampler, physical_batches

from .problems import Arrays, Autoencoder, Problem
from .subjects import Run, Task, secret


class Model(nn.Module):
    """``Autoencoder`` in PyTorch: its losses."""

    def __init__(self, weights: Arrays) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(value.copy())))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = torch.tanh(x @ self.w + self.b) @ self.w.T + self.c
        return ((out - x).square().sum(1) + (x @ self.s).square().sum(1)) / 2 + t * self.r.sum()


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return model(*batch)


class Recorder(torch.optim.Optimizer):
    """An optimizer that writes down what it is given, and moves nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.model, self.seen = model, []

    def step(self) -> None:
        self.seen.append({name: p.grad.numpy().copy() for name, p in self.model.named_parameters()})


def _tensors(problem: Problem) -> list[Tensor]:
    return [torch.from_numpy(problem.data[name]) for name in "xt"]


class TorchLoop:
    """``clipped_grad`` and ``privatize`` in a loop of one's own: sums are added, nothing is given away."""

    slack = 1.005  #: which make_private lets pass

    def problem(self) -> Autoencoder:
        return Autoencoder()

    def run(self, task: Task) -> Run:
        model, mechanism = Model(task.problem.weights), task.mechanism
        data, key = _tensors(task.problem), secret(task)
        clipped = dpt.clipped_grad(model, loss_fn, clip_norm=mechanism.clip_norm)
        recorder, run = Recorder(model), Run()
        for step in range(mechanism.steps):
            spec = mechanism.step(step)
            sampler = LogicalSampler(len(data[0]), spec.sampling, key.child("sampling"))
            pieces = physical_batches(sampler.sample(step), task.physical_batch_size)
            sums = [clipped([d[p.indices] for d in data], torch.from_numpy(p.mask)) for p in pieces]
            total = reduce(lambda a, b: a + b, sums)
            dpt.apply(recorder, model, dpt.privatize(total, spec, key.child("noise", step)))
            run.weights.append(task.problem.weights)
            run.told.append(step + 1)
        run.releases = recorder.seen
        run.epsilon = None if mechanism.delta is None else mechanism.epsilon()
        return run

    def clipped(self, problem: Problem, clip_norm: float) -> Callable[[np.ndarray], Arrays]:
        clipped = dpt.clipped_grad(Model(problem.weights), loss_fn, clip_norm=clip_norm)
        data = _tensors(problem)

        def of(mask: np.ndarray) -> Arrays:
            grads = clipped(data, torch.from_numpy(mask)).grads
            return {name: g.numpy().copy() for name, g in grads.items()}

        return of

    def release(self, problem: Problem, clip_norm: float, method: str, mechanism: Mechanism) -> Arrays:
        clipped = dpt.clipped_grad(Model(problem.weights), loss_fn, clip_norm=clip_norm, method=method)
        grads = dpt.privatize(clipped(_tensors(problem)), mechanism, Key.from_entropy()).grads
        return {name: g.numpy() for name, g in grads.items()}


class TorchPrivate(TorchLoop):
    """``make_private``."""

    def run(self, task: Task) -> Run:
        model, run = Model(task.problem.weights), Run()
        recorder = Recorder(model)
        private = dpt.make_private(
            model,
            recorder,
            TensorDataset(*_tensors(task.problem)),
            loss_fn,
            task.mechanism,
            physical_batch_size=task.physical_batch_size,
            key=secret(task),
        )
        for step in private.steps():
            run.weights.append(task.problem.weights)
            run.told.append((step.number, step.steps))
        run.releases = recorder.seen
        run.epsilon = None if task.mechanism.delta is None else private.epsilon
        return run
