"""What is measured, as frozen data with a stable name."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Measure = Literal["throughput", "batch-size", "memory", "profile", "compile", "scaling", "accuracy"]

MEASURES: dict[str, str] = {
    "throughput": "examples per second, and the ratio to the best non-private way, interleaved with it",
    "batch-size": "the largest physical batch that fits a given memory, by bisection",
    "memory": "peak memory of a step, and what it is made of",
    "profile": "time by section of a step, and traces for TensorBoard and Perfetto",
    "compile": "how much longer the first step takes than later ones",
    "scaling": "throughput on several devices",
    "accuracy": "test accuracy of training runs over seeds",
}


@dataclass(frozen=True)
class Case:
    """One measurement. Equal cases have equal ids, in every process and version.

    Attributes:
        measure: what is measured, one of `MEASURES`.
        engine: ``torch`` or ``jax`` (ours), or a peer of ``dptrain.bench.engines``.
        method: a clipping method by any of its names, ``O-flat`` as well as ``per-example``.
        model: as ``dptrain train --model`` takes it, or ``gpt2-like``.
        image_size: pixels along a side (tokens for gpt2-like); of ``accuracy`` it is a setting.
        num_classes: of the head.
        batch_size: physical; where ``batch-size`` begins to look.
        accumulate: physical batches in a logical one.
        precision: fp32, tf32 or bf16.
        compile: with torch.compile, the private as well as the non-private way.
        channels_last: memory layout of images and convolutions.
        device: cpu, cuda, cuda:1.
        devices: how many of them, one process each.
        memory_gib: of ``batch-size``: the memory that there is.
        budget_mib: of the method ``auto``: its scratch memory.
        seconds: limit of the timed part, at which it ends after at least five rounds.
        seeds: of ``accuracy``: runs.
        settings: of ``accuracy``: ``(name, value)`` pairs of ``TrainConfig`` beside those above.
    """

    measure: Measure = "throughput"
    engine: str = "torch"
    method: str = "auto"
    model: str = "vit-tiny"
    image_size: int = 224
    num_classes: int = 100
    batch_size: int = 16
    accumulate: int = 16
    precision: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    device: str = "cpu"
    devices: int = 1
    memory_gib: float | None = None
    budget_mib: float | None = None
    seconds: float = 10.0
    seeds: int = 1
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        # Equal cases are written alike: 2 and 2.0 are one number, and settings have no order.
        for name in ("seconds", "memory_gib", "budget_mib"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        object.__setattr__(self, "settings", tuple(sorted((k, v) for k, v in self.settings)))

    @property
    def id(self) -> str:
        """A name for people, and eight digits that tell all cases apart."""
        said = {k: v for k, v in self.to_dict().items() if v != _DEFAULTS[k]}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]
        words = [self.measure, self.engine, self.method, self.model, f"{self.image_size}px"]
        words += [f"b{self.batch_size}", self.precision] + ["compiled"] * self.compile
        words += [self.device] + [f"x{self.devices}"] * (self.devices > 1)
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)) + "-" + digest

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` undoes it."""
        return dataclasses.asdict(self) | {"settings": [list(pair) for pair in self.settings]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Case:
        """Raises ValueError for a field that there is not."""
        if unknown := sorted(values.keys() - _DEFAULTS.keys()):
            raise ValueError(f"a case has no field {unknown[0]!r}; it has {', '.join(_DEFAULTS)}.")
        pairs = tuple((name, value) for name, value in values.get("settings", ()))
        return cls(**{**values, "settings": pairs})


def grid(base: Case, **lists: Sequence[Any]) -> list[Case]:
    """All combinations of the fields given as lists, the last varying fastest; equal cases once."""
    names = list(lists)
    combinations = itertools.product(*lists.values())
    return list(dict.fromkeys(dataclasses.replace(base, **dict(zip(names, c))) for c in combinations))


_DEFAULTS: dict[str, Any] = Case().to_dict()
