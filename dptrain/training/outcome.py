"""How a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dptrain.optim.wire import Wire
from dptrain.training.config import PUBLIC_SUBSPACE
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
    wire: Wire
    """Bytes that a step of each device sends."""


def summarise(outcome: Outcome) -> dict[str, Any]:
    """What `summary.json` holds."""
    run = outcome.run
    return {
        "private": run.has_guarantee,
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
        "compression": compression(run),
        "bytes_per_step": outcome.wire.to_dict(),
    }


def compression(run: Run) -> str:
    """What is kept of each gradient, in words; empty where that is everything."""
    config = run.config
    if config.compress == "none":
        return ""
    share = f"{config.subspace_rank} dimensions of each tensor"
    if config.compress != PUBLIC_SUBSPACE:
        of_all = "all coordinates" if config.compress.endswith("global-topk") else "each tensor"
        share = f"{100 * config.keep:g} % of {of_all}"
    when = "before clipping" if config.compress_before_clipping else "after the noise"
    memory = ", the rest is added to the next gradient" if config.error_feedback else ""
    return f"{config.compress}: {share}, {when}{memory}"
