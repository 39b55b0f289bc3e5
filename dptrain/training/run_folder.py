"""The files of a run."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from dptrain.core import durable
from dptrain.models.weights import read_tensors
from dptrain.training.checkpoint import FIXED
from dptrain.training.config import ConfigError, TrainConfig, read_config

CONFIG, METRICS, WEIGHTS, SUMMARY, LEDGER, CURVES, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "summary.json",
    "ledger.jsonl",
    "curves.png",
    "checkpoints",
)


class RunFolder:
    """A folder that holds one run: configuration, metrics, record of releases, weights, summary."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def plan(cls, config: TrainConfig) -> RunFolder:
        """The folder that a run will write to; nothing is made yet.

        Raises ConfigError if it holds a run already: a run is never overwritten.
        """
        path = config.out or Path("runs") / _default_name(config)
        if (path / CONFIG).exists():
            raise ConfigError(
                f"{path} already holds a run; choose another --out, or go on with --resume {path}."
            )
        return cls(path)

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write the configuration that repeats the run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"The run folder {self.path} cannot be made ({error.strerror}); choose another --out."
            ) from error
        # A repeat must not fall into this folder.
        self._write(CONFIG, config.to_dict() | {"out": None})

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises ConfigError if there is none."""
        for name in (CONFIG, WEIGHTS):
            if not (path / name).is_file():
                raise ConfigError(f"{path} is not a finished run: it has no {name}.")
        return cls(path)

    @property
    def config(self) -> TrainConfig:
        return read_config(self.path / CONFIG)

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def ledger(self) -> Path:
        return self.path / LEDGER

    @property
    def checkpoints(self) -> Path:
        """The folder of what an unfinished run goes on from."""
        return self.path / CHECKPOINTS

    @property
    def fixed(self) -> Path:
        """What an unfinished run has and does not train."""
        return self.checkpoints / FIXED

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end: what an interrupted one has is a summary that says so."""
        try:
            summary = json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
            return not summary["interrupted"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one JSON line; an infinite or undefined number becomes null."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def metrics_bytes(self) -> int:
        """How long the metrics are."""
        path = self.path / METRICS
        return path.stat().st_size if path.exists() else 0

    def evaluations(self) -> list[dict[str, Any]]:
        """What the metrics say of each evaluation, in order."""
        lines = (self.path / METRICS).read_text(encoding="utf-8").splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == "evaluation"]

    def cut_metrics(self, size: int) -> None:
        """Leave the first `size` bytes: what came after belongs to steps that are taken again."""
        path = self.path / METRICS
        content = path.read_bytes()[:size] if path.exists() else b""
        durable.write(path, content[: content.rfind(b"\n") + 1])

    def save_model(self, model: nn.Module) -> None:
        """Write all parameters and buffers, shared ones once under each name."""
        state = {
            name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()
        }
        with durable.replacing(self.weights) as scratch:
            try:
                save_file(state, scratch)
            except SafetensorError as error:  # what its library makes of a full disk
                raise OSError(None, str(error), str(self.weights)) from error

    def load_model(self, model: nn.Module) -> None:
        """Read what `save_model` wrote into a model of the same making, in place."""
        try:
            model.load_state_dict(read_tensors(self.weights, model))
        except RuntimeError as error:
            raise ConfigError(
                f"{self.weights} does not fit the model that the run's configuration describes "
                f"({str(error).strip().splitlines()[0].rstrip('.')}); use the version of the libraries "
                "that made it."
            ) from error

    def save_summary(self, summary: dict[str, Any], name: str = SUMMARY) -> None:
        self._write(name, summary)

    def _write(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(_finite(content), indent=2, allow_nan=False)
        durable.write(self.path / name, (text + "\n").encode())


def _default_name(config: TrainConfig) -> str:
    data, model = (re.sub(r"[^\w.-]+", ".", Path(name).name) for name in (config.data, config.model))
    return f"{data}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
