"""One training run, from configuration to run folder."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from dptrain.core.ledger import Ledger
from dptrain.core.spec import StepSpec
from dptrain.training.config import ConfigError, TrainConfig
from dptrain.training.device import matmul_precision
from dptrain.training.evaluation import Score, evaluate
from dptrain.training.learner import Learner, TorchLearner
from dptrain.training.listener import Listener, Silent
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
        self.run, self.folder, self.listener = run, folder, listener
        self.spent = 0
        self.score: Score | None = None
        self.scored_at = -1
        self.learner = _learner(run)
        self.tensorboard: TensorBoard | None = None
        self.ledger = Ledger(folder.ledger)
        self.started = time.perf_counter()

    def run_to_end(self) -> Outcome:
        run, config = self.run, self.run.config
        size, trials = self.learner.get_ready(self.listener.compiles)
        self.listener.chose_physical_batch_size(size, trials)
        self.folder.create(config)
        self.tensorboard = open_tensorboard(self.folder.path) if config.tensorboard else None
        due = _evaluation_steps(run.mechanism.steps, config.evaluations)
        for step_number in due:
            # Accounting by PLD takes a good part of a second: done ahead, it slows no step.
            self._epsilon(step_number)
        interrupted = False
        self.started = time.perf_counter()
        try:
            for step in self.learner.steps(self._before_release):
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
        model = self.learner.model()
        self.score = evaluate(model, self.run.held_out, self.run.config.precision, self.run.device)
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
        self.learner.settle()
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


def _learner(run: Run) -> Learner:
    if run.config.engine == "torch":
        return TorchLearner(run)
    try:
        from dptrain.training.jax_learner import JaxLearner
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--engine jax needs {error.name}, which is not installed: pip install 'dptrain[jax]'."
        ) from error
    return JaxLearner(run)


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
        "engine": run.config.engine,
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
