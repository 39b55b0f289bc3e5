"""`dptrain check`: exit codes, JSON, and text that fits a terminal."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest
import torch

from dptrain.cli import main

BERT = ["bert", "--length", "8", "--config", "num_hidden_layers=3", "hidden_size=16", "intermediate_size=32"]
BERT += ["num_attention_heads=2", "vocab_size=50"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def subjects(tmp_path, monkeypatch):
    """A module of models, importable as `subjects_of_check`."""
    (tmp_path / "subjects_of_check.py").write_text(
        textwrap.dedent(
            """
            import torch, torch.nn.functional as F
            from torch import nn

            class Mixing(nn.Linear):
                def forward(self, x):
                    return super().forward(x.flatten(1) - x.flatten(1).mean(0).detach())

            class Spare(nn.Linear):
                def __init__(self, *sizes):
                    super().__init__(*sizes)
                    self.spare = nn.Parameter(torch.ones(2))

            def loss_fn(model, batch):
                return F.cross_entropy(model(batch["inputs"]["x"]), batch["y"], reduction="none")

            def triple():
                batch = {"inputs": {"x": torch.randn(2, 5)}, "y": torch.tensor([0, 2])}
                return nn.Linear(5, 3), loss_fn, batch

            def spare():
                return Spare(5, 3), *triple()[1:]

            def model():
                return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

            def mixing(num_classes, input_shape):
                return Mixing(3 * 32 * 32, num_classes)

            def norm(num_classes, input_shape):
                return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(3600, 10))

            def nonsense():
                return "model"

            def broken():
                return nn.Linear(7, 3), loss_fn, triple()[2]
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "subjects_of_check"
    sys.modules.pop("subjects_of_check", None)


def check(capsys, *arguments: str) -> tuple[int, str]:
    status = main(["check", *arguments])
    return status, capsys.readouterr().out


def test_an_exact_model(capsys):
    status, shown = check(capsys, "vit-tiny", "--image-size", "32", "--trainable", "bias", "--memory", "2GB")
    assert status == 0
    for text in (
        "blocks.{0-11}.attn.qkv.bias",
        "coverage",
        "largest errors",
        "largest physical batch",
        "2 GB",
    ):
        assert text in shown
    assert shown.rstrip().splitlines()[-1] == "EXACT"
    assert max(map(len, shown.splitlines())) <= 100
    assert len(shown.splitlines()) < 50


def test_every_use_on_request(capsys):
    _, shown = check(capsys, "mlp", "--all")
    assert "hidden.weight" in shown and "head.bias" in shown and "{" not in shown


def test_json(capsys):
    status, shown = check(capsys, "linear", "--json", "--memory", "1.5GiB")
    record = json.loads(shown)
    assert status == 0 and record["verdict"] == "EXACT"
    assert record["uses"] == {"head.weight": 1, "head.bias": 1}
    assert record["exactness"]["norm_error"] < 1e-9
    assert record["memory"]["budget_bytes"] == 1.5 * 2**30 and record["memory"]["largest"] > 0
    assert {row["parameter"] for row in record["plan"]} == {"head.weight", "head.bias"}


def test_batch_norm_is_refused_with_advice_that_helps(capsys, subjects):
    status, shown = check(capsys, f"{subjects}:norm")
    assert status == 1 and "REFUSED" in shown and "--convert" in shown
    status, shown = check(capsys, f"{subjects}:norm", "--convert")
    assert status == 0 and "layers converted" in shown


def test_mixing_is_refused(capsys, subjects):
    status, shown = check(capsys, f"{subjects}:mixing")
    assert status == 1 and "REFUSED: examples mix" in shown


def test_import_paths(capsys, subjects):
    assert check(capsys, f"{subjects}:model")[0] == 0
    status, shown = check(capsys, f"{subjects}:triple")
    assert status == 0 and "inputs.x float32 [2, 5]" in shown


