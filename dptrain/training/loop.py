"""The steps of a run: sample, clip, accumulate, add noise, apply."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dptrain import torch as dpt
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batches
from dptrain.core.spec import StepSpec
from dptrain.data import Batch
from dptrain.models import logits
from dptrain.training.device import autocast
from dptrain.training.prepare import Run

LossFunction = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Unprotected:
    """What epsilon does not cover: shown on request only, and labelled so."""

    batch_size: int
    mean_loss: float
    median_norm: float
    clipped_share: float


@dataclass(frozen=True)
class Step:
    """One step that has been taken. `number` counts from 1."""

    number: int
    unprotected: Unprotected | None


def make_loss(run: Run) -> LossFunction:
    """Cross-entropy per example: (model, (inputs, labels [B])) -> losses [B] float32."""
    precision, device = run.config.precision, run.device

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, labels = batch
        with autocast(precision, device):
            outputs = logits(model, inputs)
        return functional.cross_entropy(outputs.float(), labels, reduction="none")

    return loss


def clip_stand_ins(run: Run, clipped: Callable[..., dpt.ClippedSum], size: int) -> None:
    """Clip a physical batch of stand-ins, made without looking at any example."""
    clipped(run.train.stand_in(size), torch.ones(size, dtype=torch.bool, device=run.device))


def logical_steps(
    run: Run,
    clipped: Callable[..., dpt.ClippedSum],
    optimizer: torch.optim.Optimizer,
    physical_batch_size: int,
    before_release: Callable[[int, StepSpec], None],
) -> Iterator[Step]:
    """Take the steps of the run's mechanism, one per item.

    clipped: what `dpt.clipped_grad` returned. before_release: called with the step's index and
    specification before its noisy gradient exists, to record that its privacy is spent.
    """
    noise_key = run.key.child("noise")
    batches = pieces(run, physical_batch_size)
    for index in range(run.mechanism.steps):
        spec = run.mechanism.step(index)
        total, parts = None, []
        for batch, mask, is_last in batches:
            total = clipped(batch, mask, into=total)
            if run.config.show_unprotected:
                parts.append((total.losses[-len(mask) :], total.norms[-len(mask) :], mask))
            if is_last:
                break
        before_release(index, spec)
        gradient = dpt.privatize(total, spec, noise_key.child(index), donate=True)
        dpt.apply(optimizer, run.learner, gradient)
        yield Step(index + 1, unprotected(parts, spec) if parts else None)


def pieces(run: Run, physical_batch_size: int) -> Iterator[tuple[Batch, torch.Tensor, bool]]:
    """(batch, mask [P] bool, whether it ends its step) of the whole run.

    The data set may read ahead. Every step has at least one piece: an empty logical batch is one
    piece that is masked throughout.
    """
    key = run.key.child("sampling")
    waiting: deque[tuple[PhysicalBatch, bool]] = deque()

    def indices() -> Iterator[torch.Tensor]:
        for step in range(run.mechanism.steps):
            sampler = LogicalSampler(len(run.train), run.mechanism.step(step).sampling, key)
            parts = list(physical_batches(sampler.sample(step), physical_batch_size))
            for number, piece in enumerate(parts, 1):
                waiting.append((piece, number == len(parts)))
                yield torch.from_numpy(piece.indices)

    for batch in run.train.stream(indices()):
        piece, is_last = waiting.popleft()
        yield batch, torch.from_numpy(piece.mask).to(run.device), is_last


def unprotected(parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], spec: StepSpec) -> Unprotected:
    mask = torch.cat([mask for _, _, mask in parts])
    size = int(mask.sum())
    if size == 0:
        return Unprotected(0, 0.0, 0.0, 0.0)
    losses = torch.cat([losses for losses, _, _ in parts])[mask]
    norms = torch.cat([norms for _, norms, _ in parts])[mask]
    clipped = (norms > spec.sensitivity).float().mean()
    return Unprotected(size, float(losses.mean()), float(norms.median()), float(clipped))
