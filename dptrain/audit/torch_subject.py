"""The PyTorch engine, by ``make_private``: the loop that its users call."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dptrain.torch as dpt
from dptrain.audit.subjects import Problem, Training, Weights
from dptrain.core.entropy import Key
from dptrain.core.sampling import LogicalSampler, physical_batches


class Engine:
    """One clipping method."""

    def __init__(self, method: str):
        self.method, self.name = method, f"torch {method}"

    def train(self, problem: Problem, how: Training) -> Iterator[Weights]:
        model = problem.torch_model().to(how.device)
        with warnings.catch_warnings():  # of the loader's sampler, which is to be replaced
            warnings.filterwarnings("ignore", "the DataLoader's own sampling", UserWarning)
            private = dpt.make_private(
                model,
                torch.optim.SGD(model.parameters(), lr=how.learning_rate),
                DataLoader(Examples(problem), collate_fn=lambda batch: batch),
                problem.torch_loss,
                how.mechanism,
                physical_batch_size=how.physical_batch_size,
                method=self.method,
            )
        yield weights(model)
        for _ in private.steps():
            yield weights(model)

    def for_many_trainings(self) -> Repeated:
        return Repeated(self.method)


class Repeated:
    """The loop of ``make_private`` from its public parts; a model is probed and planned for once."""

    def __init__(self, method: str):
        self.name = f"torch {method}"
        self._prepared = functools.cache(functools.partial(_prepared, method))

    def train(self, problem: Problem, how: Training) -> Iterator[Weights]:
        mechanism, key, examples = how.mechanism, Key.from_entropy(), Examples(problem)
        model, clipped = self._prepared(problem, mechanism.clip_norm, how.device)
        model.load_state_dict(problem.torch_model().state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=how.learning_rate)
        yield weights(model)
        for step in range(mechanism.steps):
            spec = mechanism.step(step)
            sampler = LogicalSampler(problem.size, spec.sampling, key.child("sampling"))
            total = None
            for piece in physical_batches(sampler.sample(step), how.physical_batch_size):
                x, y = examples.__getitems__(piece.indices)
                mask = torch.from_numpy(piece.mask).to(how.device)
                total = clipped((x.to(how.device), y.to(how.device)), mask, total)
            gradient = dpt.privatize(total, spec, key.child("noise", step), donate=True)
            dpt.apply(optimizer, model, gradient)
            yield weights(model)

    def for_many_trainings(self) -> Repeated:
        return self


def _prepared(
    method: str, problem: Problem, clip_norm: float, device: str
) -> tuple[nn.Module, dpt.ClippedGrad]:
    model = problem.torch_model().to(device)
    return model, dpt.clipped_grad(model, problem.torch_loss, clip_norm=clip_norm, method=method)


class Examples(Dataset):
    """A problem's, a batch at a time."""

    def __init__(self, problem: Problem):
        self.problem = problem

    def __len__(self) -> int:
        return self.problem.size

    def __getitem__(self, index: int) -> Any:
        return tuple(part[0] for part in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.problem.inputs(indices)), torch.from_numpy(self.problem.targets(indices))


def weights(model: nn.Module) -> Weights:
    """A copy, on the host."""
    return {name: p.detach().to("cpu", copy=True).numpy() for name, p in model.named_parameters()}
