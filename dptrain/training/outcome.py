"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dptrain.training.evaluation import Score
from dptrain.training.prepare import Run
from dptrain.training.run_folder import RunFolder


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Run
    folder: RunFolder
    steps: int
    """Steps that the weights have taken."""
    releases: int
    """Noisy gradients that have been made of the data; more than `steps` if lost ones were drawn again."""
    epsilon: float
    """Spent at the run's delta, by the ledger; infinite if not private."""
    score: Score
    interrupted: bool
    physical_batch_size: int
    training_s: float


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
        "releases": outcome.releases,
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
