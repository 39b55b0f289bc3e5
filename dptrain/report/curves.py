"""Accuracy and epsilon over the steps of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE_INCHES = (7.0, 4.2)
LARGEST = 256 * 2**20
"""Bytes of metrics that are read."""
MOST = 1e15
"""Of a number that is drawn."""
ACCURACY_COLOUR, EPSILON_COLOUR = "#1f5fa8", "#b3541e"


def draw_curves(metrics: Path, picture: Path) -> None:
    """Read the evaluations in a run's metrics.jsonl and write a PNG.

    Epsilon is left out where it is infinite.
    """
    evaluations = _evaluations(metrics)
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


def _evaluations(metrics: Path) -> list[dict[str, Any]]:
    """Those that are whole: the run is over, and what another hand has written there is left out."""
    if not metrics.is_file() or metrics.stat().st_size > LARGEST:
        return []
    return [
        record
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        if '"evaluation"' in line and (record := _evaluation(line)) is not None
    ]


def _evaluation(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("event") != "evaluation":
        return None
    numbers = [record.get(name) for name in ("step", "accuracy")]
    if record.get("epsilon") is not None:
        numbers.append(record["epsilon"])
    is_whole = all(type(n) in (int, float) and 0 <= n < MOST for n in numbers) and "epsilon" in record
    is_named = isinstance(record.get("on"), str) and record["on"].isidentifier()
    return record if is_whole and is_named else None
