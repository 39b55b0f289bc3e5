import json
import os
import signal

import pytest

from dptrain.cli import main
from dptrain.cli.train import parse
from dptrain.recipes import RECIPES
from dptrain.training import TrainConfig, session

QUICK = ["--model", "linear", "--steps", "3", "--physical-batch-size", "128"]


def test_defaults():
    assert parse([]) == TrainConfig()


def test_flags_over_a_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "mlp"\nlr = 0.25\n')
    config = parse(["--config", str(path), "--lr", "0.125"])
    assert (config.model, config.lr, config.clip_norm) == ("mlp", 0.125, TrainConfig().clip_norm)


def test_a_flag_replaces_its_rival():
    config = parse(["--noise-multiplier", "2", "--epochs=3"])
    assert (config.epsilon, config.noise_multiplier) == (None, 2.0)
    assert (config.epochs, config.steps) == (3.0, None)
    config.check()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound_and_can_be_overridden(name):
    config = parse(["--recipe", name, "--noise-multiplier", "3"])
    config.check()
    assert (config.epsilon, config.noise_multiplier) == (None, 3.0)
    assert parse(["--recipe", name]).epsilon is not None


def test_the_paper_takes_four_steps():
    for name in ("vit-base-cifar100", "bit-resnet-cifar100"):
        config = RECIPES[name]()
        assert round(config.epochs / (config.logical_batch_size / 50_000)) == 4


def test_train_then_evaluate(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", *QUICK, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for quantity in ("epsilon spent", "delta", "sample rate q", "noise multiplier", "sensitivity"):
        assert quantity in shown
    assert "UNPROTECTED" not in shown
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", str(out)]) == 0
    assert (out / "evaluation.json").is_file()


def test_a_compiled_run_compiles_once(tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr("dptrain.torch.compile.by_inductor", lambda graph, _: graphs.append(graph) or graph)
    assert main(["train", *QUICK, "--compile", "--out", str(tmp_path / "run")]) == 0
    assert len(graphs) == 1


def test_unprotected_values_are_labelled(tmp_path, capsys):
    assert main(["train", *QUICK, "--out", str(tmp_path / "run"), "--show-unprotected"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("UNPROTECTED") >= 3


def test_the_absence_of_privacy_is_said(tmp_path, capsys):
    assert main(["train", *QUICK, "--method", "non-private", "--out", str(tmp_path / "r")]) == 0
    assert "epsilon = inf" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "no-such-data"], "no data set or image folder"),
        (["train", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["train", "--method", "no-such-method"], "choose one of"),
        (["train", "--epsilon", "1", "--noise-multiplier", "1"], "exactly one of"),
        (["train", "--logical-batch-size", "5000"], "at most that"),
        (["train", "--recipe", "no-such-recipe"], "no recipe"),
        (["train", "--config", "no-such-file"], "no configuration file"),
        (["evaluate", "no-such-run"], "not a finished run"),
        (["privacy", "--delta", "-1", "--steps", "3", "--epsilon", "1"], "sample rate"),
        (["no-such-command"], "no command"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, capsys, tmp_path):
    if arguments[0] == "train":
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_flags_that_do_not_parse_exit_with_2():
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "--lr", "fast"])
    assert exit_info.value.code == 2


def test_privacy_answers(capsys):
    arguments = ["--delta", "1e-5", "--noise-multiplier", "8", "--steps", "200"]
    arguments += ["--sample-rate", "0.5"]
    assert main(["privacy", *arguments]) == 0
    assert "epsilon = 3.8379" in capsys.readouterr().out


def test_ledgers_say_what_was_spent(tmp_path, capsys):
    for name in ("a", "b"):
        assert main(["train", *QUICK, "--accountant", "rdp", "--out", str(tmp_path / name)]) == 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    capsys.readouterr()
    ask = ["privacy", "--delta", "1e-4", "--accountant", "rdp", "--as-json", "--ledger"]
    assert main([*ask, str(tmp_path / "a")]) == 0
    (once,) = json.loads(capsys.readouterr().out)
    assert once["epsilon"] == summary["epsilon"] and once["releases"] == 3
    assert main([*ask, str(tmp_path / "a/ledger.jsonl"), str(tmp_path / "b")]) == 0
    (both,) = json.loads(capsys.readouterr().out)
    assert both["epsilon"] > once["epsilon"] and both["releases"] == 6 and both["dataset"] == "digits"
    assert main(["privacy", "--delta", "1e-4", "--ledger", str(tmp_path / "a")]) == 0
    assert "digits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ledger", "no-such-file"], "does not exist"),
        (["--ledger", "x", "--steps", "3"], "from the record alone"),
    ],
)
def test_ledgers_that_say_nothing(arguments, message, capsys):
    assert main(["privacy", "--delta", "1e-4", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_goes_on_by_its_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    out = str(tmp_path / "run")
    flags = [*QUICK, "--seed", "1", "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        calls = []

        def twice(self, *arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            real(self, *arguments)

        real = session.Session._took
        patch.setattr(session.Session, "_took", twice)
        assert main(["train", *flags, "--out", out]) == 130
    assert f"dptrain train --resume {out}" in capsys.readouterr().out
    assert main(["train", "--resume", out, "--lr", "0.1"]) == 2
    assert "--lr was 0.6 and is 0.1" in " ".join(capsys.readouterr().err.split())
    assert main(["train", "--resume", out, "--show-unprotected"]) == 0
    assert "Goes on after step 3." in capsys.readouterr().out
    assert main(["train", "--resume", out]) == 2
    assert "finished" in capsys.readouterr().err


def test_what_batch_systems_send_ends_a_run_as_ctrl_c_does(tmp_path, monkeypatch):
    real = session.Session._took

    def terminated(self, step, due):
        real(self, step, due)
        if step.number == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(session.Session, "_took", terminated)
    assert main(["train", *QUICK, "--out", str(tmp_path / "run")]) == 130
    assert json.loads((tmp_path / "run/summary.json").read_text())["interrupted"]
    assert signal.getsignal(signal.SIGTERM) == before


def ended_while_ending(monkeypatch, *signals):
    """Runs get these signals in `_finish`, after an interruption."""
    took, finish = session.Session._took, session.Session._finish

    def interrupted(self, step, due):
        took(self, step, due)
        raise KeyboardInterrupt

    def disturbed(self, interrupted):
        for each in signals:
            os.kill(os.getpid(), each)
        return finish(self, interrupted)

    monkeypatch.setattr(session.Session, "_took", interrupted)
    monkeypatch.setattr(session.Session, "_finish", disturbed)


def test_a_run_that_is_ending_is_not_ended_again_by_what_batch_systems_send(tmp_path, monkeypatch):
    ended_while_ending(monkeypatch, signal.SIGTERM)
    assert main(["train", *QUICK, "--out", str(tmp_path / "run")]) == 130
    assert json.loads((tmp_path / "run/summary.json").read_text())["interrupted"]


def test_a_second_ctrl_c_does_not_say_that_nothing_was_spent(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    ended_while_ending(monkeypatch, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        assert main(["train", *QUICK, "--out", str(tmp_path / "run")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err
    assert f"go on with --resume {tmp_path / 'run'}" in said and "nothing was spent" not in said
