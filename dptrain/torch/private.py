"""``make_private``: an existing loop, three lines changed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dptrain.core import checks
from dptrain.core.clip_rules import Flat
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.quantile import FollowedClipNorm, followed, released
from dptrain.core.release import Step, check_dataset_size
from dptrain.core.releases import NotTheSame, Numbers, Releases, releases_of
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batch_count, physical_batches, share
from dptrain.core.shared_releases import SharedReleases

from .clipping import LossFn, clipped_grad
from .correlated import CorrelatedNoise
from .denoise import Denoiser
from .fsdp import fsdp_modules, reshard
from .guards import check_callables, trainable
from .physical_batch import choose
from .ranks import Ranks, all_ranks
from .release import PrivateGradient, apply, privatize
from .shards import is_sharded, local


class PrivateTraining:
    """What ``make_private`` returns. ``steps()`` trains; nothing else has been changed."""

    def __init__(
        self,
        model,
        optimizer,
        loader,
        loss_fn,
        mechanism,
        physical_batch_size,
        method,
        compile,
        releases,
        taken,
        ranks,
        follow,
        denoiser,
    ):
        self.model, self.optimizer, self.mechanism = model, optimizer, mechanism
        self.dataset, self._is_sharded = loader.dataset, bool(fsdp_modules(model))
        self._loader, self._releases, self._ranks = loader, releases, ranks
        self._follow: FollowedClipNorm | None = follow
        self.denoiser: Denoiser | None = denoiser
        options = {"clip_norm": mechanism.step(0).clip_rule, "method": method, "grid": mechanism.grid}
        self._clipped = clipped_grad(model, loss_fn, **options, compile=compile, ranks=ranks)
        #: sizes are tried uncompiled, for to compile each of them would take minutes; and by each rank alone
        plain = not compile and ranks.alone
        self._tried = self._clipped if plain else clipped_grad(model, loss_fn, **options, ranks=Ranks())
        self.physical_batch_size = physical_batch_size
        self._taken = taken

    @property
    def taken(self) -> int:
        """Steps that model and optimizer have taken; save it with them."""
        return self._taken

    @property
    def clip_norm(self) -> float:
        """Of the next step. Where it follows a quantile, save it with the model: it is public."""
        if self._follow is not None:
            return self._follow.clip_norm
        return self.mechanism.step(min(self._taken, self.mechanism.steps - 1)).sensitivity

    @property
    def epsilon(self) -> float:
        """Spent so far, at the mechanism's delta, by all releases on record."""
        return self.mechanism.epsilon(steps=self._releases.count)

    def steps(self) -> Iterator[Step]:
        """Train: one item per logical step, ends after ``mechanism.steps`` releases.

        Raises:
            Refused: before the first release, if the model cannot be trained exactly.
            RuntimeError: another loop over ``steps()`` has meanwhile taken steps of this training.
        """
        device = next(iter(trainable(self.model).values())).device
        if self.physical_batch_size == "auto":
            self.physical_batch_size = self._ranks.least(self._choose(device))
        while True:
            try:
                yield from self._steps(device)
                return
            except NotTheSame:  # nothing of it was used
                self._releases.draw_afresh()

    def _steps(self, device: torch.device) -> Iterator[Step]:
        batches, key = self._batches(device), self._releases.key
        taken, total = self._taken, self.mechanism.steps
        correlated = self._correlated(key, taken)
        while self._releases.may_go_on(taken):
            if taken != self._taken:  # its batches are drawn already: they would be used twice
                raise RuntimeError("another loop has taken steps of this training: begin a new one to go on.")
            spec, follow = self.mechanism.step(taken), self._follow
            self._clipped.rule = Flat(follow.clip_norm) if follow else spec.clip_rule
            clipped, centred = None, 0.0
            with nullcontext() if self.denoiser is None else self.denoiser.ahead():
                for batch, mask, last in batches:
                    clipped = self._clipped(batch, mask, clipped, last=last)
                    if follow:
                        centred += follow.centred(clipped.norms[-len(mask) :][mask].cpu().numpy())
                    if last:
                        break
            noise, sum_spec = key.child("noise", taken), follow.step(spec) if follow else spec
            gradient = privatize(clipped, sum_spec, noise, donate=True, noise=correlated)
            moved = follow.moved(self._ranks.total(centred), spec, noise) if follow else None
            self._releases.before(taken, spec, released(self._numbers(gradient), moved))
            if follow:
                follow.clip_norm = moved
            self._taken = taken = taken + 1
            if self.denoiser is not None:
                gradient = self.denoiser.filtered(gradient)
            apply(self.optimizer, self.model, gradient)
            known = self.mechanism.delta is not None
            spent = self.mechanism.epsilon_so_far(self._releases.count) if known else None
            yield Step(taken, total, spent)

    def _correlated(self, key: Key, taken: int) -> CorrelatedNoise | None:
        """The noise of the steps so far, of a mechanism whose noise is correlated."""
        spec = self.mechanism.step(0)
        if spec.correlation is None:
            return None
        return CorrelatedNoise(spec.correlation, taken, lambda index: key.child("noise", index))

    def _numbers(self, gradient: PrivateGradient) -> Numbers:
        """What the record's fingerprint is taken of: of shards, what all ranks have, each by its own."""
        if not self._is_sharded:
            return gradient.on_host
        own = {name: local(g) for name, g in gradient.grads.items()}
        return lambda: {f"rank {i}": d.numpy() for i, d in enumerate(self._ranks.digests(own))}

    def _batches(self, device: torch.device) -> Iterator[tuple[Any, torch.Tensor, bool]]:
        key = self._releases.key.child("sampling")
        waiting: deque[tuple[PhysicalBatch, bool]] = deque()

        def indices() -> Iterator[list[int]]:
            for step in range(self._taken, self.mechanism.steps):
                sampler = LogicalSampler(len(self.dataset), self.mechanism.step(step).sampling, key)
                drawn, size = sampler.sample(step), self.physical_batch_size
                mine = share(drawn, self._ranks.rank, self._ranks.size)
                count = None  # gathers of sharded models wait for all ranks
                if self._is_sharded:
                    count = physical_batch_count(len(drawn), size, self._ranks.size)
                pieces = list(physical_batches(mine, size, count=count))
                for number, piece in enumerate(pieces, 1):
                    waiting.append((piece, number == len(pieces)))
                    yield piece.indices.tolist()

        old = self._loader
        loader = DataLoader(
            self.dataset,
            batch_sampler=indices(),
            num_workers=old.num_workers,
            collate_fn=old.collate_fn,
            pin_memory=device.type == "cuda",
        )
        for batch in loader:
            piece, last = waiting.popleft()
            mask = torch.from_numpy(piece.mask).to(device)
            yield _to(batch, device), mask, last

    def _choose(self, device: torch.device) -> int:
        """On the first example, repeated: nothing private is measured."""
        one = self._loader.collate_fn([self.dataset[0]])

        def run(size: int) -> None:
            batch = tree_map(lambda t: t.repeat_interleave(size, 0) if torch.is_tensor(t) else t, one)
            self._tried(_to(batch, device))

        limit = max(1, int(max(spec.expected_batch_size for spec, _ in self.mechanism.segments)))
        return choose(run, limit, device)[0]


