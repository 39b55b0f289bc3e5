"""`dptrain privacy`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import tyro
from rich.table import Table

from dptrain.cli.terminal import Terminal
from dptrain.core import budget

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
    as_json: bool = False,
) -> int:
    """Epsilon, noise multiplier or steps from the other two, without training.

    Give two of --epsilon, --noise-multiplier and --steps (or --epochs), and either --sample-rate
    or --logical-batch-size with --dataset-size.

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
        as_json: Print JSON instead of a table.
    """
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


def _answer(answer: budget.Budget) -> str:
    mechanism = answer.mechanism
    return {
        "epsilon": f"epsilon = {answer.epsilon:.4f}",
        "noise_multiplier": f"noise multiplier = {mechanism.noise_multiplier:.4f}",
        "steps": f"steps = {mechanism.steps:,} ({answer.epochs:.4g} epochs)",
    }[answer.solved]
