import json

import pytest
import torch
from safetensors.torch import load_file

from dptrain.core.ledger import Ledger
from dptrain.torch.errors import Refused
from dptrain.training import ConfigError, Silent, read_config, train
from dptrain.training.rescore import rescore


def metrics(outcome, event):
    lines = (outcome.folder.path / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


class StopAfter(Silent):
    """Presses Ctrl-C once, after a number of steps."""

    def __init__(self, steps, error=KeyboardInterrupt):
        self.steps, self.error = steps, error

    def stepped(self, step, epsilon, examples_per_s):
        if step.number == self.steps:
            raise self.error


def test_a_run_leaves_its_files_and_accounts_for_its_steps(quick):
    outcome = train(quick())
    files = {path.name for path in outcome.folder.path.iterdir()}
    assert files == {
        "config.json",
        "metrics.jsonl",
        "ledger.jsonl",
        "model.safetensors",
        "summary.json",
    }
    assert outcome.epsilon == outcome.run.mechanism.epsilon()
    assert Ledger.read(outcome.folder.ledger).epsilon(1e-4) == pytest.approx(outcome.epsilon)
    assert [record["step"] for record in metrics(outcome, "evaluation")] == [2, 4]
    summary = json.loads((outcome.folder.path / "summary.json").read_text())
    assert summary["reproducible"] is True and summary["steps_taken"] == 4


def test_its_configuration_repeats_it_bit_for_bit(quick, tmp_path):
    first = train(quick())
    again = read_config(first.folder.path / "config.json")
    second = train(type(again).from_dict(again.to_dict() | {"out": str(tmp_path / "again")}))
    assert first.folder.weights.read_bytes() == second.folder.weights.read_bytes()


def test_no_batch_is_larger_than_the_largest(quick):
    outcome = train(quick(max_logical_batch_size=200, show_unprotected=True, steps=8, noise_multiplier=4.0))
    sizes = [record["batch_size"] for record in metrics(outcome, "unprotected")]
    assert len(sizes) == 8 and max(sizes) == 200 > min(sizes)
    assert Ledger.read(outcome.folder.ledger).epsilon(1e-4) == pytest.approx(outcome.run.mechanism.epsilon())


def test_the_physical_batch_size_does_not_change_the_result(quick, tmp_path):
    weights = []
    for size in (17, 256):
        outcome = train(quick(physical_batch_size=size, out=tmp_path / str(size)))
        weights.append(load_file(outcome.folder.weights))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)


def test_private_values_are_recorded_on_request_only(quick, tmp_path):
    assert not metrics(train(quick()), "unprotected")
    shown = metrics(train(quick(show_unprotected=True, out=tmp_path / "shown")), "unprotected")
    assert len(shown) == 4
    assert {"batch_size", "mean_loss", "median_norm", "clipped_share"} <= shown[0].keys()


def test_interruption_leaves_weights_and_what_was_spent(quick):
    outcome = train(quick(), StopAfter(3))
    assert outcome.interrupted and outcome.steps == 3
    assert outcome.epsilon == outcome.run.mechanism.epsilon(steps=3)
    assert len(Ledger.read(outcome.folder.ledger).releases) == 3
    assert metrics(outcome, "evaluation")[-1]["step"] == 3
    assert rescore(outcome.folder.path)[2].accuracy == outcome.score.accuracy


def test_a_failure_after_a_release_keeps_what_was_paid_for(quick, tmp_path):
    with pytest.raises(RuntimeError):
        train(quick(), StopAfter(2, RuntimeError))
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps_taken"] == 2
    assert (tmp_path / "run/model.safetensors").is_file()


def test_empty_logical_batches_still_take_steps(quick):
    outcome = train(quick(logical_batch_size=0.01))
    assert outcome.steps == 4
    weights = load_file(outcome.folder.weights)
    assert weights["head.weight"].abs().mean() > 1  # noise over L = 0.01: nothing else


def test_a_model_that_cannot_be_trained_exactly_costs_nothing(quick, tmp_path):
    with pytest.raises(Refused, match="BatchNorm"):
        train(quick(model="resnet18", image_size=32, physical_batch_size=4))
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(quick):
    train(quick())
    with pytest.raises(ConfigError, match="already holds a run"):
        train(quick())


def test_a_saved_run_scores_as_it_did(quick):
    outcome = train(quick(model="mlp", weight_average=0.5))
    folder, name, score = rescore(outcome.folder.path)
    assert (folder.path, name) == (outcome.folder.path, "test")
    assert score == outcome.score


