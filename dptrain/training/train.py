"""One training run, from configuration to run folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dptrain import torch as dpt
from dptrain.core.ledger import Ledger
from dptrain.core.spec import StepSpec
from dptrain.optim import average_of, build_optimizer, build_schedule
from dptrain.torch.physical_batch import choose
from dptrain.training.config import TrainConfig
from dptrain.training.device import matmul_precision
from dptrain.training.evaluation import Score, evaluate
from dptrain.training.listener import Listener, Silent
from dptrain.training.loop import logical_steps, make_loss
from dptrain.training.prepare import Run, prepare
from dptrain.training.run_folder import RunFolder
from dptrain.training.tensorboard import TensorBoard, open_tensorboard


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Run
    folder: RunFolder
    steps: int
    """Steps whose privacy is spent."""
    epsilon: float
    """Spent at the run's delta; infinite if not private."""
    score: Score
    interrupted: bool
    physical_batch_size: int
    training_s: float


def train(config: TrainConfig, listener: Listener | None = None) -> Outcome:
    """Train as `config` says and leave everything in the run folder.

    Interrupted (Ctrl-C), it stops between two statements, accounts for every step that may have
    been released, and leaves weights, metrics and the epsilon spent so far. Raises a ValueError of
    one sentence, before any budget is spent, for what cannot be done.
    """
    listener = listener or Silent()
    folder = RunFolder.plan(config)
    run = prepare(config)
    listener.prepared(run, folder)
    with matmul_precision(run.config.precision):
        return _Session(run, folder, listener).run_to_end()


