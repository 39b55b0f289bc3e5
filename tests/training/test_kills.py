"""Runs that are killed, really: each goes on, loses nothing, and never spends more than it may."""

import random
from dataclasses import replace

import pytest

from dptrain.core.key_file import key_path
from dptrain.core.ledger import Ledger
from dptrain.training.checkpoint import Checkpoints, read
from tests.training.kills import FAILED, ends, killed_within, seconds_of, start

KILLS = 200
WRITES = 140
"""More than a run of six steps makes."""


@pytest.fixture(scope="module", autouse=True)
def keys(tmp_path_factory):
    """Processes that a server forks have the environment that it began with."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("keys")
        patch.setenv("DPTRAIN_KEYS", str(folder))
        yield folder


@pytest.fixture
def small(quick, tmp_path):
    """Six steps with momentum and an average, and what they take in seconds."""
    config = quick(steps=6, evaluations=3, checkpoint_every=2, weight_average=0.9, accountant="rdp")
    whole = replace(config, out=tmp_path / "whole")
    seconds_of(replace(config, out=tmp_path / "first"))  # its server has yet to import everything
    return config, whole, seconds_of(whole)


def check(folder, whole, mode):
    """What is promised of a run that has ended, however often it was killed."""
    ledger, undisturbed = Ledger.read(folder / "ledger.jsonl"), Ledger.read(whole / "ledger.jsonl")
    assert ledger.epsilon(1e-4) <= undisturbed.epsilon(1e-4), "never above the target"
    if mode == "afresh":
        assert len(ledger.releases) <= 6
    else:
        assert [release.step for release in ledger.releases] == list(range(6))
        assert ledger.epsilon(1e-4) == undisturbed.epsilon(1e-4)
    if mode == "seed":
        assert ledger.releases == undisturbed.releases
        weights = "model.safetensors"
        assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
    assert not (folder / "checkpoints").exists() and not list(folder.rglob("*.unfinished"))
    assert not key_path(ledger.run).exists()


def check_meanwhile(folder):
    """What is promised while it lies there: what is on record covers what has been saved."""
    if not (folder / "ledger.jsonl").exists() or not (folder / "checkpoints").exists():
        return
    for path in (folder / "checkpoints").glob("step-*"):
        _, facts = read(path)  # whole, or it would raise
        assert facts["ledger"]["length"] >= facts["step"]
        Ledger.read(folder / "ledger.jsonl")
    assert len(list((folder / "checkpoints").glob("step-*"))) <= 3
    Checkpoints(folder / "checkpoints").newest()


MODES = {"seed": {}, "afresh": {"seed": None}, "replay": {"seed": None, "restart": "replay"}}


def kill_at_random(small, tmp_path, mode, kills, seed):
    config, whole, seconds = small
    config = replace(config, **MODES[mode])
    chance, done, number = random.Random(seed), 0, 0
    while done < kills:
        number += 1
        run = replace(config, out=tmp_path / f"{mode}-{number}")
        while killed_within(start(run), chance.uniform(0, 1.2 * seconds)):
            done += 1
            check_meanwhile(run.out)
        check(run.out, whole.out, mode)
    return done


def kill_at_writes(small, tmp_path, mode, writes):
    config, whole, _ = small
    config, done = replace(config, **MODES[mode]), 0
    for at in writes:
        run = replace(config, out=tmp_path / f"{mode}-write-{at}")
        code = ends(start(run, dies_at=at))
        assert code in (0, -9)
        if code == -9:
            done += 1
            check_meanwhile(run.out)
            assert ends(start(run)) == 0
        check(run.out, whole.out, mode)
    return done


def run_out_of_room(small, tmp_path, mode, sizes):
    config, whole, _ = small
    config, failures = replace(config, **MODES[mode]), 0
    for size in sizes:
        run = replace(config, out=tmp_path / f"{mode}-room-{size}")
        code = ends(start(run, largest_file=size))
        assert code in (0, FAILED)
        failures += code == FAILED
        check_meanwhile(run.out)
        if code == FAILED:
            assert ends(start(run)) == 0
        check(run.out, whole.out, mode)
    return failures


def test_a_few(small, tmp_path):
    assert kill_at_random(small, tmp_path, "afresh", 1, seed=0) >= 1
    assert kill_at_writes(small, tmp_path, "seed", [30, 57]) == 2
    assert run_out_of_room(small, tmp_path, "seed", [1500]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_hundred_at_any_time(small, tmp_path, mode):
    assert kill_at_random(small, tmp_path, mode, KILLS, seed=2) >= KILLS


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_at_every_write(small, tmp_path, mode):
    done = kill_at_writes(small, tmp_path, mode, range(1, WRITES))
    print(f"{done} kills at writes")
    assert done >= 60


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_with_a_full_disk(small, tmp_path, mode):
    sizes = [0, 100, 700, *range(1000, 4000, 200), 10_000, 100_000, 200_000, 10**6]
    assert run_out_of_room(small, tmp_path, mode, sizes) >= 15
