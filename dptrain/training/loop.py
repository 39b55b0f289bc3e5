"""The steps of a run: sample, clip, accumulate, add noise, apply."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dptrain import torch as dpt
from dptrain.core.clip_rules import Flat
from dptrain.core.entropy import Key
from dptrain.core.quantile import FollowedClipNorm, released
from dptrain.core.releases import Numbers
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batches, share
from dptrain.core.spec import StepSpec
from dptrain.data import Batch
from dptrain.models import logits
from dptrain.torch.ranks import ALONE, Ranks
from dptrain.training.augment import views
from dptrain.training.compress import Compressor
from dptrain.training.device import autocast
from dptrain.training.prepare import Run

LossFunction = Callable[[nn.Module, Batch], torch.Tensor]

BeforeRelease = Callable[[int, StepSpec, Numbers], None]
"""Called with a step's index, its specification and its noisy gradient, before anything is made of that: to
record that its privacy is spent. If it raises, there is no release and nothing has changed."""


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
    """Cross-entropy per example: (model, (inputs, labels [B])) -> losses [B] float32.

    Of several views of an example, inputs [B, K, ...], it is the mean.
    """
    precision, device, count = run.config.precision, run.device, run.config.augmentations

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, labels = batch
        if count:
            inputs, labels = inputs.flatten(0, 1), labels.repeat_interleave(count)
        with autocast(precision, device):
            outputs = logits(model, inputs)
        losses = functional.cross_entropy(outputs.float(), labels, reduction="none")
        return losses.unflatten(0, (-1, count)).mean(1) if count else losses

    return loss


def clip_stand_ins(run: Run, clipped: Callable[..., dpt.ClippedSum], size: int) -> None:
    """Clip a physical batch of stand-ins, made without looking at any example."""
    batch = augmented(run, run.train.stand_in(size))
    clipped(batch, torch.ones(size, dtype=torch.bool, device=run.device))


def augmented(run: Run, batch: Batch) -> Batch:
    """The batch with random views [B, K, ...] in place of its images, where the run asks for some."""
    if not run.config.augmentations:
        return batch
    images, labels = batch
    return views(images, run.config.augmentations, run.config.augmentation == "shift-flip"), labels


def logical_steps(
    run: Run,
    clipped: dpt.ClippedGrad,
    optimizer: torch.optim.Optimizer,
    physical_batch_size: int,
    key: Key,
    first: int,
    before_release: BeforeRelease,
    compressor: Compressor,
    ranks: Ranks = ALONE,
    follow: FollowedClipNorm | None = None,
    denoiser: dpt.Denoiser | None = None,
) -> Iterator[Step]:
    """Take the steps of the run's mechanism from index `first` on, one per item.

    Each is a function of the weights before it, the data and (key, index) alone: a step that is repeated
    with the same key is the same, and with another key shares no randomness with it.

    clipped: what `dpt.clipped_grad` returned for the compressor's loss. key: the run's secret. ranks: that
    all take these steps, each with its share of the examples. follow: the clip norm of a mechanism by which
    it follows a quantile. denoiser: says where gradients are taken, and filters what is released.
    """
    batches = pieces(run, physical_batch_size, key, first, ranks)
    correlated = correlated_noise(run, key, first)
    own = () if ranks.alone else (ranks.rank,)  # examples on different ranks draw different numbers
    for index in range(first, run.mechanism.steps):
        spec = run.mechanism.step(index)
        clipped.rule = Flat(follow.clip_norm) if follow else spec.clip_rule
        total, parts, centred = None, [], 0.0
        own_key = key.child("compression", index)
        if compressor.decides_before:
            with random_state(own_key.child("forward"), run.device):
                compressor.before(own_key)
        where = nullcontext() if denoiser is None else denoiser.ahead()
        with where, random_state(key.child("forward", index, *own), run.device):
            for batch, mask, is_last in batches:
                total = clipped(augmented(run, batch), mask, into=total, last=is_last)
                norms = total.norms[-len(mask) :]
                if follow:
                    centred += follow.centred(norms[mask].cpu().numpy())
                if run.config.show_unprotected:
                    parts.append((total.losses[-len(mask) :], norms, mask))
                if is_last:
                    break
        noise, sum_spec = key.child("noise", index), follow.step(spec) if follow else spec
        gradient = dpt.privatize(total, sum_spec, noise, donate=True, noise=correlated)
        moved = follow.moved(ranks.total(centred), spec, noise) if follow else None
        before_release(index, spec, released(gradient.on_host, moved))
        if follow:
            follow.clip_norm = moved
        gradient = compressor.after(gradient, index, own_key)
        if denoiser is not None:
            gradient = denoiser.filtered(gradient)
        dpt.apply(optimizer, run.learner, gradient)
        yield Step(index + 1, unprotected(parts, spec) if parts else None)


def correlated_noise(run: Run, key: Key, first: int) -> dpt.CorrelatedNoise | None:
    """That of the steps before `first`, of a mechanism whose noise is correlated."""
    spec = run.mechanism.step(0)
    if spec.correlation is None:
        return None
    return dpt.CorrelatedNoise(spec.correlation, first, lambda index: key.child("noise", index))


@contextmanager
def random_state(key: Key, device: torch.device) -> Iterator[None]:
    """Within, what a model draws (dropout) is decided by the key; random state is left as found."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(key.seed64())
        yield


def pieces(
    run: Run, physical_batch_size: int, key: Key, first: int, ranks: Ranks = ALONE
) -> Iterator[tuple[Batch, torch.Tensor, bool]]:
    """(batch, mask [P] bool, whether it ends its step) of this rank's share of the run from step `first` on.

    The data set may read ahead. Every step has at least one piece: an empty logical batch is one
    piece that is masked throughout.
    """
    key = key.child("sampling")
    waiting: deque[tuple[PhysicalBatch, bool]] = deque()

    def indices() -> Iterator[torch.Tensor]:
        for step in range(first, run.mechanism.steps):
            sampler = LogicalSampler(len(run.train), run.mechanism.step(step).sampling, key)
            drawn = share(sampler.sample(step), ranks.rank, ranks.size)
            parts = list(physical_batches(drawn, physical_batch_size))
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
