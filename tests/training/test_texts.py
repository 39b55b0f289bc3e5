"""Texts, adapters and converted networks, from configuration to score."""

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from dptrain.cli import main
from dptrain.models import ModelError
from dptrain.training import ConfigError, prepare, train
from dptrain.training.rescore import rescore


@pytest.fixture
def quick_texts(quick, reviews_folder, text_models):
    """Configurations of runs of a tiny model of transformers on short texts, differing as asked."""

    def make(model="bert", **changes):
        settings = {
            "data": f"hf:{reviews_folder}",
            "text_column": "review",
            "label_column": "verdict",
            "model": f"hf:{text_models / model}",
            "logical_batch_size": 100,
            "physical_batch_size": 32,
            "optimizer": "adam",
            "lr": 1e-2,
        }
        return quick(**settings | changes)

    return make


def test_a_private_run_on_texts_learns_and_scores_as_it_did(quick_texts):
    outcome = train(quick_texts(steps=40, lr=2e-2, noise_multiplier=0.7))
    assert outcome.epsilon < 20
    assert outcome.score.accuracy > 0.8 and outcome.score.examples == 100
    _, name, score = rescore(outcome.folder.path)
    assert (name, score) == ("test", outcome.score)


def test_the_same_from_the_command_line(reviews_folder, text_models, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [
        "--text-column",
        "review",
        "--label-column",
        "verdict",
        "--max-length",
        "8",
        "--steps",
        "2",
        "--noise-multiplier",
        "2",
    ]
    flags += ["--logical-batch-size", "60", "--physical-batch-size", "32", "--out", str(out)]
    data, model = f"hf:{reviews_folder}", f"hf:{text_models / 'bert-weights'}"
    assert main(["train", "--data", data, "--model", model, "--pretrained", *flags]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 reset (classifier.bias, classifier.weight)" in shown and "epsilon spent" in shown
    assert main(["evaluate", str(out)]) == 0
    record = json.loads((out / "evaluation.json").read_text())
    assert record["examples"] == 100


@pytest.mark.parametrize("model", ["bert", "distilbert", "gpt2"])
def test_adapters_of_a_model_of_texts(quick_texts, model):
    outcome = train(quick_texts(model, trainable="lora", lora_rank=2))
    assert 0 < outcome.run.trainable.count < outcome.run.trainable.total / 2
    names = outcome.run.trainable.names
    assert any("lora_A" in name for name in names) and set(load_file(outcome.folder.weights)) > set(names)
    assert rescore(outcome.folder.path)[2] == outcome.score


def test_adapters_of_a_vit(quick, tmp_path):
    config = quick(
        model="vit_tiny_patch16_224", image_size=32, trainable="lora", steps=1, physical_batch_size=8
    )
    outcome = train(config)
    assert outcome.run.trainable.count < 0.1 * outcome.run.trainable.total
    assert rescore(outcome.folder.path)[2] == outcome.score


def test_a_seed_fixes_the_adapters_too(quick_texts):
    def adapter(seed):
        model = prepare(quick_texts(trainable="lora", seed=seed)).model
        return model.bert.encoder.layer[0].attention.self.query.lora_A["default"].weight

    assert (adapter(1) == adapter(1)).all() and (adapter(1) != adapter(2)).any()


def test_a_converted_network_is_trained_and_scores_as_it_did(quick):
    config = quick(model="test_resnet", image_size=32, physical_batch_size=8, convert=True, steps=2)
    outcome = train(config)
    assert len(outcome.run.conversion.converted) > 5
    assert not any("running_mean" in name for name in load_file(outcome.folder.weights))
    assert rescore(outcome.folder.path)[2] == outcome.score


def test_cached_features_of_a_model_of_texts(quick_texts, tmp_path):
    config = quick_texts(trainable="head", cache_features=True)
    outcome = train(config)
    assert outcome.run.train.input_shape == (16,)
    assert rescore(outcome.folder.path)[2].accuracy == pytest.approx(outcome.score.accuracy)
    with pytest.raises(ConfigError, match="reads one vector per example"):
        prepare(quick_texts("gpt2", trainable="head", cache_features=True))


def test_what_cannot_be_done_is_said_before_it_begins(quick_texts, tmp_path):
    tokenizer = quick_texts().model.removeprefix("hf:")
    with pytest.raises(ModelError, match="linear cannot read tokenised text"):
        train(replace(quick_texts(), model="linear", tokenizer=tokenizer))
    assert not (tmp_path / "run").exists()


def test_images_and_their_classifier_of_transformers(quick, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.ViTConfig(**size, image_size=8, patch_size=4).save_pretrained(tmp_path / "vit")
    outcome = train(quick(model=f"hf:{tmp_path / 'vit'}", trainable="lora", lora_rank=2))
    assert outcome.run.train.input_shape == (1, 8, 8)
    assert rescore(outcome.folder.path)[2] == outcome.score


def test_a_data_set_without_a_test_split(quick_texts, reviews_folder, tmp_path):
    data = f"hf:{reviews_folder / 'train.csv'}"
    with pytest.raises(ValueError, match="--validation-fraction"):
        prepare(quick_texts(data=data))
    run = prepare(quick_texts(data=data, validation_fraction=0.25))
    assert (len(run.train), len(run.held_out), run.held_out_name) == (450, 150, "validation")


def test_a_run_without_a_name_gets_one_that_is_a_folder(quick_texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = train(quick_texts(out=None, steps=1))
    assert outcome.folder.path.parent.name == "runs" and outcome.folder.path.name.count("-") >= 3
