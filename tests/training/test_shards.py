"""Runs on shards are runs like any other."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from dptrain.data import DataError
from dptrain.training import Silent, TrainConfig, prepare, resume, train

EXAMPLES = 900


@pytest.fixture
def shards(tmp_path):
    """Digits in three files, and a test set."""
    digits = load_digits()
    images = np.clip(digits.images * 16, 0, 255).astype(np.uint8)[:, np.newaxis]
    for split, bounds in (("train", (0, 250, 251, EXAMPLES)), ("test", (EXAMPLES, 1100))):
        (tmp_path / "shards" / split).mkdir(parents=True)
        for start, end in pairwise(bounds):
            part = {"images": images[start:end].copy(), "labels": digits.target[start:end].copy()}
            save_file(part, tmp_path / "shards" / split / f"{start:04}.safetensors", {"num_classes": "10"})
    return f"shards:{tmp_path / 'shards'}"


class Die(Silent):
    def stepped(self, step, epsilon, examples_per_s):
        if step.number == 2:
            raise SystemExit


def test_a_run_reads_ahead_without_changing_its_result(quick, shards, tmp_path):
    weights = []
    for workers in (0, 2):
        config = quick(data=shards, workers=workers, out=tmp_path / f"run-{workers}")
        outcome = train(config)
        assert len(outcome.run.train) == EXAMPLES and outcome.steps == 4
        weights.append(outcome.folder.weights.read_bytes())
    assert weights[0] == weights[1]


def test_a_run_on_shards_goes_on_after_its_process_died(quick, shards, tmp_path):
    whole = train(quick(data=shards, out=tmp_path / "whole", checkpoint_every=1))
    config = quick(data=shards, out=tmp_path / "broken", checkpoint_every=1)
    with pytest.raises(SystemExit):
        train(config, Die())
    resumed = resume(config.out, replace(config, physical_batch_size=64))
    before, after = load_file(whole.folder.weights), load_file(resumed.folder.weights)
    assert all(bool((before[name] == after[name]).all()) for name in before)


def test_labels_are_read_for_a_validation_part_only(quick, shards, monkeypatch):
    run = prepare(quick(data=shards, validation_fraction=0.2))
    assert len(run.train) + len(run.held_out) == EXAMPLES and run.held_out_name == "validation"
    monkeypatch.setattr("dptrain.data.sharded.MOST_LABELS", EXAMPLES - 1)
    with pytest.raises(
        DataError, match=r"for --validation-fraction for example; put examples .* into a folder"
    ):
        prepare(quick(data=shards, validation_fraction=0.2))
    prepare(quick(data=shards))


@pytest.mark.slow
def test_the_jax_engine_reads_shards(quick, shards):
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    config: TrainConfig = quick(data=shards, engine="jax", workers=1)
    assert train(config).steps == 4
