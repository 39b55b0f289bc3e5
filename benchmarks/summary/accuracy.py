"""From records of accuracy to rows of README.md and the tables of docs/accuracy.md."""

from __future__ import annotations

from typing import Any

from benchmarks.summary.tables import Record, Rows, table

KIND = "accuracy over seeds"
PARTS = {"head": "head only", "bias": "biases and head", "lora": "LoRA and head", "all": "all parameters"}


def rows(found: dict[str, Record]) -> Rows:
    """One line for each record, for the README."""
    lines = []
    for name, record in _records(found).items():
        first = record["rows"][0]
        shown = ", ".join(
            f"**{_percent(row['mean'])}** at {_budget(row)}"
            if row["private"]
            else f"{_percent(row['mean'])} non-private"
            for row in _by_budget(record)
        )
        seeds = len(first["seeds"])
        lines.append(
            f"| {_what(first)}, δ = {first['config']['delta']:g} | {shown}; test accuracy, "
            f"{'one seed' if seeds == 1 else f'mean of {seeds} seeds'} ([how](docs/accuracy.md)) | `results/{name}` |"
        )
    return lines


def mnist(found: dict[str, Record]) -> Rows:
    """Every private row on MNIST with its interval."""
    return _table({n: r for n, r in _records(found).items() if _data(r) == "mnist"})


def cifar(found: dict[str, Record]) -> Rows:
    """What is trained against epsilon, for CIFAR-100."""
    records = {n: r for n, r in _records(found).items() if _data(r) == "cifar100"}
    budgets = sorted(
        {row["config"]["epsilon"] for r in records.values() for row in r["rows"] if row["private"]}
    )
    lines = []
    for name, record in records.items():
        first = record["rows"][0]
        cells = []
        for budget in [*budgets, None]:
            fit = [r for r in record["rows"] if (r["config"]["epsilon"] if r["private"] else None) == budget]
            cells.append(_mean(fit[0]) if fit else "–")
        what, size = PARTS[first["config"]["trainable"]], first["config"]["image_size"]
        seeds = len(first["seeds"])
        lines.append(
            f"| {what} | {size} | {first['trained_parameters']:,} | {' | '.join(cells)} | {seeds} | `results/{name}` |"
        )
    head = [
        "trained",
        "pixels",
        "parameters",
        *(f"ε = {b:g}" for b in budgets),
        "non-private",
        "seeds",
        "record",
    ]
    return table(" | ".join(head), lines)


def _table(records: dict[str, Record]) -> Rows:
    lines = []
    for name, record in records.items():
        for row in _by_budget(record):
            low, high = row["interval95"] or (float("nan"), float("nan"))
            minutes = sum(row["training_s"]) / len(row["training_s"]) / 60
            lines.append(
                f"| `{record['recipe']}` | {_what(row)} | {_budget(row)} | **{_percent(row['mean'], 2)}** | "
                f"{_percent(low, 2)} to {_percent(high, 2)} | {', '.join(_percent(a, 2) for a in row['accuracies'])} | "
                f"{minutes:.1f} min | `results/{name}` |"
            )
    head = "recipe | what | budget | mean | 95 % interval | seeds | training | record"
    return table(head, lines)


def _records(found: dict[str, Record]) -> dict[str, Record]:
    return {name: record for name, record in found.items() if record.get("kind") == KIND}


def _data(record: Record) -> str:
    return record["rows"][0]["config"]["data"]


def _by_budget(record: Record) -> list[dict[str, Any]]:
    return sorted(record["rows"], key=lambda r: (not r["private"], r["config"]["epsilon"] or 0))


def _budget(row: dict[str, Any]) -> str:
    return f"ε = {row['config']['epsilon']:g}" if row["private"] else "non-private"


def _mean(row: dict[str, Any]) -> str:
    """The mean, and half of its interval where there is one."""
    if row["interval95"] is None:
        return _percent(row["mean"])
    return f"{_percent(row['mean'])[:-2]} ± {100 * (row['interval95'][1] - row['mean']):.1f} %"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %"


def _what(row: dict[str, Any]) -> str:
    config = row["config"]
    how = "from scratch"
    if config["features"] != "none":
        how = f"fixed {config['features']} features"
    if config["weights"]:
        how = f"ImageNet weights, {PARTS[config['trainable']]}, {config['image_size']} pixels"
    return f"{config['model']} on {config['data']} ({row['training_examples']:,} examples), {how}"
