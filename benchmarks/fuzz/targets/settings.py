"""Configurations of runs, mechanisms and remembered measurements."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from benchmarks.fuzz import surroundings, trees
from benchmarks.fuzz.target import Target, Wrong
from benchmarks.fuzz.targets.files import Given, of_json
from dptrain.core.accounting import ADD_OR_REMOVE_ONE
from dptrain.core.clip_rules import Flat, GroupWise, PerLayer, Quantile
from dptrain.core.correlated import square_root
from dptrain.core.mechanism import Mechanism
from dptrain.core.remembered import Remembered
from dptrain.core.spec import Sampling, StepSpec, flat_step
from dptrain.training import ConfigError, TrainConfig, read_config

CONFIG = TrainConfig().to_dict()
CONFIGS = (
    CONFIG,
    {"model": "mlp", "lr": 0.1, "steps": 3, "noise_multiplier": 2.0},
    {"data": "mnist", "epochs": 2.0, "trainable": "head", "cache_features": True, "physical_batch_size": 64},
    {name: value for name, value in CONFIG.items() if value is not None},
)
STEP = flat_step(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.25, expected_batch_size=8)
FIXED = StepSpec(PerLayer((0.5, 0.5)), 2.0, Sampling("fixed-size", 0.5, 64), 32)
GROUPED = StepSpec(GroupWise((0.5, 0.5), ("head", "")), 2.0, Sampling("poisson", 0.5), 32)
FOLLOWED = StepSpec(Quantile(1.0, 5.0), 2.0, Sampling("poisson", 0.5), 32)
CORRELATED = StepSpec(
    Flat(1.0), 2.0, Sampling("cyclic-poisson", 0.1, cycle=4), 32, correlation=square_root(4)
)
STEPS = tuple(step.to_dict() for step in (STEP, FIXED, GROUPED, FOLLOWED, CORRELATED))
MECHANISMS = (
    Mechanism(((STEP, 10),), ADD_OR_REMOVE_ONE, 1e-5).to_dict(),
    Mechanism(((FIXED, 3), (FIXED, 5)), "replace-one").to_dict(),
    Mechanism(((GROUPED, 3), (FOLLOWED, 5)), ADD_OR_REMOVE_ONE, 1e-5).to_dict(),
    Mechanism(((CORRELATED, 9),), ADD_OR_REMOVE_ONE, 1e-5).to_dict(),
)


def _read_config(path: Path) -> None:
    config = read_config(path)
    config.check()
    again = json.dumps(config.to_dict(), allow_nan=False)
    if TrainConfig.from_dict(json.loads(again)) != config:
        raise Wrong("a configuration does not survive a file.")


def _toml(chance: random.Random) -> Given:
    """TOML of the trees that can be written so; text that JSON shares with it."""
    tree = trees.changed(chance, chance.choice(CONFIGS))
    if not isinstance(tree, dict):
        tree = {"lr": tree}
    lines = [
        f"{json.dumps(str(key)) if chance.random() < 0.2 else key} = {_literal(value)}"
        for key, value in tree.items()
    ]
    text = "\n".join(lines).replace(json.dumps(trees.NESTED), "[" * 5000 + "]" * 5000)
    return surroundings.kind(chance), text.encode("utf-8", "replace")


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _feed_toml(given: Given, scratch: Path) -> None:
    path = scratch / "run.toml"
    surroundings.put(path, given[1], given[0])
    _read_config(path)


def _read_remembered(path: Path) -> None:
    known = Remembered(path).known
    if not all(isinstance(v, float) and math.isfinite(v) and v >= 0 for v in known.values()):
        raise Wrong(f"{known} is remembered.")


def _mechanism(chance: random.Random) -> Any:
    return _plain(trees.changed(chance, chance.choice(MECHANISMS)))


def _plain(tree: Any) -> Any:
    """Without the mark of a deep nest, which is for texts."""
    if tree == trees.NESTED:
        return [[[]]]
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, list) else tree


def _feed_mechanism(data: Any, scratch: Path) -> None:
    made = Mechanism.from_dict(data)
    if Mechanism.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) != made:
        raise Wrong("a mechanism does not survive a file.")


def _feed_step(data: Any, scratch: Path) -> None:
    made = StepSpec.from_dict(data)
    if StepSpec.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False))) != made:
        raise Wrong("a step does not survive a file.")


def _step(chance: random.Random) -> Any:
    return _plain(trees.changed(chance, chance.choice(STEPS)))


TARGETS = (
    of_json("config-json", "config.json", CONFIGS, _read_config, (ConfigError,)),
    Target("config-toml", _toml, _feed_toml, (ConfigError,), 1000),
    Target("mechanism", _mechanism, _feed_mechanism, (TypeError, ValueError), 4000),
    Target("step-spec", _step, _feed_step, (TypeError, ValueError), 6000),
    of_json("remembered", "plan.json", ({"a": 1.0, "b": 1e-6, "c": 3},), _read_remembered, ()),
)
