"""What takes the steps of a run: the weights, the optimizer and their average, on one of the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from dptrain import torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.quantile import FollowedClipNorm, followed
from dptrain.core.releases import Numbers
from dptrain.core.spec import StepSpec
from dptrain.optim import average_of, build_optimizer, build_schedule
from dptrain.optim.wire import Wire
from dptrain.torch.physical_batch import Trial, choose
from dptrain.torch.ranks import ALONE, Ranks, lost_ranks
from dptrain.training.checkpoint import CheckpointError
from dptrain.training.compress import Compressor
from dptrain.training.denoiser_state import denoiser_state, restore_denoiser
from dptrain.training.loop import (
    BeforeRelease,
    Step,
    augmented,
    clip_stand_ins,
    logical_steps,
    make_loss,
)
from dptrain.training.optimizer_state import optimizer_state, restore_optimizer
from dptrain.training.prepare import Run

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class State:
    """Where a learner is, to go on from: tensors by name, and JSON-able numbers."""

    tensors: Tensors
    numbers: dict[str, Any]


def shared(state: State | None, ranks: Ranks) -> State:
    """Rank 0's state on all ranks."""
    kinds = None
    if state is not None:
        kinds = [[n, list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in state.tensors.items()]
    kinds, numbers = ranks.tell([kinds, state and state.numbers])
    if state is None:
        tensors = {
            name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, shape, dtype in kinds or []
        }
        state = State(tensors, numbers)
    ranks.share(state.tensors.values())
    return state


class Learner(Protocol):
    """One run's weights on their way.

    Attributes:
        taken: steps that have been taken.
        is_whole: whether `state` is all that there is after `taken` steps: not while one is being applied,
            nor while ranks have parts of it.
    """

    taken: int
    is_whole: bool

    def get_ready(self, compiles: Callable[[], None]) -> tuple[int, list[Trial]]:
        """The physical batch size, and what was tried to find it.

        The engine has seen a batch of stand-ins by then: what it refuses, it refuses before the run begins,
        and what is compiled, it compiles. compiles: called before a compilation that can take a minute.
        """
        ...

    def steps(self, key: Key, before_release: BeforeRelease) -> Iterator[Step]:
        """Take the steps of the run's mechanism that have not been taken, one per item.

        key: the secret that samples and noise are drawn from.
        """
        ...

    def state(self) -> State:
        """All that the next step depends on, apart from the key and the data."""
        ...

    def restore(self, taken: int, state: State) -> None:
        """Go to where another learner of the same run was. Raises CheckpointError if it does not fit."""
        ...

    def model(self) -> nn.Module:
        """The part that is trained, with the weights that are scored and saved: their average, if one is
        kept."""
        ...

    def settle(self) -> None:
        """Leave these weights in the run's model."""
        ...

    def wire(self) -> Wire:
        """Bytes that a step of each device sends."""
        ...


class TorchLearner:
    """The PyTorch engine."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run, self.taken, self.is_whole, self.size = run, 0, True, 0
        self.ranks = ALONE
        self.compressor = Compressor(run, make_loss(run), partial(augmented, run))
        self._build_optimizer()
        self.average = average_of(run.learner, config.weight_average) if config.weight_average else None
        self.denoiser = dpt.Denoiser(run.learner, config.denoise) if config.denoise else None
        self.clipped: dpt.ClippedGrad | None = None
        self.follow = followed(run.mechanism) if run.is_private else None

    def _build_optimizer(self) -> None:
        config = self.run.config
        shared = self.ranks.group if config.shard == "optimizer" else None
        chosen = self.run.learner.parameters()
        self.optimizer = build_optimizer(
            config.optimizer, chosen, config.lr, config.weight_decay, shared, config.adam_floor
        )
        self.schedule = build_schedule(config.lr_schedule, self.optimizer, self.run.mechanism.steps)

    def get_ready(self, compiles: Callable[[], None]) -> tuple[int, list[Trial]]:
        run, config = self.run, self.run.config
        run.learner.train()
        first = run.mechanism.step(0)
        options = {"clip_norm": first.clip_rule, "method": run.method, "grid": run.mechanism.grid}
        options |= {"ranks": ALONE}  # until they join
        self.compressor.try_out()
        clipped = dpt.clipped_grad(run.learner, self.compressor.loss, **options)
        size, trials = config.physical_batch_size, []
        if size == "auto":  # measured uncompiled: to compile each size would take minutes
            largest = int(max(spec.expected_batch_size for spec, _ in run.mechanism.segments))
            size, trials = choose(lambda n: clip_stand_ins(run, clipped, n), largest, run.device)
        if config.compile:
            compiles()
            clipped = dpt.clipped_grad(run.learner, self.compressor.loss, **options, compile=True)
        if config.compile or not trials:
            clip_stand_ins(run, clipped, size)
        self.clipped, self.size = clipped, size
        return size, trials

    def join(self, ranks: Ranks) -> None:
        """Share the steps from now on with other ranks, which go on from where rank 0 is. Called by all."""
        assert self.clipped is not None
        state = shared(self.state() if ranks.leads else None, ranks)
        taken = ranks.tell(self.taken)
        self.ranks = ranks
        if self.shares_out:
            self._build_optimizer()
        if self.shares_out or not ranks.leads:
            self.restore(taken, state)
        ranks.share(buffer for _, buffer in self.run.model.named_buffers())
        ranks.check_alike("weights", dict(self.run.model.named_parameters()))
        self.clipped.ranks = self.compressor.ranks = ranks
        self.is_whole = not self.shares_out

    @property
    def shares_out(self) -> bool:
        """Whether this rank has only a part of what `state` has, until all `gather`."""
        return self.run.config.shard != "none" and not self.ranks.alone

    def gather(self) -> None:
        """Bring together on rank 0 what ranks share out. Called by all."""
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            with lost_ranks():
                self.optimizer.consolidate_state_dict(to=0)
        self.is_whole = True

    def steps(self, key: Key, before_release: BeforeRelease) -> Iterator[Step]:
        assert self.clipped is not None

        def release(index: int, spec: StepSpec, numbers: Numbers) -> None:
            before_release(index, spec, numbers)
            self.is_whole = False

        steps = logical_steps(
            self.run,
            self.clipped,
            self.optimizer,
            self.size,
            key,
            self.taken,
            release,
            self.compressor,
            self.ranks,
            self.follow,
            self.denoiser,
        )
        for step in steps:
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.run.learner)
            self.taken, self.is_whole = step.number, not self.shares_out
            yield step

    def state(self) -> State:
        self._put_back()
        tensors, numbers = optimizer_state(self.optimizer, self.schedule)
        tensors = {f"optimizer/{name}": value for name, value in tensors.items()}
        tensors |= {f"weights/{name}": value for name, value in weights(self.run.learner).items()}
        if self.average is not None:
            tensors |= {f"average/{name}": value for name, value in weights(self.average.module).items()}
            numbers["averaged"] = int(self.average.n_averaged)
        if self.follow is not None:
            numbers["clip_norm"] = self.follow.clip_norm
        if self.denoiser is not None:
            kept, numbers["denoiser"] = denoiser_state(self.denoiser)
            tensors |= {f"denoiser/{name}": value for name, value in kept.items()}
        tensors |= {f"left over/{name}": value for name, value in self.compressor.memory.items()}
        return State(tensors, numbers)

    def restore(self, taken: int, state: State) -> None:
        put(weights(self.run.learner), under("weights", state.tensors))
        numbers = dict(state.numbers)
        if self.average is not None:
            put(weights(self.average.module), under("average", state.tensors))
            self.average.n_averaged.fill_(int(numbers.pop("averaged", 0)))
        if self.follow is not None:
            self.follow = FollowedClipNorm(self.follow.rule, numbers.pop("clip_norm", None))
        if self.denoiser is not None:
            restore_denoiser(self.denoiser, under("denoiser", state.tensors), numbers.pop("denoiser", None))
        put(self.compressor.memory, under("left over", state.tensors))
        restore_optimizer(self.optimizer, self.schedule, under("optimizer", state.tensors), numbers)
        self.taken = taken

    def model(self) -> nn.Module:
        self._put_back()
        return self.average.module if self.average is not None and self.taken else self.run.learner

    def settle(self) -> None:
        self._put_back()
        if self.average is not None and self.taken:
            self.run.learner.load_state_dict(self.average.module.state_dict())
            self.average = None

    def wire(self) -> Wire:
        return self.compressor.wire()

    def _put_back(self) -> None:
        """The weights, after an interruption while gradients were taken elsewhere."""
        if self.denoiser is not None:
            self.denoiser.put_back()


def weights(model: nn.Module) -> Tensors:
    """The trained parameters, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def under(prefix: str, tensors: Tensors) -> Tensors:
    """Those whose name begins with ``prefix/``, by the rest of their name."""
    return {
        name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")
    }


@torch.no_grad()
def put(own: Tensors, saved: Tensors) -> None:
    """Copy `saved` into `own`, in place.

    Raises CheckpointError if names, shapes or types differ.
    """
    described = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in (own, saved)]
    if described[0] != described[1]:
        different = sorted(name for name, _ in described[0].items() ^ described[1].items())
        raise CheckpointError(
            f"the checkpoint is of another model: {', '.join(different[:3])} differ; resume with the "
            "settings and the versions that it was made with."
        )
    for name, tensor in own.items():
        tensor.copy_(saved[name])
