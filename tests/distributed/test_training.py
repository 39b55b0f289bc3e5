"""`dptrain train` in several processes, and what becomes of a run when one of them dies."""

from __future__ import annotations

import json
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dptrain.training import ConfigError, RunFolder, TrainConfig, resume, train
from tests.distributed.launch import dptrain, succeed, together

STEPS = 24
RUN = (
    f"train --seed 3 --steps {STEPS} --method bk-ghost --physical-batch-size 64 --evaluations 1 "
    "--checkpoint-every 5"
).split()
LEAVES = Path(__file__).parent / "leaves.py"
SHARED = ["--shard", "optimizer"]
STOPPED_WITHIN_S = 30


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def releases(folder: Path) -> int:
    ledger = folder / "ledger.jsonl"
    return ledger.read_bytes().count(b"\n") - 1 if ledger.exists() else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """By two ranks, of which each has half of the optimizer's state: the weights are those of no halves."""
    succeed(dptrain(2, *RUN, *SHARED, "--out", str(folder / "two")))
    return folder / "two"


def test_two_ranks_train_what_one_does(undisturbed, folder):
    train(replace(RunFolder(undisturbed).config, out=folder / "one"))
    want, got = weights(folder / "one"), weights(undisturbed)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))
    one, two = summary(folder / "one"), summary(undisturbed)
    assert one["epsilon"] == two["epsilon"] and two["releases"] == two["steps_taken"] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "--denoise 0.5 --optimizer adam-bc --lr 0.01",
        "--clip-rule quantile --accountant rdp",
        "--noise-bands 2 --restart replay",
    ],
)
def test_two_ranks_take_other_steps_as_one_does(options, tmp_path):
    succeed(dptrain(2, *RUN, *options.split(), "--out", str(tmp_path / "two")))
    train(replace(RunFolder(tmp_path / "two").config, out=tmp_path / "one"))
    want, got = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-3 * float(value.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "compression",
    [
        "--compress random-k --keep 0.2 --compress-before-clipping",
        "--compress public-subspace --public-examples 100 --error-feedback",
    ],
)
def test_two_ranks_compress_as_one_does(compression, tmp_path):
    """Public choices are the same on both; what is remembered too."""
    succeed(dptrain(2, *RUN, *compression.split(), "--out", str(tmp_path / "two")))
    train(replace(RunFolder(tmp_path / "two").config, out=tmp_path / "one"))
    want, got = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize(
    ("victim", "shared"), [(1, SHARED), *(pytest.param(v, [], marks=pytest.mark.slow) for v in (0, 1))]
)
def test_a_killed_rank_ends_all_and_the_run_goes_on_bit_for_bit(victim, shared, undisturbed, tmp_path):
    run = tmp_path / "run"
    ranks = dptrain(2, *RUN, *shared, "--out", str(run))
    while releases(run) < STEPS // 2:
        assert ranks[0].poll() is None, ranks[0].communicate()[0]
        time.sleep(0.01)
    ranks[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ranks[victim].communicate()
    said = ranks[1 - victim].communicate(timeout=STOPPED_WITHIN_S)[0]
    assert time.monotonic() - killed < STOPPED_WITHIN_S
    assert ranks[1 - victim].returncode not in (0, -signal.SIGKILL)
    assert "another rank has ended" in said and "Traceback" not in said
    assert victim == 0 or f"--resume {run}" in " ".join(said.split())
    assert STEPS // 2 <= releases(run) < STEPS
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)

    succeed(dptrain(2, "train", "--resume", str(run)))
    assert (run / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert summary(run)["epsilon"] == summary(undisturbed)["epsilon"]
    assert releases(run) == STEPS  # none was paid for twice

    # One rank rounds otherwise than two: what was lost is drawn afresh, and the run stays within its budget.
    resume(copy)
    assert summary(copy)["releases"] == STEPS and summary(copy)["epsilon"] == summary(undisturbed)["epsilon"]
    assert STEPS - 5 <= summary(copy)["steps_taken"] <= STEPS


@pytest.mark.parametrize("place", ["step", pytest.param("consolidate_state_dict", marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_noticed_inside_the_optimizer_too(place, tmp_path):
    run = [*RUN, *SHARED, "--checkpoint-every", "1", "--out", str(tmp_path / "run")]
    ranks = together([[str(LEAVES), "", *run], [str(LEAVES), place, *run]])
    said = ranks[0].communicate(timeout=120)[0]
    ranks[1].communicate(timeout=STOPPED_WITHIN_S)
    assert ranks[0].returncode == 2, said
    assert "another rank has ended" in said and "Traceback" not in said and "🏖" not in said
    assert f"--resume {tmp_path / 'run'}" in " ".join(said.split()) and releases(tmp_path / "run") == 1


@pytest.mark.slow
def test_what_one_rank_cannot_do_ends_all_in_one_sentence(tmp_path):
    ranks = dptrain(2, *RUN, "--clip-norm", "1e-30", "--out", str(tmp_path / "run"))
    leader, other = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert all(rank.returncode not in (0, -signal.SIGKILL) for rank in ranks)
    assert "clip_norm" in leader and "Traceback" not in leader + other
    assert releases(tmp_path / "run") == 0


def test_jax_takes_its_devices_in_one_process(tmp_path):
    with pytest.raises(ConfigError, match="without torchrun"):
        train(TrainConfig(engine="jax", out=tmp_path / "run"), ranks=SimpleNamespace(alone=False))
