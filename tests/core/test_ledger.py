"""The record of releases claims all that happened."""

import os

import pytest

from dptrain import Mechanism
from dptrain.core.ledger import Ledger
from dptrain.core.spec import flat_step


def step(sigma=1.0):
    return flat_step(noise_multiplier=sigma, clip_norm=1.0, sample_rate=0.1, expected_batch_size=10)


def test_epsilon_is_recomputed_from_the_record_alone(tmp_path):
    mechanism = Mechanism(((step(2.0), 3), (step(1.0), 2)), delta=1e-5)
    for index in range(mechanism.steps):
        Ledger(tmp_path / "releases.jsonl").append(index, mechanism.step(index))
    ledger = Ledger(tmp_path / "releases.jsonl")
    assert [release.step for release in ledger.read()] == list(range(5))
    assert ledger.epsilon(1e-5) == mechanism.epsilon()


def test_a_repeated_step_is_paid_for_again(tmp_path):
    ledger = Ledger(tmp_path / "releases.jsonl")
    for index in (0, 1, 1):
        ledger.append(index, step())
    thrice = Mechanism(((step(), 3),), delta=1e-5)
    assert ledger.epsilon(1e-5) == thrice.epsilon()


def test_an_entry_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        synced.append((tmp_path / "releases.jsonl").read_text().count("\n"))

    monkeypatch.setattr(os, "fsync", fsync)
    ledger = Ledger(tmp_path / "releases.jsonl")
    ledger.append(0, step())
    ledger.append(1, step())
    assert synced == [1, 2]


def test_a_line_cut_short_by_a_crash_was_no_release(tmp_path):
    path = tmp_path / "releases.jsonl"
    ledger = Ledger(path)
    ledger.append(0, step())
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(ledger.read()) == 1
    ledger.append(1, step())
    assert [release.step for release in ledger.read()] == [0, 1]


def test_damage_is_reported_with_its_line(tmp_path):
    path = tmp_path / "releases.jsonl"
    ledger = Ledger(path)
    ledger.append(0, step())
    path.write_bytes(path.read_bytes() + b'{"step": 1}\n')
    with pytest.raises(ValueError, match=r"line 2 .* lacks"):
        ledger.read()


def test_no_file_is_no_release(tmp_path):
    ledger = Ledger(tmp_path / "none.jsonl")
    assert ledger.read() == ()
    assert ledger.epsilon(1e-5) == 0.0
