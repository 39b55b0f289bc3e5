"""Bad input, told in one sentence before anything is measured."""

from __future__ import annotations

import re
from pathlib import Path

import timm

from dptrain.bench.case import Case
from dptrain.bench.engines import NAMES, OURS, framework, is_ordinary
from dptrain.bench.measures.accuracy import config, own_settings
from dptrain.bench.peers import PEERS
from dptrain.core import methods
from dptrain.models import SMALL, timm_name

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
POSITIVE = ("image_size", "num_classes", "batch_size", "accumulate", "devices", "seconds", "seeds")


def check(case: Case) -> None:
    """Refuse what no engine could make sense of.

    Raises:
        ValueError: an unknown engine, method, model, device, precision or setting; a number that must be
            positive; a search for the largest batch without a memory.
    """
    if case.engine not in NAMES:
        raise ValueError(f"there is no engine {case.engine!r}; choose from {', '.join(NAMES)}.")
    if case.engine in OURS:
        methods.resolve(case.method)
    elif case.method not in PEERS[case.engine].methods and not is_ordinary(case):
        listed = ", ".join(PEERS[case.engine].methods)
        raise ValueError(f"{case.engine} has no method {case.method!r}; choose from {listed}.")
    if case.precision not in PRECISIONS:
        raise ValueError(f"there is no precision {case.precision!r}; choose from {', '.join(PRECISIONS)}.")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", case.device):
        raise ValueError(f"there is no device {case.device!r}; choose from cpu, cuda and cuda:NUMBER.")
    known = case.model in SMALL or case.model == "gpt2-like" or ":" in case.model
    if not known and not timm.is_model(timm_name(case.model)):
        raise ValueError(
            f"there is no model {case.model!r}; choose a small network, gpt2-like, one of timm, or "
            "MODULE:FACTORY."
        )
    for name in POSITIVE:
        if not getattr(case, name) > 0:
            raise ValueError(f"{name} is {getattr(case, name)}: give a positive number.")
    if case.measure == "batch-size" and not case.memory_gib:
        raise ValueError("the largest batch is searched under a given memory: state memory_gib.")
    if case.measure == "accuracy":
        _check_training(case)
    elif case.settings:
        raise ValueError("settings of a training run are for the measure accuracy.")


def _check_training(case: Case) -> None:
    if both := sorted(dict(case.settings).keys() & own_settings(case, 0, Path()).keys()):
        raise ValueError(f"{both[0]} is a setting of the case itself: leave it out of settings.")
    if framework(case) in OURS and case.precision != "fp16":
        config(case, 0, Path("run")).check()
