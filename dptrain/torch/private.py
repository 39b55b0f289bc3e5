"""``make_private``: an existing loop, three lines changed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.core.release import Step, check_dataset_size
from dptrain.core.sampling import LogicalSampler, PhysicalBatch, physical_batches

from .clipping import LossFn, clipped_grad
from .guards import trainable
from .physical_batch import choose
from .release import apply, privatize


class PrivateTraining:
    """What ``make_private`` returns. ``steps()`` trains; nothing else has been changed."""

    def __init__(
        self, model, optimizer, loader, loss_fn, mechanism, physical_batch_size, method, key, compile
    ):
        self.model, self.optimizer, self.mechanism = model, optimizer, mechanism
        self.dataset = loader.dataset
        self._loader, self._key = loader, key
        options = {"clip_norm": mechanism.clip_norm, "method": method}
        self._clipped = clipped_grad(model, loss_fn, **options, compile=compile)
        #: sizes are tried uncompiled: to compile each of them would take minutes
        self._tried = clipped_grad(model, loss_fn, **options) if compile else self._clipped
        self.physical_batch_size = physical_batch_size
        self._taken = 0

    @property
    def epsilon(self) -> float:
        """Spent so far, at the mechanism's delta."""
        return self.mechanism.epsilon(steps=self._taken)

    def steps(self) -> Iterator[Step]:
        """Train: one item per logical step, ends after ``mechanism.steps``.

        Raises:
            Refused: before the first release, if the model cannot be trained exactly.
            RuntimeError: another loop over ``steps()`` has meanwhile taken steps of this training.
        """
        device = next(iter(trainable(self.model).values())).device
        if self.physical_batch_size == "auto":
            self.physical_batch_size = self._choose(device)
        batches = self._batches(device)
        taken, total = self._taken, self.mechanism.steps
        while taken < total:
            if taken != self._taken:  # its batches are drawn already: they would be used twice
                raise RuntimeError("another loop has taken steps of this training: begin a new one to go on.")
            clipped = None
            for batch, mask, last in batches:
                clipped = self._clipped(batch, mask, clipped)
                if last:
                    break
            key = self._key.child("noise", taken)
            gradient = privatize(clipped, self.mechanism.step(taken), key, donate=True)
            self._taken = taken = taken + 1  # the budget is spent when the noisy gradient exists
            apply(self.optimizer, self.model, gradient)
            known = self.mechanism.delta is not None
            spent = self.mechanism.epsilon_so_far(taken) if known else None
            yield Step(taken, total, spent)

    def _batches(self, device: torch.device) -> Iterator[tuple[Any, torch.Tensor, bool]]:
        key = self._key.child("sampling")
        waiting: deque[tuple[PhysicalBatch, bool]] = deque()

        def indices() -> Iterator[list[int]]:
            for step in range(self._taken, self.mechanism.steps):
                sampler = LogicalSampler(len(self.dataset), self.mechanism.step(step).sampling, key)
                pieces = list(physical_batches(sampler.sample(step), self.physical_batch_size))
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

        limit = max(1, int(self.mechanism.expected_batch_size))
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
) -> PrivateTraining:
    """Train an existing model with an existing optimizer under differential privacy.

    Neither is changed: the model's forward pass is observed from outside, the optimizer's ``step``
    is called with private gradients in ``.grad``. A DataLoader lends its data set, workers and
    collation; its sampler is replaced by the mechanism's, with a warning.

    Args:
        model, optimizer: the optimizer must hold exactly the model's trainable parameters.
        dataset: map-style, or a DataLoader over one.
        loss_fn: ``loss_fn(model, batch) -> [B]``, one loss per example.
        mechanism: what is promised; its steps are taken and no more.
        physical_batch_size: examples computed at once, or "auto".
        method: clipping method.
        compile: as for ``clipped_grad``.
        key: the run's secret; fresh from the operating system's entropy by default.

    Raises:
        TypeError, ValueError: in one sentence, before any budget is spent.
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError("mechanism must be a dptrain.Mechanism: Mechanism.calibrate(...) makes one.")
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
    check_dataset_size(mechanism, len(loader.dataset))
    if physical_batch_size != "auto" and (
        not isinstance(physical_batch_size, int) or physical_batch_size < 1
    ):
        raise ValueError(
            f"physical_batch_size must be a positive integer or 'auto', not {physical_batch_size!r}."
        )
    return PrivateTraining(
        model,
        optimizer,
        loader,
        loss_fn,
        mechanism,
        physical_batch_size,
        method,
        key or Key.from_entropy(),
        compile,
    )
