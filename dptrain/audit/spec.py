"""What is audited and how, as frozen data with a stable name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dptrain.audit import subjects
from dptrain.audit.scenes import SCENES
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

Kind = Literal["white-box", "one-run", "final-model"]

KINDS: dict[str, str] = {
    "white-box": "one run with thousands of canaries and an adversary who sees every noisy gradient",
    "one-run": "the same, with bounds that suppose nothing but fair coins",
    "final-model": "many short trainings with and without one canary, told apart by their last weights",
}
#: enough for what each kind can show, in about a minute on two cores
_CANARIES = {"white-box": 100_000, "one-run": 20_000, "final-model": 0}
_RUNS = {"white-box": 1, "one-run": 1, "final-model": 400}


@dataclass(frozen=True)
class Audit:
    """One audit. Equal audits have equal ids.

    Attributes:
        kind: one of `KINDS`.
        engine: ``torch`` or ``jax``, or a peer.
        method: a clipping method by any of its names, or a peer's mode.
        epsilon, delta: what is claimed; the noise is calibrated to it.
        steps, sample_rate, clip_norm: of the mechanism.
        canaries: of white-box and one-run; None for as many as the kind wants.
        runs: of final-model, in each scene; None likewise.
        scenes: of final-model: names of ``dptrain.audit.scenes.SCENES``.
        confidence: of the whole audit: with probability ``1 - confidence`` at most is any bound wrong.
        physical_batch_size: of white-box and one-run.
        device: cpu, cuda, cuda:1.
        seed: of coins and data; the noise has entropy of its own.

    Raises:
        ValueError: in one sentence.
    """

    kind: str = "white-box"
    engine: str = "torch"
    method: str = "auto"
    epsilon: float = 4.0
    delta: float = 1e-5
    steps: int = 10
    sample_rate: float = 0.5
    clip_norm: float = 4.0
    canaries: int | None = None
    runs: int | None = None
    scenes: tuple[str, ...] = tuple(SCENES)
    confidence: float = 0.95
    physical_batch_size: int = 256
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"there is no audit of kind {self.kind!r}; choose from {', '.join(KINDS)}.")
        subjects.check(self.engine, self.method)
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must be at least 0.5 and below 1, and is {self.confidence}.")
        for name, standard, least in (("canaries", _CANARIES, 100), ("runs", _RUNS, 20)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, standard[self.kind])
            elif standard[self.kind] > 1 and getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, and is {getattr(self, name)}.")
        object.__setattr__(self, "scenes", tuple(self.scenes))
        if unknown := [name for name in self.scenes if name not in SCENES]:
            raise ValueError(f"there is no scene {unknown[0]!r}; choose from {', '.join(SCENES)}.")
        if not self.scenes:
            raise ValueError("final-model needs a scene at least.")
        if self.physical_batch_size < 1:
            raise ValueError(f"physical_batch_size must be at least 1, and is {self.physical_batch_size}.")

    @property
    def significance(self) -> float:
        """One minus the confidence."""
        return 1 - self.confidence

    @property
    def subject(self) -> str:
        """Who is audited, for people."""
        return f"{self.engine} {self.method}"

    @property
    def key(self) -> Key:
        """Of coins and data."""
        return Key.from_seed(self.seed).child("audit", self.kind)

    def mechanism(self, sample_rate: float | None = None) -> Mechanism:
        """What is claimed, perhaps at another sample rate; its L is 1.

        Raises:
            ValueError: a quantity out of its range, or a budget that no noise meets.
        """
        return Mechanism.calibrate(
            epsilon=self.epsilon,
            delta=self.delta,
            sample_rate=self.sample_rate if sample_rate is None else sample_rate,
            steps=self.steps,
            clip_norm=self.clip_norm,
            expected_batch_size=1,
        )

    @property
    def id(self) -> str:
        """A name for people, and eight digits that tell all audits apart."""
        digest = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
        words = ["audit", self.kind, self.engine, self.method, f"eps{self.epsilon:g}", self.device]
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)) + "-" + digest

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` undoes it."""
        return dataclasses.asdict(self) | {"scenes": list(self.scenes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Audit:
        """Raises ValueError for a field that there is not."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"an audit has no field {unknown[0]!r}; it has {', '.join(sorted(known))}.")
        return cls(**values)
