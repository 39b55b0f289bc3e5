import json
from pathlib import Path

import pytest

from dptrain.training import ConfigError, TrainConfig, read_config


def test_a_configuration_survives_a_file(tmp_path, quick):
    config = quick(weights=Path("w.safetensors"), epochs=3.0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert read_config(path) == config


def test_toml_is_read_and_its_settings_replace_their_rivals(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('data = "mnist"\nnoise_multiplier = 1.5\nepochs = 2.0\n')
    config = read_config(path)
    assert (config.epsilon, config.noise_multiplier) == (None, 1.5)
    assert (config.epochs, config.steps) == (2.0, None)
    config.check()


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"lrr": 1}', "no setting 'lrr'"), ("{", "not valid JSON"), ("[1]", "table of settings")],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, "exactly one of --epsilon or --noise-multi"),
        ({"epsilon": None}, "neither given"),
        ({"epsilon": -1.0}, "--epsilon is -1"),
        ({"delta": 0.0}, "--delta is 0"),
        ({"delta": 1.0}, "--delta is 1"),
        ({"clip_norm": 0.0}, "--clip-norm is 0"),
        ({"steps": 0}, "--steps is 0"),
        ({"max_logical_batch_size": 0}, "--max-logical-batch-size is 0"),
        ({"max_logical_batch_size": 511}, "below the 512 examples that are expected"),
        ({"max_logical_batch_size": 600, "accountant": "rdp"}, "accounted by --accountant pld alone"),
        ({"physical_batch_size": 0}, "positive number or auto"),
        ({"validation_fraction": 1.0}, "--validation-fraction is 1"),
        ({"weight_average": 1.0}, "--weight-average is 1"),
        ({"adam_floor": 0.0}, "--adam-floor is 0"),
        ({"denoise": 1.0}, "--denoise is 1.0: give a number from 0, for none, to below 1"),
        ({"denoise": 0.5, "shard": "optimizer"}, "leave --shard out"),
        ({"denoise": 0.5, "noise_bands": 4, "restart": "replay"}, "does not go with --denoise"),
        ({"optimizer": "adam-bc", "noise_bands": 4, "seed": 1}, "does not go with --optimizer adam-bc"),
        ({"cache_features": True}, "needs --trainable head"),
        ({"frozen_blocks": -1}, "--frozen-blocks is -1"),
        ({"frozen_blocks": 2, "engine": "jax"}, "for --engine torch"),
        ({"frozen_blocks": 2, "trainable": "head"}, "leave out --frozen-blocks"),
        ({"seed": -1}, "--seed is -1"),
        ({"lr": float("nan")}, "--lr is nan"),
        ({"lr": "fast"}, "--lr cannot be 'fast'"),
        ({"precision": "fp8"}, "--precision cannot be 'fp8'"),
        ({"steps": 1.5}, "--steps cannot be 1.5"),
        ({"download": 1}, "--download cannot be 1"),
        ({"physical_batch_size": "big"}, "--physical-batch-size cannot be 'big'"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes).check()
