"""``dptrain train --engine jax --devices N``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from dptrain.training import ConfigError, Silent, TrainConfig, resume, train

from .test_many_devices import mesh


class StopAfter(Silent):
    def stepped(self, step, epsilon, examples_per_s):
        if step.number == 2:
            raise KeyboardInterrupt


def config(folder, **changes):
    settings = {
        "engine": "jax", "model": "linear", "steps": 4, "evaluations": 1, "logical_batch_size": 200,
        "physical_batch_size": 16, "noise_multiplier": 1.0, "clip_norm": 1.0, "accountant": "rdp",
        "optimizer": "adam", "lr": 0.01, "weight_average": 0.9, "seed": 1, "out": folder,
    }  # fmt: skip
    return TrainConfig.from_dict(settings | changes)


def test_a_run_goes_on_with_other_devices(tmp_path):
    mesh(4)
    whole = train(config(tmp_path / "whole", devices=4))
    interrupted = config(tmp_path / "interrupted", devices=4)
    assert train(interrupted, StopAfter()).steps == 2
    outcome = resume(interrupted.out, replace(interrupted, devices=2))
    assert outcome.steps == 4
    expected = load_file(whole.folder.weights)
    for name, x in load_file(outcome.folder.weights).items():
        np.testing.assert_allclose(x, expected[name], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 99}, "--devices cannot be 99"),
        ({"devices": 0}, "give a positive number"),
        ({"devices": 2, "engine": "torch"}, "torchrun"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(config(tmp_path, **changes))