class _Session:
    """The moving parts of one run."""

    def __init__(self, run: Run, folder: RunFolder, listener: Listener) -> None:
        config = run.config
        self.run, self.folder, self.listener = run, folder, listener
        self.spent = 0
        self.score: Score | None = None
        self.scored_at = -1
        self.optimizer = build_optimizer(
            config.optimizer, run.learner.parameters(), config.lr, config.weight_decay
        )
        self.schedule = build_schedule(config.lr_schedule, self.optimizer, run.mechanism.steps)
        self.average = average_of(run.learner, config.weight_average) if config.weight_average else None
        self.tensorboard: TensorBoard | None = None
        self.ledger = Ledger(folder.ledger)
        self.started = time.perf_counter()

    def run_to_end(self) -> Outcome:
        run, config = self.run, self.run.config
        run.learner.train()
        clipped, size = self._clipped_grad()
        self.folder.create(config)
        self.tensorboard = open_tensorboard(self.folder.path) if config.tensorboard else None
        due = _evaluation_steps(run.mechanism.steps, config.evaluations)
        for step_number in due:
            # Accounting by PLD takes a good part of a second: done ahead, it slows no step.
            self._epsilon(step_number)
        interrupted = False
        self.started = time.perf_counter()
        try:
            for step in logical_steps(run, clipped, self.optimizer, size, self._before_release):
                self.schedule.step()
                if self.average is not None:
                    self.average.update_parameters(run.learner)
                epsilon = self._epsilon(step.number)
                self.listener.stepped(step, epsilon, self._examples_per_s(step.number))
                if step.unprotected is not None:
                    self._record({"event": "unprotected", "step": step.number, **asdict(step.unprotected)})
                if step.number in due:
                    self._evaluate(epsilon)
        except KeyboardInterrupt:
            interrupted = True
        except Exception:
            # What has been paid for is kept, whatever went wrong.
            if self.spent:
                self._finish(interrupted=True, physical_batch_size=size)
            raise
        return self._finish(interrupted, size)

    def _clipped_grad(self) -> tuple[dpt.ClippedGrad, int]:
        """What clips, and the physical batch size as given or found.

        Either way the engine has seen a batch of stand-ins by then: what it refuses, it refuses
        before the run begins, and what is compiled, it compiles.
        """
        run, config = self.run, self.run.config
        options = {"clip_norm": config.clip_norm, "method": run.method}
        clipped = dpt.clipped_grad(run.learner, make_loss(run), **options)

        def on_stand_ins(size: int) -> None:
            clipped(run.train.stand_in(size), torch.ones(size, dtype=torch.bool, device=run.device))

        size, trials = config.physical_batch_size, []
        if size == "auto":  # measured uncompiled: to compile each size would take minutes
            size, trials = choose(on_stand_ins, int(run.mechanism.expected_batch_size), run.device)
        if config.compile:
            self.listener.compiles()
            clipped = dpt.clipped_grad(run.learner, make_loss(run), **options, compile=True)
        if config.compile or not trials:
            on_stand_ins(size)
        self.listener.chose_physical_batch_size(size, trials)
        return clipped, size

    def _before_release(self, index: int, spec: StepSpec) -> None:
        # Counted first: should the process die within the step, its privacy is spent all the same.
        self.ledger.append(index, spec)
        self.spent = index + 1

    def _epsilon(self, steps: int) -> float:
        """Epsilon after `steps`; between evaluations an upper bound, which is cheap."""
        mechanism, config = self.run.mechanism, self.run.config
        if config.accountant == "rdp":
            return mechanism.epsilon(steps=steps, accountant="rdp")
        return mechanism.epsilon_so_far(steps, points=config.evaluations)

    def _examples_per_s(self, steps: int) -> float:
        return steps * self.run.mechanism.expected_batch_size / (time.perf_counter() - self.started)

    def _evaluate(self, epsilon: float) -> None:
        averaged = self.average is not None and self.spent
        learner = self.average.module if averaged else self.run.learner
        self.score = evaluate(learner, self.run.held_out, self.run.config.precision, self.run.device)
        self.scored_at = self.spent
        self.listener.evaluated(self.spent, self.score, epsilon)
        self._record(
            {
                "event": "evaluation",
                "step": self.spent,
                "epsilon": epsilon,
                "on": self.run.held_out_name,
                "accuracy": self.score.accuracy,
                "loss": self.score.loss,
                "elapsed_s": time.perf_counter() - self.started,
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        self.folder.append_metrics(record)
        if self.tensorboard is not None:
            self.tensorboard.write(record)

    def _finish(self, interrupted: bool, physical_batch_size: int) -> Outcome:
        run = self.run
        training_s = time.perf_counter() - self.started
        if self.average is not None and self.spent:
            run.learner.load_state_dict(self.average.module.state_dict())
            self.average = None
        self.folder.save_model(run.model)
        accountant = run.config.accountant
        epsilon = run.mechanism.epsilon(steps=self.spent, accountant=accountant)
        if self.scored_at != self.spent or self.score is None:
            self._evaluate(epsilon)
        assert self.score is not None
        outcome = Outcome(
            run,
            self.folder,
            self.spent,
            epsilon,
            self.score,
            interrupted,
            physical_batch_size,
            training_s,
        )
        self.folder.save_summary(summarise(outcome))
        if self.tensorboard is not None:
            self.tensorboard.close()
        return outcome


def summarise(outcome: Outcome) -> dict[str, Any]:
    """What `summary.json` holds."""
    run = outcome.run
    return {
        "private": run.is_private,
        "reproducible": run.key.reproducible,
        "interrupted": outcome.interrupted,
        "epsilon": outcome.epsilon,
        "delta": run.mechanism.delta,
        "steps_taken": outcome.steps,
        "mechanism": run.mechanism.to_dict(),
        "method": run.method,
        "physical_batch_size": outcome.physical_batch_size,
        "evaluated_on": run.held_out_name,
        "accuracy": outcome.score.accuracy,
        "loss": outcome.score.loss,
        "training_s": outcome.training_s,
        "trained_parameters": run.trainable.count,
        "parameters": run.trainable.total,
    }


def _evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """`evaluations` steps, evenly spread, the last one among them."""
    count = min(evaluations, steps)
    return {round(steps * (index + 1) / count) for index in range(count)}
