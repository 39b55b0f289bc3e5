"""`dptrain privacy`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.markup import escape
from rich.table import Table

from dptrain.cli.terminal import Terminal
from dptrain.core import accounting, budget
from dptrain.core.ledger import Ledger, together
from dptrain.training.run_folder import LEDGER

BAD_INPUT_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError)
__all__ = ["BAD_INPUT_ERRORS", "run"]


def run(arguments: Sequence[str]) -> int:
    """Answer a question about a budget."""
    return tyro.cli(_privacy, prog="dptrain privacy", args=list(arguments))


def _privacy(
    *,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    sample_rate: float | None = None,
    logical_batch_size: float | None = None,
    dataset_size: int | None = None,
    accountant: Literal["pld", "rdp"] = "pld",
    ledger: tuple[Path, ...] = (),
    as_json: bool = False,
) -> int:
    """Epsilon, noise multiplier or steps from the other two, without training; or what ledgers have spent.

    Give two of --epsilon, --noise-multiplier and --steps (or --epochs), and either --sample-rate
    or --logical-batch-size with --dataset-size. Or give --ledger, and nothing is assumed: epsilon
    is that of the releases on record.

    Args:
        delta: The other half of the budget.
        epsilon: The budget.
        noise_multiplier: Standard deviation of the noise, in clip norms.
        steps: Optimizer steps.
        epochs: Expected passes over the data.
        sample_rate: Probability with which each example takes part in a step.
        logical_batch_size: Expected number of examples per step.
        dataset_size: Number of training examples.
        accountant: pld (tight) or rdp.
        ledger: Ledgers, or run folders that hold one; those of one data set are added up.
        as_json: Print JSON instead of a table.
    """
    if ledger:
        questions = (epsilon, noise_multiplier, steps, epochs, sample_rate, logical_batch_size, dataset_size)
        if any(given is not None for given in questions):
            raise ValueError("--ledger is answered from the record alone: give only --delta beside it.")
        return _spent(ledger, delta, accountant, as_json)
    answer = budget.solve(
        delta=delta,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        steps=steps,
        epochs=epochs,
        sample_rate=sample_rate,
        expected_batch_size=logical_batch_size,
        dataset_size=dataset_size,
        accountant=accountant,
    )
    described = answer.describe()
    if as_json:
        record = {
            "solved": answer.solved,
            "epsilon": answer.epsilon,
            "epochs": answer.epochs,
            "accountant": answer.accountant,
            "mechanism": answer.mechanism.to_dict(),
        }
        print(json.dumps(record, indent=2))
        return 0
    table = Table(title="Privacy", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in described.items():
        table.add_row(name, value)
    Terminal().print(f"[bold]{_answer(answer)}[/]")
    Terminal().print(table)
    return 0


def _spent(paths: Sequence[Path], delta: float, accountant: str, as_json: bool) -> int:
    """What the releases on record cost, by data set."""
    ledgers = [Ledger.read(path / LEDGER if path.is_dir() else path) for path in paths]
    found = [
        {
            "dataset": dataset,
            "epsilon": accounting.epsilon(segments, delta, neighbours, accountant),
            "delta": delta,
            "accountant": accountant,
            "neighbours": neighbours,
            "releases": sum(count for _, count in segments),
            "ledgers": [str(ledger.path) for ledger in ledgers if ledger.dataset == dataset],
        }
        for dataset, (segments, neighbours) in together(ledgers).items()
    ]
    if as_json:
        finite = [
            row | {"epsilon": row["epsilon"] if row["epsilon"] < float("inf") else None} for row in found
        ]
        print(json.dumps(finite, indent=2))
        return 0
    table = Table(title="Spent, by the releases on record", title_justify="left", box=None, pad_edge=False)
    for name in ("data set", "epsilon", "delta", "neighbouring relation", "releases", "ledgers"):
        table.add_column(name, overflow="fold")
    for row in found:
        spent = f"{row['epsilon']:.4f}", f"{row['delta']:g}"
        counts = f"{row['releases']:,}", str(len(row["ledgers"]))
        table.add_row(escape(row["dataset"]), *spent, row["neighbours"], *counts)
    Terminal().print(table)
    return 0


def _answer(answer: budget.Budget) -> str:
    mechanism = answer.mechanism
    return {
        "epsilon": f"epsilon = {answer.epsilon:.4f}",
        "noise_multiplier": f"noise multiplier = {mechanism.noise_multiplier:.4f}",
        "steps": f"steps = {mechanism.steps:,} ({answer.epochs:.4g} epochs)",
    }[answer.solved]