def test_weight_averages_are_what_is_saved(quick, tmp_path):
    plain = load_file(train(quick()).folder.weights)["head.weight"]
    averaged = train(quick(weight_average=0.9, out=tmp_path / "averaged"))
    assert (load_file(averaged.folder.weights)["head.weight"] != plain).any()


def test_the_head_on_cached_features_trains_the_head_of_the_model(quick):
    config = quick(model="lenet", image_size=28, trainable="head", cache_features=True)
    outcome = train(config)
    run = outcome.run
    assert run.trainable.names == ("head.weight", "head.bias")
    assert run.train.input_shape == (32,)
    assert rescore(outcome.folder.path)[2].accuracy == pytest.approx(outcome.score.accuracy)


@pytest.mark.parametrize("trainable", ["all", "bias"])
def test_blocks_that_are_run_once_train_as_those_that_are_run_always(quick, tmp_path, trainable):
    """The same model either way, but for the rounding of other physical batches of the frozen blocks."""
    settings = {
        "model": "vit-tiny",
        "image_size": 32,
        "frozen_blocks": 11,
        "trainable": trainable,
        "steps": 2,
    }
    settings["method"] = "non-private"  # noise is drawn by name, and the part has names of its own
    whole = train(quick(**settings, out=tmp_path / "whole"))
    outcome = train(quick(**settings, cache_features=True, out=tmp_path / "cached"))
    run = outcome.run
    assert run.train.input_shape == (5, 192)
    assert run.trainable.names == whole.run.trainable.names
    assert (
        run.trainable.names[0] == {"all": "blocks.11.norm1.weight", "bias": "blocks.11.norm1.bias"}[trainable]
    )
    weights = [load_file(each.folder.weights) for each in (whole, outcome)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)
    assert rescore(outcome.folder.path)[2].accuracy == pytest.approx(outcome.score.accuracy)


def test_features_that_were_kept_train_the_same_head(quick, tmp_path):
    settings = {"model": "lenet", "image_size": 28, "trainable": "head", "cache_features": True}
    settings |= {"keep_features": tmp_path / "kept", "steps": 1, "evaluations": 1}
    made, kept, other = (
        train(quick(**settings, seed=seed, out=tmp_path / name)) for name, seed in zip("abc", (1, 1, 2))
    )
    assert kept.score == made.score
    assert other.score != made.score
    assert len(list((tmp_path / "kept").iterdir())) == 4  # of two backbones, a train and a test part


def test_a_linear_model_on_scattering_features(quick):
    pytest.importorskip("kymatio", reason="scattering features need kymatio")
    outcome = train(quick(features="scattering", model="norm-linear", steps=1, evaluations=1))
    assert outcome.run.train.input_shape == (81, 2, 2)
    assert rescore(outcome.folder.path)[2] == outcome.score


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"optimizer": "adamw", "lr": 1e-3}])
def test_variants_run(quick, changes):
    assert train(quick(lr_schedule="cosine", **changes)).steps == 4


def test_a_hardened_run_ends_where_an_ordinary_one_does(quick, tmp_path):
    """Noise of other draws, as much of it."""
    quiet = {"noise_multiplier": 0.3, "steps": 20, "model": "mlp"}
    plain = train(quick(**quiet))
    hardened = train(quick(**quiet, hardened=True, out=tmp_path / "hardened"))
    assert hardened.run.mechanism.grid is not None
    assert hardened.epsilon == plain.epsilon
    assert hardened.score.accuracy == pytest.approx(plain.score.accuracy, abs=0.1)
    assert Ledger.read(hardened.folder.ledger).releases[0].spec.grid == hardened.run.mechanism.grid


@pytest.mark.parametrize(
    "changes", [{"engine": "jax"}, {"compile": True}, {"method": "non-private"}, {"method": "ghost"}]
)
def test_what_cannot_be_hardened_is_refused(quick, tmp_path, changes):
    with pytest.raises(ValueError, match=r"hardened|grid"):
        train(quick(hardened=True, **changes))
    assert not (tmp_path / "run").exists()


def test_the_non_private_method_learns_without_noise(quick):
    outcome = train(quick(method="non-private", steps=30, lr=0.1))
    assert outcome.epsilon == float("inf")
    assert outcome.score.accuracy > 0.8
    summary = json.loads((outcome.folder.path / "summary.json").read_text())
    assert summary["private"] is False and summary["epsilon"] is None


def test_a_private_run_learns(quick):
    outcome = train(quick(model="mlp", steps=40, noise_multiplier=2.0, lr=0.3))
    assert outcome.epsilon < 4
    assert outcome.score.accuracy > 0.8
