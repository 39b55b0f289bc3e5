"""What a figure, a table or a finding is made of, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from dptrain.bench import Case, Records
from dptrain.core.methods import resolve

Scale = Literal["small", "paper"]
SCALES: tuple[Scale, ...] = ("small", "paper")
Extras = Callable[[Scale, Records | None], dict[str, Any]]

#: seconds of a case on 2 cores, beside its timed part; of training, of 100 steps
SMALL_S: dict[str, float] = {
    "throughput": 9,
    "batch-size": 30,
    "memory": 8,
    "profile": 8,
    "compile": 10,
    "scaling": 15,
    "accuracy": 5,
}
SMALL_JAX_S, SMALL_UNSUPPORTED_S, SMALL_TRAINING_S = 12.0, 3.0, 6.0
#: in JAX the check of exactness compiles more than the race
SMALL_JAX_CHECK_S = 25.0
#: more for models whose step is longer
SMALL_MODEL_S = {
    "bit-50x1": 10.0,
    "gpt2-like": 5.0,
    "lenet5": 25.0,
    "sample-convnet": 20.0,
    "vit-small": 3.0,
}
#: of training of networks whose steps take less
SMALL_TRAINING_OF_S = {"mlp": 1.5}
#: seconds of a case on a GPU, roughly
PAPER_S: dict[str, float] = {
    "throughput": 60,
    "batch-size": 240,
    "memory": 60,
    "profile": 60,
    "compile": 120,
    "scaling": 120,
    "accuracy": 120,
}
#: examples per second of private training of ViT-Base on an A100, roughly; the paper has 50,000 per epoch
PAPER_TRAINING_RATE, PAPER_EXAMPLES = 60.0, 50_000
#: of networks that are nothing to a GPU, where the steps themselves take the time
PAPER_RATES = {"lenet5": 10_000.0, "mlp": 10_000.0, "sample-convnet": 10_000.0}


@dataclass(frozen=True)
class Study:
    """A figure, a table or a finding.

    Attributes:
        name: on the command line.
        title, shows: what it is called, and what is to be seen in it, in one sentence.
        needs: hardware and data beyond a processor, in one sentence.
        cases: those of a scale; studies that share a case measure it once.
        extras: what is known of it beside measurements, JSON-ready, by scale and the records there are.
    """

    name: str
    title: str
    shows: str
    needs: str
    cases: Callable[[Scale], list[Case]]
    extras: Extras | None = None

    @property
    def cost(self) -> dict[str, float]:
        """``{"small": minutes on 2 cores, "paper": GPU hours}``, estimated, if nothing is measured yet."""
        return {
            "small": estimate_s(self.cases("small"), "small") / 60,
            "paper": estimate_s(self.cases("paper"), "paper") / 3600,
        }


def estimate_s(cases: Iterable[Case], scale: Scale) -> float:
    """Seconds that different cases take, on 2 cores or times the number of GPUs; equal ones count once."""
    one = _small_s if scale == "small" else _paper_s
    return sum(one(case) for case in dict.fromkeys(cases))


def manifest(study: Study, scale: Scale, records: Records | None = None) -> dict[str, Any]:
    """What ``FOLDER/studies/NAME.json`` holds.

    records: those there are; without them, only what needs none is said beside the cases.
    """
    stated = {"name": study.name, "title": study.title, "shows": study.shows, "scale": scale}
    extras = study.extras(scale, records) if study.extras is not None else {}
    return stated | {"cases": [case.id for case in study.cases(scale)]} | extras


def _small_s(case: Case) -> float:
    peers_run = case.measure == "accuracy" and case.engine not in ("torch", "jax")
    if case.precision == "tf32" or case.device != "cpu" or peers_run:
        return SMALL_UNSUPPORTED_S
    seconds = SMALL_S[case.measure] + SMALL_MODEL_S.get(case.model, 0.0)
    if case.engine.startswith("jax"):
        seconds += SMALL_JAX_S + SMALL_JAX_CHECK_S * (case.measure == "throughput")
    if case.measure in ("throughput", "scaling"):
        seconds += case.seconds
    if case.measure == "accuracy":
        steps = dict(case.settings).get("steps") or 0
        seconds += case.seeds * SMALL_TRAINING_OF_S.get(case.model, SMALL_TRAINING_S) * steps / 100
    return seconds


def _paper_s(case: Case) -> float:
    seconds = PAPER_S[case.measure]
    if case.measure == "accuracy":
        epochs = dict(case.settings).get("epochs") or 1
        faster = 1.0 if resolve(case.method).is_private else 2.85
        rate = PAPER_RATES.get(case.model, PAPER_TRAINING_RATE * faster)
        seconds += case.seeds * epochs * PAPER_EXAMPLES / rate
    return seconds * case.devices
