"""The same runs on the JAX engine."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from dptrain.core.ledger import Ledger
from dptrain.models import ModelError
from dptrain.training import ConfigError, Silent, train
from dptrain.training.rescore import rescore

pytest.importorskip("jax")


class StopAfter(Silent):
    def stepped(self, step, epsilon, examples_per_s):
        if step.number == 2:
            raise KeyboardInterrupt


def both(quick, tmp_path, **changes):
    out = []
    for engine in ("torch", "jax"):
        outcome = train(quick(engine=engine, out=tmp_path / engine, **changes))
        out.append(load_file(outcome.folder.weights))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "momentum", "lr_schedule": "cosine", "weight_average": 0.9, "model": "mlp"},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "lr_schedule": "linear"},
        {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "model": "convnet"},
        {"optimizer": "sgd", "weight_decay": 0.1, "model": "convnet", "trainable": "head"},
    ],
    ids=lambda c: c["optimizer"],
)
def test_without_noise_both_engines_take_the_same_steps(quick, tmp_path, changes):
    """The same examples, gradients, optimizer, learning rates and averages."""
    theirs, ours = both(quick, tmp_path, method="non-private", **changes)
    assert theirs.keys() == ours.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-5)


def test_clipped_steps_are_the_same(quick, tmp_path):
    changes = {"noise_multiplier": 1e-3, "model": "convnet", "accountant": "rdp"}
    theirs, ours = both(quick, tmp_path, **changes, optimizer="adam-bc", lr=0.01, denoise=0.5)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-3, atol=2e-4)


def test_a_run_leaves_its_files_and_accounts_for_its_steps(quick):
    outcome = train(quick(engine="jax", show_unprotected=True))
    assert outcome.epsilon == outcome.run.mechanism.epsilon()
    assert Ledger.read(outcome.folder.ledger).epsilon(1e-4) == pytest.approx(outcome.epsilon)
    summary = json.loads((outcome.folder.path / "summary.json").read_text())
    assert summary["engine"] == "jax" and summary["steps_taken"] == 4
    _, _, score = rescore(outcome.folder.path)
    assert score.accuracy == outcome.score.accuracy
    records = [json.loads(line) for line in (outcome.folder.path / "metrics.jsonl").read_text().splitlines()]
    shown = [r for r in records if r["event"] == "unprotected"]
    assert len(shown) == 4 and all(150 < r["batch_size"] < 250 and r["median_norm"] > 0 for r in shown)


def test_steps_are_compiled_once(quick, monkeypatch):
    from dptrain.training import jax_learner

    made = []

    class Spy(jax_learner.JaxLearner):
        def __init__(self, run):
            super().__init__(run)
            made.append(self)

    monkeypatch.setattr(jax_learner, "JaxLearner", Spy)
    train(quick(engine="jax", weight_average=0.9))
    assert (made[0].accumulator.compilations, made[0]._apply._cache_size()) == (1, 1)


def test_interruption_leaves_weights_and_what_was_spent(quick):
    outcome = train(quick(engine="jax"), StopAfter())
    assert outcome.interrupted and outcome.steps == 2
    assert outcome.epsilon == outcome.run.mechanism.epsilon(steps=2)
    assert outcome.folder.weights.is_file()


def test_a_reproducible_run_repeats(quick, tmp_path):
    first, second = (train(quick(engine="jax", out=tmp_path / n)).folder.weights.read_bytes() for n in "ab")
    assert first == second


def test_bfloat16_and_automatic_size(quick):
    outcome = train(quick(engine="jax", precision="bf16", physical_batch_size="auto", steps=2))
    assert outcome.physical_batch_size == 32
    assert outcome.steps == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compile": True}, ConfigError, "--compile is for --engine torch"),
        ({"precision": "tf32"}, ConfigError, "--precision tf32 is for a GPU"),
        ({"device": "cuda:7"}, ConfigError, "JAX has no device"),
        ({"model": "resnet18", "convert": True}, ModelError, "there is no model 'resnet18' for JAX"),
        ({"method": "ghost", "trainable": "bias", "clip_norm": -1.0}, ConfigError, "clip-norm"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_run(quick, changes, error, message):
    with pytest.raises(error, match=message):
        train(quick(engine="jax", **changes))
