"""Test accuracy of the recipes over several seeds, as one record for each row of docs/accuracy.md.

python -m benchmarks.accuracy mnist-scattering --seeds 3 --out results/accuracy-mnist-scattering.json
python -m benchmarks.accuracy vit-tiny-cifar100-head --epsilon 1 2 4 8 --non-private --weights FILE --out ...

Each run is one of the recipe with --seed, evaluated once, on the test set, by which nothing was chosen: what
was, and on which split, is told in docs/accuracy.md. The record is written after every run, and what it has
already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import command, save
from dptrain.bench.measures.accuracy import interval95
from dptrain.recipes import recipe
from dptrain.training import TrainConfig, train
from dptrain.training.outcome import Outcome

KIND = "accuracy over seeds"
PLACES = ("data_dir", "weights", "out", "keep_features")


def main() -> None:
    asked = _arguments()
    record = _begun(asked.out) or {
        "kind": KIND,
        "commit": _commit(),
        "command": command("benchmarks.accuracy"),
        "torch": torch.__version__,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "device": asked.device},
        "recipe": asked.recipe,
        "rows": [],
    }
    if record["rows"]:
        again = [_commit(), command("benchmarks.accuracy")]
        record["continued_by"] = [*record.get("continued_by", []), again]
    for config in _variants(asked):
        row = _row(record, config)
        for seed in range(asked.seeds):
            if seed not in row["seeds"]:
                _add(row, seed, _trained(replace(config, seed=seed)))
                save(record, asked.out)
        print(_told(row), flush=True)


def _variants(asked: argparse.Namespace) -> list[TrainConfig]:
    """The recipe at each epsilon asked for, and without privacy."""
    base = replace(
        recipe(asked.recipe),
        weights=asked.weights,
        keep_features=asked.keep_features,
        device=asked.device,
        evaluations=1,
    )
    if asked.validation_fraction:
        base = replace(base, validation_fraction=asked.validation_fraction)
    budgets = asked.epsilon or [base.epsilon]
    changes: list[dict[str, Any]] = [{"epsilon": epsilon} for epsilon in budgets]
    changes += [{"method": "non-private"}] * asked.non_private
    rates = asked.lr or [base.lr] * len(changes)
    if len(rates) != len(changes):
        raise SystemExit(f"--lr takes {len(changes)} learning rates: of each epsilon, then of --non-private.")
    return [replace(base, **change, lr=lr) for change, lr in zip(changes, rates)]


def _trained(config: TrainConfig) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        return train(replace(config, out=Path(folder) / "run"))


def _row(record: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """The row of the record for this configuration; a new one if there is none."""
    settings = {name: None if name in (*PLACES, "seed") else v for name, v in config.to_dict().items()}
    if config.weights is not None:
        settings["weights"] = config.weights.name  # where it lay is nobody's business
    for row in record["rows"]:
        if row["config"] == settings:
            return row
    columns = ("seeds", "accuracies", "losses", "epsilons", "training_s")
    record["rows"].append({"config": settings} | {name: [] for name in columns})
    return record["rows"][-1]


def _add(row: dict[str, Any], seed: int, outcome: Outcome) -> None:
    run = outcome.run
    row["seeds"].append(seed)
    row["accuracies"].append(outcome.score.accuracy)
    row["losses"].append(outcome.score.loss)
    row["epsilons"].append(outcome.epsilon if run.is_private else None)
    row["training_s"].append(outcome.training_s)
    row["mean"] = statistics.fmean(row["accuracies"])
    row["interval95"] = interval95(row["accuracies"])
    row |= {
        "private": run.is_private,
        "evaluated_on": run.held_out_name,
        "training_examples": len(run.train),
        "trained_parameters": sum(p.numel() for p in run.learner.parameters() if p.requires_grad),
        "mechanism": run.mechanism.to_dict(),
        "finished": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _told(row: dict[str, Any]) -> str:
    epsilon = f"epsilon {max(row['epsilons']):.3f}" if row["private"] else "non-private"
    interval = (
        ""
        if row["interval95"] is None
        else " ({:.2f} to {:.2f})".format(*(100 * end for end in row["interval95"]))
    )
    return f"{epsilon}: {100 * row['mean']:.2f} %{interval} over {len(row['seeds'])} seeds"


def _begun(path: Path | None) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path is not None and path.exists() else None


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row, with the seeds 0, 1, ...")
    parser.add_argument("--epsilon", type=float, nargs="+", help="by default the recipe's")
    parser.add_argument("--lr", type=float, nargs="+", help="of each epsilon, then of --non-private")
    parser.add_argument("--non-private", action="store_true", help="also without clipping and noise")
    parser.add_argument("--weights", type=Path, help="of a pre-trained model")
    parser.add_argument("--keep-features", type=Path, help="as of dptrain train")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--validation-fraction", type=float, default=0.0, help="tell without the test set")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
