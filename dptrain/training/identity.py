"""What must be the same when a run goes on, and how it differs if it is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dptrain.training.config import MACHINE_SETTINGS, ConfigError, TrainConfig
from dptrain.training.prepare import Run


def identity(run: Run) -> dict[str, Any]:
    """JSON-able: the data set by name and size, the mechanism, the trained parameters."""
    return {
        "data set": {"name": run.train.name, "size": len(run.train), "classes": run.train.num_classes},
        "mechanism": run.mechanism.to_dict(),
        "trained parameters": {
            name: f"{list(p.shape)} {p.dtype}"
            for name, p in run.learner.named_parameters()
            if p.requires_grad
        },
    }


def check_same_run(saved: dict[str, Any], run: Run) -> None:
    """Refuse to go on with another mechanism, data set or model.

    Raises:
        ConfigError: shows up to four differences.
    """
    found = list(differences(saved, identity(run)))
    if found:
        raise ConfigError(f"this is not the run that was saved: {_shown(found)}.")


def check_same_settings(saved: TrainConfig, asked: TrainConfig) -> None:
    """Refuse settings that would make it another run.

    Raises:
        ConfigError: shows up to four differences.
    """
    before, now = (
        {k: v for k, v in asdict(config).items() if k not in MACHINE_SETTINGS} for config in (saved, asked)
    )
    found = [
        f"--{name.replace('_', '-')} was {before[name]} and is {now[name]}"
        for name in before
        if before[name] != now[name]
    ]
    if found:
        raise ConfigError(f"a run is resumed with its own settings: {_shown(found)}; leave them out.")


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """One text for each place at which two trees of dictionaries and lists differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{where}, {key}" if where else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (one, other) in enumerate(zip(before, now)):
            yield from differences(one, other, f"{where} {number}")
    elif before != now:
        yield f"{where} was {before} and is {now}"


def _shown(found: list[str]) -> str:
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return "; ".join(found[:4]) + more
