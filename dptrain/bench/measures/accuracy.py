"""Test accuracy of whole training runs, one for each seed."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from scipy import stats

from dptrain.bench.case import Case
from dptrain.bench.contestant import Unsupported
from dptrain.bench.engines import OURS, check_device
from dptrain.data import DataError
from dptrain.models import ModelError
from dptrain.training import TrainConfig, train
from dptrain.training.train import Outcome


def accuracy(case: Case) -> dict[str, Any]:
    """Accuracies and epsilons of runs with the seeds 0, 1, ...: reproducible, on public data.

    Raises:
        Unsupported: a peer, of which only steps are measured.
        ConfigError: settings that no run can have.
    """
    if case.engine not in OURS:
        raise Unsupported(f"whole runs are trained by {' and '.join(OURS)} alone.")
    check_device(case)
    if case.devices > 1:
        raise Unsupported("several devices are not supported yet.")
    accuracies, epsilons, seconds, curves = [], [], [], []
    guarantee, wire = True, {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(case.seeds):
            outcome = _trained(case, config(case, seed, Path(folder) / str(seed)))
            accuracies.append(outcome.score.accuracy)
            epsilons.append(outcome.epsilon if math.isfinite(outcome.epsilon) else None)
            seconds.append(outcome.training_s)
            curves.append(curve(outcome))
            guarantee, wire = outcome.run.has_guarantee, outcome.wire.to_dict()
    return {
        "guarantee": guarantee,
        "bytes_per_step": wire,
        "curves": curves,
        "accuracies": accuracies,
        "epsilons": epsilons,
        "raw_seconds": seconds,
        "mean": statistics.fmean(accuracies),
        "interval95": interval95(accuracies),
    }


def curve(outcome: Outcome) -> list[dict[str, float | None]]:
    """What was seen at each evaluation: steps, expected epochs, epsilon (None: infinite), accuracy."""
    mechanism = outcome.run.mechanism
    epochs = list(itertools.accumulate(spec.sample_rate for spec, n in mechanism.segments for _ in range(n)))
    return [
        {
            "step": event["step"],
            "epochs": epochs[event["step"] - 1],
            "epsilon": event["epsilon"],
            "accuracy": event["accuracy"],
        }
        for event in outcome.folder.evaluations()
    ]


def _trained(case: Case, config: TrainConfig) -> Outcome:
    try:
        return train(config)
    except DataError as error:  # what a machine lacks
        raise Unsupported(str(error)) from error
    except ModelError as error:
        if case.engine == "jax":  # which has fewer models
            raise Unsupported(str(error)) from error
        raise


def config(case: Case, seed: int, out: Path) -> TrainConfig:
    """The run of one seed."""
    usual = {"evaluations": 1}
    return TrainConfig.from_dict(usual | own_settings(case, seed, out) | dict(case.settings))


def own_settings(case: Case, seed: int, out: Path) -> dict[str, Any]:
    """What the fields of a case say of a run."""
    return {
        "engine": case.engine if case.engine in OURS else "torch",
        "method": case.method,
        "model": case.model,
        "physical_batch_size": case.batch_size,
        "precision": case.precision,
        "compile": case.compile,
        "device": case.device,
        "seed": seed,
        "out": str(out),
    }


def interval95(values: list[float]) -> list[float] | None:
    """Of the mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
    half = stats.t.ppf(0.975, len(values) - 1) * error
    return [mean - half, mean + half]
