"""Accuracy and epsilon over the steps of a run."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE_INCHES = (7.0, 4.2)
ACCURACY_COLOUR, EPSILON_COLOUR = "#1f5fa8", "#b3541e"


def draw_curves(metrics: Path, picture: Path) -> None:
    """Read the evaluations in a run's metrics.jsonl and write a PNG.

    Epsilon is left out where it is infinite.
    """
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
    evaluations = [record for record in map(json.loads, lines) if record["event"] == "evaluation"]
    steps = [record["step"] for record in evaluations]

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    left = figure.subplots()
    left.plot(
        steps,
        [100 * record["accuracy"] for record in evaluations],
        marker="o",
        color=ACCURACY_COLOUR,
    )
    left.set_xlabel("step")
    name = evaluations[-1]["on"] if evaluations else "test"
    left.set_ylabel(f"{name} accuracy (%)", color=ACCURACY_COLOUR)
    left.set_ylim(0, 100)
    left.set_xlim(left=0)
    left.grid(alpha=0.3)

    spent = [(record["step"], record["epsilon"]) for record in evaluations if record["epsilon"] is not None]
    if spent:
        right = left.twinx()
        right.plot(
            [0, *(step for step, _ in spent)],
            [0.0, *(epsilon for _, epsilon in spent)],
            "--",
            color=EPSILON_COLOUR,
        )
        right.set_ylabel("epsilon spent", color=EPSILON_COLOUR)
        right.set_ylim(bottom=0)
    FigureCanvasAgg(figure).print_png(str(picture))
