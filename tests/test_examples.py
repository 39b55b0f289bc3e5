"""The examples run as a user would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dptrain.data import load

ROOT = Path(__file__).resolve().parent.parent


def told_by(script: str, *arguments: str) -> str:
    """What an example prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def accuracy_and_epsilon(script: str, *arguments: str) -> tuple[float, float]:
    """What an example says at its end."""
    told = told_by(script, *arguments)
    found = re.search(r"test accuracy (0\.\d+).* at epsilon ([\d.]+)", told)
    assert found, told
    return float(found[1]), float(found[2])


def test_existing_loop():
    accuracy, epsilon = accuracy_and_epsilon("existing_loop.py")
    assert accuracy > 0.8 and epsilon <= 8.0


@pytest.mark.slow
def test_jax_many_devices(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    accuracy, epsilon = accuracy_and_epsilon("jax_many_devices.py")
    assert accuracy > 0.8 and epsilon <= 8.0


def test_text_classification():
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    accuracy, epsilon = accuracy_and_epsilon("text_classification.py", "--steps", "40", "--sentences", "1000")
    assert accuracy > 0.4 and epsilon <= 8.0  # chance is 0.333


@pytest.mark.parametrize(
    ("library", "needs"),
    [
        ("nnx", "flax"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("linen", "flax"), ("haiku", "haiku"), ("equinox", "equinox"))
        ),
    ],
)
def test_jax_models(library, needs):
    pytest.importorskip(needs)
    accuracy, epsilon = accuracy_and_epsilon("jax_models.py", library)
    assert accuracy > 0.8 and epsilon <= 8.0


def test_make_shards(tmp_path):
    assert "train/00004.safetensors: 237 examples" in told_by("make_shards.py", str(tmp_path))
    splits = load(f"shards:{tmp_path}")
    assert (len(splits.train), len(splits.test), splits.num_classes) == (1437, 360, 10)
    assert splits.input_shape == (1, 8, 8)
