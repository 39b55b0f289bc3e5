"""A run from where it is to its end, or to where it is interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from dptrain.core import durable
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.releases import NotTheSame, Releases
from dptrain.core.remembered import Consulted, recalling
from dptrain.core.shared_releases import SharedReleases
from dptrain.core.team import RankLost
from dptrain.torch.ranks import ALONE, Ranks
from dptrain.training import secret
from dptrain.training.checkpoint import Checkpoint, Checkpoints, write
from dptrain.training.config import ConfigError
from dptrain.training.evaluation import Score, evaluate
from dptrain.training.facts import Facts
from dptrain.training.identity import identity
from dptrain.training.interruption import undisturbed
from dptrain.training.learner import Learner, State, TorchLearner
from dptrain.training.listener import Listener
from dptrain.training.loop import Step
from dptrain.training.outcome import Outcome, summarise
from dptrain.training.pace import Pace
from dptrain.training.prepare import Run
from dptrain.training.run_folder import RunFolder
from dptrain.training.saved import Saved, clear_unstarted, fixed_tensors
from dptrain.training.tensorboard import TensorBoard, open_tensorboard


class StorageError(ValueError):
    """The run stopped because its files could not be written. The message says how to go on."""


class Session:
    """The moving parts of one run, in one process."""

    def __init__(
        self, run: Run, folder: RunFolder, saved: Saved | None, listener: Listener, ranks: Ranks = ALONE
    ) -> None:
        self.run, self.folder, self.saved, self.listener, self.ranks = run, folder, saved, listener, ranks
        self.score: Score | None = None
        self.scored_at = -1
        self.learner = _learner(run)
        self.tensorboard: TensorBoard | None = None
        self.checkpoints = Checkpoints(folder.checkpoints)
        self.pace = Pace(run.config.checkpoint_every)
        self.measured: Consulted = saved.facts.measured if saved else {}
        self.trained_s: float = saved.facts.training_s if saved else 0.0
        self.started = time.perf_counter()
        self.size = 0
        self.ledger: Ledger
        self.releases: Releases | SharedReleases

    def run_to_end(self) -> Outcome:
        """Take the steps that are left, and leave everything in the run folder."""
        with recalling(self.measured):  # of a resumed run: another plan would round differently
            self.size, trials = self.learner.get_ready(self.listener.compiles)
            self.listener.chose_physical_batch_size(self.size, trials)
            with self._new_ledger() if self.saved is None else self.saved.ledger as self.ledger:
                self._begin() if self.saved is None else self._go_on(self.saved)
                try:
                    if not self.ranks.alone:
                        self._gather_ranks()
                    return self._to_end()
                except KeyboardInterrupt as error:  # in the beginning, or in what an earlier one led to
                    raise KeyboardInterrupt(f"Interrupted. {self._how_to_go_on()}") from error

    def _gather_ranks(self) -> None:
        """Those that follow get the plan, the weights and all that the next step depends on."""
        self.ranks.tell({"size": self.size, "measured": self.measured})
        assert isinstance(self.learner, TorchLearner) and isinstance(self.releases, Releases)
        self.learner.join(self.ranks)
        own = self.releases
        self.releases = SharedReleases(lambda: own, self.ranks)

    def _new_ledger(self) -> Ledger:
        """The run folder, its configuration and its ledger."""
        config = self.run.config
        if self.run.key.reproducible:  # what was measured for it may come out otherwise next time
            config = replace(config, physical_batch_size=self.size)
        clear_unstarted(self.folder)
        with self._storage():
            self.folder.create(config)
            return Ledger.create(
                self.folder.ledger,
                dataset=config.dataset_name or config.data,
                neighbours=self.run.mechanism.neighbours,
            )

    def _begin(self) -> None:
        """Nothing is released before there is a checkpoint to begin again from."""
        with self._storage():
            secret.store(self.run, self.ledger, self.run.key)
            self.folder.checkpoints.mkdir(exist_ok=True)
            write(self.folder.fixed, fixed_tensors(self.run.model), {"run": self.ledger.run})
        self._checkpoint()
        self.releases = self._releases(self.run.key)
        self._open_tensorboard()

    def _go_on(self, saved: Saved) -> None:
        facts, made = saved.facts, len(self.ledger.releases)
        self.learner.restore(saved.checkpoint.step, State(saved.checkpoint.tensors, facts.learner))
        with self._storage():
            for folder in (self.folder.path, self.folder.checkpoints):
                durable.remove_unfinished(folder)
            self.folder.cut_metrics(facts.metrics_bytes)
            key, note = secret.stored(self.run, self.ledger)
        self.releases = self._releases(key)
        self._open_tensorboard()
        self._record({"event": "resumed", "step": self.learner.taken, "releases": made})
        self.listener.resumed(self.learner.taken, made - facts.ledger.length, self.releases.repeats)
        for text in (*saved.notes, *([note] if note else [])):
            self.listener.noted(text)

    def _releases(self, key: Key) -> Releases:
        return Releases(self.run.mechanism, self.ledger, key, repeats=secret.repeats(self.run))

    def _to_end(self) -> Outcome:
        made = len(self.ledger.releases)
        due = _evaluation_steps(self.run.mechanism.steps, self.run.config.evaluations)
        for number in due:
            # Accounting by PLD takes a good part of a second: done ahead, it slows no step.
            self._epsilon(max(0, made + number - self.learner.taken))
        self.started = time.perf_counter()
        try:
            while self.releases.may_go_on(self.learner.taken):
                try:
                    self._take_steps(due)
                except NotTheSame:
                    self.releases.draw_afresh()
                    with self._storage():
                        secret.store(self.run, self.ledger, self.releases.key)
                    self.listener.noted(
                        f"Step {self.learner.taken + 1} did not come out as before, bit for bit: it and "
                        "those after it are drawn afresh and paid for."
                    )
        except KeyboardInterrupt:
            with undisturbed(but_by_hand=self.ranks.alone):
                return self._finish(interrupted=True)
        except RankLost as lost:
            with undisturbed():
                if self.learner.is_whole:
                    self._checkpoint()
            raise RankLost(f"{lost} {self._how_to_go_on()}") from lost
        except StorageError:
            raise
        except Exception:
            # What has been paid for is kept, whatever went wrong.
            if self.ledger.releases:
                self._finish(interrupted=True)
            raise
        return self._finish(interrupted=False)

    def _take_steps(self, due: set[int]) -> None:
        """Take steps until the run ends, the budget is spent, or a step does not come out as before."""

        def before_release(*step: Any) -> None:
            with self._storage():
                self.releases.before(*step)

        for step in self.learner.steps(self.releases.key, before_release):
            self._took(step, due)
            if not self.releases.may_go_on(step.number):
                return

    def _took(self, step: Step, due: set[int]) -> None:
        epsilon = self._epsilon(len(self.ledger.releases))
        self.listener.stepped(step, epsilon, self._examples_per_s())
        if step.unprotected is not None:
            self._record({"event": "unprotected", "step": step.number, **asdict(step.unprotected)})
        if step.number in due:
            self._evaluate(epsilon)
        due_now = self.pace.is_due(step.number)
        if isinstance(self.learner, TorchLearner) and self.learner.shares_out:
            self.ranks.tell(due_now)
            if due_now:
                self.learner.gather()
        if due_now:
            self._checkpoint()

    def _checkpoint(self) -> None:
        with self._storage(), self.pace.writing(self.learner.taken):
            state = self.learner.state()
            facts = Facts(
                identity=identity(self.run),
                ledger=self.ledger.mark,
                learner=state.numbers,
                measured=self.measured,
                metrics_bytes=self.folder.metrics_bytes(),
                physical_batch_size=self.size,
                training_s=self._training_s(),
            )
            self.checkpoints.save(Checkpoint(self.learner.taken, facts.to_dict(), state.tensors))

    def _epsilon(self, releases: int) -> float:
        """Epsilon of so many releases; between evaluations an upper bound, which is cheap."""
        mechanism, config = self.run.mechanism, self.run.config
        releases = min(releases, mechanism.steps)
        if config.accountant == "rdp":
            return mechanism.epsilon(steps=releases, accountant="rdp")
        return mechanism.epsilon_so_far(releases, points=config.evaluations)

    def _training_s(self) -> float:
        """In all processes that this run had."""
        return self.trained_s + time.perf_counter() - self.started

    def _examples_per_s(self) -> float:
        return self.run.mechanism.expected_examples(self.learner.taken) / self._training_s()

    def _evaluate(self, epsilon: float) -> None:
        model = self.learner.model()
        self.score = evaluate(model, self.run.held_out, self.run.config.precision, self.run.device)
        self.scored_at = self.learner.taken
        self.listener.evaluated(self.scored_at, self.score, epsilon)
        self._record(
            {
                "event": "evaluation",
                "step": self.scored_at,
                "epsilon": epsilon,
                "on": self.run.held_out_name,
                "accuracy": self.score.accuracy,
                "loss": self.score.loss,
                "elapsed_s": self._training_s(),
            }
        )

    def _open_tensorboard(self) -> None:
        if self.run.config.tensorboard:
            self.tensorboard = open_tensorboard(self.folder.path)

    def _record(self, record: dict[str, Any]) -> None:
        with self._storage():
            self.folder.append_metrics(record)
            if self.tensorboard is not None:
                self.tensorboard.write(record)

    def _finish(self, interrupted: bool) -> Outcome:
        run, taken = self.run, self.learner.taken
        training_s = self._training_s()
        if self.learner.is_whole:
            self._checkpoint()
        self.learner.settle()
        with self._storage():
            self.folder.save_model(run.model)
        epsilon = self.ledger.epsilon(run.config.delta, run.config.accountant)
        if self.scored_at != taken or self.score is None:
            self._evaluate(epsilon)
        assert self.score is not None
        outcome = Outcome(
            run=run,
            folder=self.folder,
            steps=taken,
            releases=len(self.ledger.releases),
            epsilon=epsilon,
            score=self.score,
            interrupted=interrupted,
            physical_batch_size=self.size,
            training_s=training_s,
            wire=self.learner.wire(),
        )
        with self._storage():
            self.folder.save_summary(summarise(outcome))
            if self.tensorboard is not None:
                self.tensorboard.close()
            if not interrupted:
                secret.remove(self.ledger)
                self.checkpoints.remove()
        return outcome

    @contextmanager
    def _storage(self) -> Iterator[None]:
        """Around what writes files: a full or failing disk in one sentence."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"the run's files cannot be written ({error.strerror or error}): make room. "
                + self._how_to_go_on()
            ) from error

    def _how_to_go_on(self) -> str:
        return f"What was released is on record: go on with --resume {self.folder.path}."


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


def _evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """`evaluations` steps, evenly spread, the last one among them."""
    count = min(evaluations, steps)
    return {round(steps * (index + 1) / count) for index in range(count)}