def _to(batch: Any, device: torch.device) -> Any:
    return tree_map(lambda t: t.to(device, non_blocking=True) if torch.is_tensor(t) else t, batch)


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset | DataLoader,
    loss_fn: LossFn,
    mechanism: Mechanism,
    *,
    physical_batch_size: int | str = "auto",
    method: str = "auto",
    compile: bool = False,
    key: Key | None = None,
    ledger: Ledger | None = None,
    taken: int = 0,
    clip_norm: float | None = None,
    ranks: Ranks | None = None,
    denoiser: Denoiser | None = None,
) -> PrivateTraining:
    """Train an existing model with an existing optimizer under differential privacy.

    Neither is changed: the model's forward pass is observed from outside, the optimizer's ``step``
    is called with private gradients in ``.grad``. A DataLoader lends its data set, workers and
    collation; its sampler is replaced by the mechanism's, with a warning.

    Under torchrun every rank calls it alike, with the same whole data set: rank 0's weights, buffers, key and
    ledger count. Every rank takes its share of each logical batch, all take the same steps, and what is sent
    is one reduction of the parameters a step. torch.distributed.optim.ZeroRedundancyOptimizer shares out the
    optimizer's state; of a model under FSDP2 everything is (docs/fsdp.md).

    Args:
        model, optimizer: the optimizer must hold exactly the model's trainable parameters.
        dataset: map-style, or a DataLoader over one.
        loss_fn: ``loss_fn(model, batch) -> [B]``, one loss per example.
        mechanism: what is promised; its steps are taken and no more.
        physical_batch_size: examples computed at once, or "auto".
        method: clipping method; of a hardened mechanism one that sums on a grid, see ``clipped_grad``.
        compile: as for ``clipped_grad``.
        key: the run's secret; fresh from the operating system's entropy by default.
        ledger: where each release is recorded before it is made: ``dptrain.core.ledger.Ledger.create``, or
            ``Ledger.open`` of a run that was interrupted.
        taken: steps that what is passed has taken already, when it was saved. What the ledger has beyond
            them is lost, and paid for: with a key of one's own it is repeated if it comes out the same bit
            for bit, else drawn afresh, and the training ends earlier.
        clip_norm: of a mechanism whose clip norm follows a quantile: what ``PrivateTraining.clip_norm`` was
            when the rest was saved.
        ranks: that train together; by default all of torch.distributed's default group, where that is
            initialised.
        denoiser: of this model, by which private gradients are filtered; save its state with the model's.

    Raises:
        TypeError, ValueError: in one sentence, before any budget is spent.
    """
    check_callables(model, loss_fn)
    if not isinstance(mechanism, Mechanism):
        raise TypeError("mechanism must be a dptrain.Mechanism: Mechanism.calibrate(...) makes one.")
    if reshard(model) and physical_batch_size == "auto":
        raise ValueError(
            "the model is sharded by fully_shard, and its ranks cannot try sizes each by itself: give "
            "physical_batch_size as a number."
        )
    if isinstance(dataset, DataLoader):
        loader = dataset
        if not isinstance(loader.dataset, IterableDataset):
            warnings.warn(
                f"the DataLoader's own sampling is replaced by the mechanism's {mechanism.sampler} "
                "sampling; its workers and collation are kept.",
                stacklevel=2,
            )
    else:
        loader = DataLoader(dataset, batch_size=1, collate_fn=default_collate)
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__getitem__"):
        raise TypeError(
            "an iterable data set cannot be Poisson-sampled: use one with __getitem__ and __len__."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "LBFGS evaluates the loss several times in a step, each of which would spend budget: "
            "use SGD, Adam or another first-order optimizer."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        hint = (
            "GradScaler skips steps depending on the data: use bf16 autocast without it"
            if "GradScaler" in type(optimizer).__name__
            else "pass a torch.optim optimizer"
        )
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; {hint}.")
    mine = trainable(model)
    theirs = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    missing = [name for name, p in mine.items() if id(p) not in theirs]
    if missing or len(theirs) != len(mine):
        raise ValueError(
            "the optimizer's parameters are not the model's trainable ones"
            + (f" ({missing[0]} is missing)" if missing else "")
            + ": build it from model.parameters() after freezing and moving the model."
        )
    stale = [name for name, p in mine.items() if p.grad is not None]
    if stale:
        raise ValueError(
            f"{stale[0]} holds a gradient from before, which would be used without protection: call "
            "optimizer.zero_grad(set_to_none=True) first."
        )
    if denoiser is not None:
        denoiser.check(model)
    _check_noise_is_known(mechanism, optimizer)
    check_dataset_size(mechanism, len(loader.dataset))
    ranks = all_ranks() if ranks is None else ranks
    follow = followed(mechanism, clip_norm)
    if follow is not None and compile:
        raise ValueError("a clip norm that follows a quantile changes at every step: leave out compile.")
    if not isinstance(physical_batch_size, str):
        size = checks.whole("physical_batch_size", physical_batch_size)
        physical_batch_size = min(size, len(loader.dataset))  # no batch is ever larger
    elif physical_batch_size != "auto":
        raise ValueError(
            f"physical_batch_size must be a positive integer or 'auto', not {physical_batch_size!r}."
        )
    if ranks.alone:
        releases: Releases | SharedReleases = releases_of(mechanism, ledger, key, taken)
    else:
        taken = ranks.tell(taken)
        releases = SharedReleases(lambda: releases_of(mechanism, ledger, key, taken), ranks)
        ranks.share(t for t in (*model.parameters(), *model.buffers()) if not is_sharded(t))
        if denoiser is not None:
            denoiser.share(ranks)
        if follow is not None:
            follow.clip_norm = ranks.tell(follow.clip_norm)
    return PrivateTraining(
        model,
        optimizer,
        loader,
        loss_fn,
        mechanism,
        physical_batch_size,
        method,
        compile,
        releases,
        taken,
        ranks,
        follow,
        denoiser,
    )


def _check_noise_is_known(mechanism: Mechanism, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that must know the noise of each gradient, where that is not known."""
    if mechanism.step(0).correlation is not None and any(
        "noise_variance" in g for g in optimizer.param_groups
    ):
        raise ValueError(
            "the optimizer must know the variance of each gradient's noise, and that of correlated noise "
            "changes with the steps: take one that need not, such as torch.optim.Adam."
        )
