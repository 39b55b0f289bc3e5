"""From records of accuracy to rows of README.md and the tables of docs/accuracy.md."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.summary.tables import Record, Rows, table

KIND = "accuracy over seeds"
PARTS = {"head": "head only", "bias": "biases and head", "lora": "LoRA and head", "all": "all parameters"}


def rows(found: dict[str, Record]) -> Rows:
    """One line for each record of several seeds, for the README."""
    lines = []
    for name, record in _records(found).items():
        first, shown = record["rows"][0], []
        if len(first["seeds"]) < 3:
            continue
        for row in _by_budget(record):
            mean = _percent(row["mean"], 2 if row["mean"] > 0.9 else 1)
            shown.append(f"**{mean}** at {_budget(row)}" if row["private"] else f"{mean} non-private")
        lines.append(
            f"| {_what(first)}, δ = {first['config']['delta']:g} | {', '.join(shown)}; test accuracy, "
            f"mean of {len(first['seeds'])} seeds ([how](docs/accuracy.md)) | `results/{name}` |"
        )
    return lines


def mnist(found: dict[str, Record]) -> Rows:
    """Every row on MNIST with its interval, for docs/accuracy.md."""
    lines = []
    for name, record in _records(found, "mnist").items():
        for row in _by_budget(record):
            interval = "–"
            if row["interval95"] is not None:
                interval = " to ".join(_percent(end, 2) for end in row["interval95"])
            each = ", ".join(_percent(accuracy, 2) for accuracy in row["accuracies"])
            mean, minutes = _percent(row["mean"], 2), statistics.fmean(row["training_s"]) / 60
            lines.append(
                f"| `{record['recipe']}` | {_budget(row)} | **{mean}** | {interval} | {each} | "
                f"{minutes:.1f} min | `results/{name}` |"
            )
    return table("recipe | budget | mean | 95 % interval | seeds | training | record", lines)


def cifar(found: dict[str, Record]) -> Rows:
    """What is trained against epsilon, on CIFAR-100, for docs/accuracy.md."""
    records = _records(found, "cifar100")
    private = [row for record in records.values() for row in record["rows"] if row["private"]]
    budgets = sorted({row["config"]["epsilon"] for row in private})
    lines = []
    for name, record in records.items():
        by_budget = {row["config"]["epsilon"] if row["private"] else None: row for row in record["rows"]}
        cells = [_mean(by_budget[b]) if b in by_budget else "–" for b in (*budgets, None)]
        first = record["rows"][0]
        config, trained = first["config"], first["trained_parameters"]
        lines.append(
            f"| {_part(config)} | {config['image_size']} | {trained:,} | {' | '.join(cells)} | "
            f"{len(first['seeds'])} | `results/{name}` |"
        )
    shown = [f"ε = {budget:g}" for budget in budgets]
    head = ["trained", "pixels", "parameters", *shown, "non-private", "seeds", "record"]
    return table(" | ".join(head), lines)


def _records(found: dict[str, Record], data: str | None = None) -> dict[str, Record]:
    """Those of accuracy, of one data set if it is named."""
    ours = {name: record for name, record in found.items() if record.get("kind") == KIND}
    return {n: r for n, r in ours.items() if data in (None, r["rows"][0]["config"]["data"])}


def _by_budget(record: Record) -> list[dict[str, Any]]:
    return sorted(record["rows"], key=lambda r: (not r["private"], r["config"]["epsilon"] or 0))


def _budget(row: dict[str, Any]) -> str:
    return f"ε = {row['config']['epsilon']:g}" if row["private"] else "non-private"


def _mean(row: dict[str, Any]) -> str:
    """The mean, and half of its interval where there is one."""
    if row["interval95"] is None:
        return _percent(row["mean"])
    return f"{100 * row['mean']:.1f} ± {100 * (row['interval95'][1] - row['mean']):.1f} %"


def _part(config: dict[str, Any]) -> str:
    """What is trained."""
    frozen = config.get("frozen_blocks")
    return PARTS[config["trainable"]] + (f", {frozen} blocks frozen" if frozen else "")


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _what(row: dict[str, Any]) -> str:
    config = row["config"]
    how = "from scratch"
    if config["features"] != "none":
        how = f"on fixed {config['features']} features"
    if config["weights"]:
        how = f"ImageNet weights, {_part(config)}, {config['image_size']} pixels"
    return f"{config['model']} on {config['data']} ({row['training_examples']:,} examples), {how}"
