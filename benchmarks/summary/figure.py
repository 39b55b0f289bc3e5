"""Speed against non-private training as a picture, from records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import (
    SAME_PRODUCTS,
    baseline_of,
    best,
    bookkeeping,
    case_title,
    of_kind,
    ours,
    plain,
    private_of,
    throughput,
    title,
)

DARK, LIGHT, GREY, PALE = "#1b6ca8", "#7fb2d9", "#9a9a9a", "#d0d0d0"
#: label, colour, and whom it shows
SERIES = (
    ("dptrain, auto", DARK, ours),
    ("dptrain, book-keeping", LIGHT, bookkeeping),
    ("Opacus", GREY, lambda record: best(record, "opacus", "opacus-ghost")),
    ("FastDP", PALE, lambda record: best(record, "fastdp")),
)
INK = {DARK: "white", LIGHT: "black", GREY: "white", PALE: "black"}
HEIGHT = 0.8


def draw(found: dict[str, dict[str, Any]], path: Path, device: str = "cpu") -> None:
    """Bars per model; a tick where the roofline ends; hatched where parameters are left out."""
    records = list(of_kind(found, "speed", device).values())
    if not records:
        return
    bounds = {
        n: c["ratio_allowed"]
        for r in of_kind(found, "roofline", device).values()
        for n, c in r["cases"].items()
    }
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.75 * len(records)))
    for place, record in enumerate(records):
        bars(axis, place, record)
        bound = bounds.get(record["case"]["name"])
        if bound and plain(record):
            axis.plot([bound] * 2, [place - HEIGHT / 2, place + HEIGHT / 2], color="#c0392b", linewidth=2)
    axis.plot([], [], color="#c0392b", linewidth=2, label="the roofline")
    for label, colour, who in SERIES:
        if any(who(record) for record in records):
            axis.barh([0], [0], color=colour, label=label)
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--")
    axis.set_xlim(0, 1.08)
    axis.set_xlabel("speed relative to the best non-private training")
    save(figure, axis, [title(record) for record in records], path)


def save(figure: Figure, axis: Axes, labels: list[str], path: Path) -> None:
    """With a label for each bar from the top, and the legend above."""
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5, frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bar(axis: Axes, value: float, where: float, height: float, colour: str, **look: Any) -> None:
    """One bar, and its value within."""
    axis.barh(where, value, 0.92 * height, color=colour, **look)
    axis.text(value - 0.01, where, f"{value:.2f}", ha="right", va="center", fontsize=7, color=INK[colour])


def bars(axis: Axes, place: int, record: dict[str, Any]) -> None:
    """Those that were measured, side by side, the middle of them at ``place``."""
    shown = [(colour, each) for _, colour, who in SERIES if (each := who(record)) is not None]
    height = HEIGHT / max(1, len(shown))
    for i, (colour, (_, result)) in enumerate(shown):
        skipped = (result.get("float64") or {}).get("skipped")
        where = place + (i - (len(shown) - 1) / 2) * height
        hatch = {"hatch": "///", "edgecolor": "white"} if skipped else {}
        bar(axis, result["ratio_to_non_private"], where, height, colour, **hatch)


def draw_benched(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Examples per second of each case, of PyTorch's ordinary training as one."""
    records = list(throughput(found).values())
    if not records:
        return
    figure, axis = plt.subplots(figsize=(8, 0.9 + 0.55 * len(records)))
    for place, record in enumerate(records):
        mine, own, same = private_of(record), baseline_of(record), baseline_of(record, SAME_PRODUCTS)
        shown = [(mine, DARK)] + ([] if same is None else [(same[1], PALE)])
        height = HEIGHT / len(shown)
        for i, (contestant, colour) in enumerate(shown):
            value = own[1]["logical_step_s"] / contestant["logical_step_s"]
            bar(axis, value, place + (i - (len(shown) - 1) / 2) * height, height, colour)
    axis.barh([0], [0], color=DARK, label="private, dptrain auto")
    axis.barh([0], [0], color=PALE, label="non-private, with dptrain's matrix products")
    axis.axvline(1.0, color="black", linewidth=1, linestyle="--", label="non-private, PyTorch's best")
    axis.set_xlabel("speed relative to PyTorch's best non-private training")
    save(figure, axis, [case_title(record["case"]) for record in records], path)
