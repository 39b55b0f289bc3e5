"""python -m benchmarks.accuracy: a row for each budget, a run for each seed, and none of them twice."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import accuracy
from dptrain.training import TrainConfig


@pytest.fixture
def quick() -> TrainConfig:
    return TrainConfig(
        model="linear", steps=2, logical_batch_size=200, physical_batch_size=200, weight_average=0.0, lr=0.5
    )


def test_a_record_of_several_seeds_is_gone_on_with(quick, monkeypatch, tmp_path, capsys):
    path, trained = tmp_path / "record.json", []

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["accuracy", "mine", "--out", str(path), *flags])
        accuracy.main()
        return json.loads(path.read_text())

    def counted(config):
        trained.append((config.epsilon, config.method, config.lr, config.seed))
        return accuracy.train(accuracy.replace(config, out=tmp_path / f"run {len(trained)}"))

    monkeypatch.setattr(accuracy, "recipe", {"mine": quick}.__getitem__)
    monkeypatch.setattr(accuracy, "_trained", counted)
    flags = ("--epsilon", "2", "--non-private", "--lr", "0.1", "0.2")
    run("--epsilon", "2", "--lr", "0.1", "--seeds", "2")
    record = run(*flags, "--seeds", "1")
    assert trained == [(2, "auto", 0.1, 0), (2, "auto", 0.1, 1), (8, "non-private", 0.2, 0)]
    private, ordinary = record["rows"]
    assert (private["seeds"], ordinary["seeds"]) == ([0, 1], [0])
    assert max(private["epsilons"]) <= 2
    assert (ordinary["epsilons"], ordinary["interval95"]) == ([None], None)
    assert private["mean"] == sum(private["accuracies"]) / 2
    assert private["interval95"][0] <= private["mean"] <= private["interval95"][1]
    assert (private["evaluated_on"], private["config"]["seed"]) == ("test", None)
    assert str(tmp_path) not in path.read_text()
    assert "over 2 seeds" in capsys.readouterr().out


def test_learning_rates_are_one_for_each_row(quick, monkeypatch):
    monkeypatch.setattr(accuracy, "recipe", lambda name: quick)
    monkeypatch.setattr(sys, "argv", ["accuracy", "mine", "--epsilon", "1", "2", "--lr", "0.1"])
    with pytest.raises(SystemExit, match="--lr takes 2 learning rates"):
        accuracy.main()
