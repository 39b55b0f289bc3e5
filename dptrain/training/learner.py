"""What takes the steps of a run: the weights, the optimizer and their average, on one of the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from torch import nn

from dptrain import torch as dpt
from dptrain.core.spec import StepSpec
from dptrain.optim import average_of, build_optimizer, build_schedule
from dptrain.torch.physical_batch import Trial, choose
from dptrain.training.loop import Step, clip_stand_ins, logical_steps, make_loss
from dptrain.training.prepare import Run

BeforeRelease = Callable[[int, StepSpec], None]


class Learner(Protocol):
    """One run's weights on their way."""

    def get_ready(self, compiles: Callable[[], None]) -> tuple[int, list[Trial]]:
        """The physical batch size, and what was tried to find it.

        The engine has seen a batch of stand-ins by then: what it refuses, it refuses before the run begins,
        and what is compiled, it compiles. compiles: called before a compilation that can take a minute.
        """
        ...

    def steps(self, before_release: BeforeRelease) -> Iterator[Step]:
        """Take the steps of the run's mechanism, one per item."""
        ...

    def model(self) -> nn.Module:
        """The part that is trained, with the weights that are scored and saved: their average, if one is
        kept."""
        ...

    def settle(self) -> None:
        """Leave these weights in the run's model."""
        ...


class TorchLearner:
    """The PyTorch engine."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run, self.taken, self.size = run, 0, 0
        self.optimizer = build_optimizer(
            config.optimizer, run.learner.parameters(), config.lr, config.weight_decay
        )
        self.schedule = build_schedule(config.lr_schedule, self.optimizer, run.mechanism.steps)
        self.average = average_of(run.learner, config.weight_average) if config.weight_average else None
        self.clipped: dpt.ClippedGrad | None = None

    def get_ready(self, compiles: Callable[[], None]) -> tuple[int, list[Trial]]:
        run, config = self.run, self.run.config
        run.learner.train()
        options = {"clip_norm": config.clip_norm, "method": run.method}
        clipped = dpt.clipped_grad(run.learner, make_loss(run), **options)
        size, trials = config.physical_batch_size, []
        if size == "auto":  # measured uncompiled: to compile each size would take minutes
            largest = int(run.mechanism.expected_batch_size)
            size, trials = choose(lambda n: clip_stand_ins(run, clipped, n), largest, run.device)
        if config.compile:
            compiles()
            clipped = dpt.clipped_grad(run.learner, make_loss(run), **options, compile=True)
        if config.compile or not trials:
            clip_stand_ins(run, clipped, size)
        self.clipped, self.size = clipped, size
        return size, trials

    def steps(self, before_release: BeforeRelease) -> Iterator[Step]:
        assert self.clipped is not None
        for step in logical_steps(self.run, self.clipped, self.optimizer, self.size, before_release):
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.run.learner)
            self.taken = step.number
            yield step

    def model(self) -> nn.Module:
        return self.average.module if self.average is not None and self.taken else self.run.learner

    def settle(self) -> None:
        if self.average is not None and self.taken:
            self.run.learner.load_state_dict(self.average.module.state_dict())
            self.average = None
