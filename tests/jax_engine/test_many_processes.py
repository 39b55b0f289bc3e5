"""Two processes with two devices each do what one process with four does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dptrain.jax as dpj

from . import process
from .conftest import FAST_TO_COMPILE

SCRIPT = Path(__file__).with_name("process.py")


def run(folder: Path, *tasks: str) -> list[str]:
    """What the processes say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # The option of pytest's own process, which asks for four devices, would win over theirs.
    env = os.environ | {"XLA_FLAGS": FAST_TO_COMPILE, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(number), "2", str(port), folder, *tasks],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=200)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [0, 0], "\n".join(said)
    return said


def left(folder: Path, name: str) -> list[dict]:
    return [dict(np.load(folder / f"{name}-{number}.npz")) for number in range(2)]


def check_trained(folder: Path, name: str, shard_params: bool) -> list[set[int]]:
    """The weights are those of one process; returns what each has read."""
    task, _ = process.begin(process.parameters(), key=process.KEY, shard_params=shard_params)
    list(task.steps())
    found = left(folder, name)
    for each in found:
        for leaf, x in task.params.items():
            np.testing.assert_allclose(each[leaf], x, atol=1e-5)
            np.testing.assert_array_equal(each[leaf], found[0][leaf])
    return [set(each.get("read", np.zeros(0)).tolist()) for each in found]


def test_two_processes_train_as_one(tmp_path):
    run(tmp_path, "train=sharded", "follow=sharded")
    first, second = check_trained(tmp_path, "train-True", True)
    assert first and second and first != second  # each has read its own devices' rows
    task, _ = process.begin(process.parameters(), process.QUANTILE, key=process.KEY, shard_params=True)
    norms = [task.clip_norm for _ in task.steps()]
    assert len(set(norms)) == 4
    for each in left(tmp_path, "follow-True"):
        np.testing.assert_array_equal(each["norms"], norms)


@pytest.mark.slow
def test_two_processes_of_whole_parameters_resume_and_disagree(tmp_path):
    said = run(
        tmp_path, "train=replicated", "resume=replicated", "resume=sharded", "disagree", "clip_alike"
    )  # fmt: skip
    for name in ("train-False", "resume-False", "resume-True"):
        check_trained(tmp_path, name, "True" in name)
    for text in said:
        assert "must be the same on all processes" in text
    assert "pass the ledger that they are on" in said[0]
    assert "process 0 has failed" in said[1]
    clipped = dpj.clipped_grad(process.loss, clip_norm=0.5, method="per-example-loop")
    expected = clipped(process.parameters(), {"x": process.Examples().x[:16]})
    for each in left(tmp_path, "clip_alike"):
        for name, x in expected.grads.items():
            np.testing.assert_allclose(each[name], x, rtol=1e-4, atol=1e-6)
    assert jax.process_count() == 1
