"""`dptrain evaluate RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape

from dptrain.cli.errors import BAD_INPUT_ERRORS
from dptrain.cli.terminal import Terminal
from dptrain.training.rescore import rescore

__all__ = ["BAD_INPUT_ERRORS", "run"]


def run(arguments: Sequence[str]) -> int:
    """Score a finished run's saved model on its held-out examples."""
    return tyro.cli(_evaluate, prog="dptrain evaluate", args=list(arguments))


def _evaluate(
    run: Annotated[Path, tyro.conf.Positional],
    /,
    data_dir: Path | None = None,
    device: str = "auto",
) -> int:
    """Score the model of a finished run on the examples that the run did not train on.

    Args:
        run: The run folder.
        data_dir: Where data sets lie; by default as in the run.
        device: cuda, cpu, ..., or auto.
    """
    console = Terminal()
    with console.status(escape(f"Scoring {run} ...")):
        folder, name, score = rescore(run, data_dir, device)
    folder.save_summary({"on": name, **asdict(score)}, "evaluation.json")
    console.print(
        f"{name} accuracy [bold]{score.accuracy:.2%}[/], loss {score.loss:.4f}, {score.examples:,} examples"
    )
    console.print(escape(f"written to {folder.path / 'evaluation.json'}"), highlight=False)
    return 0