def test_unused_parameters(capsys, subjects):
    status, shown = check(capsys, f"{subjects}:spare")
    assert status == 1 and "without a use" in shown and "spare" in shown
    assert check(capsys, f"{subjects}:spare", "--allow-unused")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "no model 'no-such-model'"),
        (["vit-tyni"], "did you mean vit-tiny"),
        (["linear", "--task", "lm"], "for models of transformers"),
        (["linear", "--memory", "much"], "--memory takes a size"),
        (["linear", "--method", "per-example-loop"], "makes no plan"),
        (["linear", "--method", "nonsense"], "choose one of"),
        (["linear", "--batch-size", "0"], "at least 1"),
        (["linear", "--trainable", "nothing"], "matches no parameter"),
        (["math:tau"], "Cannot import math:tau"),
        (["no_such_package:factory"], "Cannot import"),
        (["SUBJECTS:nonsense"], "returned a str"),
        (["SUBJECTS:broken"], "loss of SUBJECTS:broken cannot be computed"),
        (["linear", "--weights", "no-such-file"], "no weight file"),
    ],
)
def test_bad_input(capsys, subjects, arguments, message):
    assert main(["check", arguments[0].replace("SUBJECTS", subjects), *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert message.replace("SUBJECTS", subjects) in " ".join(error.split())
    assert "Traceback" not in error


# ---------------------------------------------------------------------- transformers


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def test_a_model_type_with_overrides(capsys, transformers):
    status, shown = check(capsys, *BERT)
    assert status == 0
    assert "BertForSequenceClassification" in shown and "bert.encoder.layer.{0-2}" in shown
    assert "padded" in shown and "random draws" in shown  # dropout
    assert max(map(len, shown.splitlines())) <= 100


TINY = ["--length", "6", "--batch-size", "2", "--json", "--config", "vocab_size=40"]
NARROW = ["num_hidden_layers=1", "hidden_size=8", "intermediate_size=8", "num_attention_heads=2"]


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["gpt2", *TINY, "n_layer=1", "n_embd=8", "n_head=2"], "GPT2LMHeadModel"),
        (["gpt2", "--task", "classification", *TINY, "n_layer=1", "n_embd=8", "n_head=2"], "GPT2ForSequence"),
        (
            ["llama", *TINY, *NARROW, "num_key_value_heads=1"],
            "LlamaForCausalLM",
        ),
        (["t5", *TINY, "d_model=8", "d_ff=8", "num_layers=1", "num_heads=2", "d_kv=4"], "T5ForConditional"),
        (["BertForMaskedLM", *TINY, *NARROW], "BertForMaskedLM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:3]),
)
def test_each_task(capsys, transformers, arguments, model):
    status, shown = check(capsys, *arguments)
    record = json.loads(shown)
    assert (status, record["verdict"]) == (0, "EXACT"), record["reason"]
    assert model in record["subject"] and record["unused"] == []


def test_a_local_configuration(capsys, transformers, tmp_path):
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=30
    )
    config.save_pretrained(tmp_path)
    for name in (str(tmp_path), str(tmp_path / "config.json"), f"hf:{tmp_path}"):
        status, shown = check(capsys, name, "--length", "6", "--config", "hidden_size=4")
        assert status == 0 and "BertForSequenceClassification" in shown and "4×4" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "shrink it, for example --config num_hidden_layers=2"),
        (["brt"], "did you mean bert"),
        (["transformers:brt"], "did you mean bert"),
        (["bert", "--config", "hidden_sizes=3"], "did you mean hidden_size"),
        (["bert", "--config", "hidden_size"], "takes key=value"),
        (["bert", "--config", "hidden_size=7"], "cannot be built with this --config"),
        (["bert", "--task", "seq2seq"], "choose --task classification or lm"),
        (["no-such.json"], "does not exist"),
    ],
)
def test_bad_input_for_transformers(capsys, transformers, arguments, message):
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error


def test_transformers_is_optional(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["check", "transformers:bert"]) == 2
    assert "pip install 'dptrain[transformers]'" in " ".join(capsys.readouterr().err.split())
    assert main(["check", "linear"]) == 0
