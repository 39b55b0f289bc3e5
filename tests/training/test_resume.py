"""A run that dies goes on: the same, bit for bit, or with fresh randomness that is paid for."""

import importlib
import json
import shutil
import stat
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dptrain import torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger, LedgerError
from dptrain.core.quantile import FollowedClipNorm
from dptrain.core.remembered import remembered
from dptrain.training import ConfigError, Silent, StorageError, checkpoint, resume, run_folder, train
from dptrain.training.checkpoint import CheckpointError, Checkpoints
from dptrain.training.learner import TorchLearner


class Killed(BaseException):
    """Nothing that the run could catch and tidy up after."""


class DieAfter(Silent):
    """Ends the process, as far as the run can see, after some steps."""

    def __init__(self, steps, error=Killed):
        self.steps, self.error, self.heard = steps, error, []

    def stepped(self, step, epsilon, examples_per_s):
        if step.number == self.steps:
            raise self.error

    def resumed(self, taken, lost, repeats):
        self.heard.append((taken, lost, repeats))

    def noted(self, note):
        self.heard.append(note)


class Heard(DieAfter):
    """Lives on."""

    def __init__(self):
        super().__init__(0)


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    """Where keys are kept."""
    monkeypatch.setenv("DPTRAIN_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


def killed(config, after, how=train):
    with pytest.raises(Killed):
        how(config, listener=DieAfter(after))
    return config.out


def weights(outcome):
    return outcome.folder.weights.read_bytes()


def evaluations(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["accuracy"], r["loss"]) for r in records if r["event"] == "evaluation"]


VARIANTS = [
    {},
    {"optimizer": "adamw", "lr": 1e-2, "lr_schedule": "cosine"},
    {"model": "mlp", "weight_average": 0.9, "optimizer": "sgd", "method": "auto"},
    {"model": "lenet", "image_size": 28, "trainable": "head", "cache_features": True},
    {"method": "non-private"},
    {"model": "mlp", "hardened": True},
    {"clip_rule": "quantile", "noise_ramp": 0.5, "augmentations": 2, "accountant": "rdp"},
    {"noise_bands": 4},
    {"optimizer": "adam-bc", "lr": 1e-2, "denoise": 0.5, "weight_average": 0.9},
    {"compress": "public-topk", "keep": 0.1, "public_examples": 50, "error_feedback": True},
    {"optimizer": "accumulated-momentum"},
    {"engine": "jax", "model": "mlp", "optimizer": "adam-bc", "denoise": 0.5, "lr": 1e-2},
    {"engine": "jax", "model": "mlp", "clip_rule": "quantile", "accountant": "rdp"},
    {"engine": "jax", "model": "mlp", "noise_bands": 4},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_a_reproducible_run_ends_as_if_it_had_never_died(quick, tmp_path, changes):
    config = quick(steps=6, checkpoint_every=3, evaluations=3, **changes)
    whole = train(replace(config, out=tmp_path / "whole"))
    folder = killed(config, after=5)
    assert Checkpoints(folder / "checkpoints").newest()[0].step == 3
    listener = Heard()
    outcome = resume(folder, listener=listener)
    assert listener.heard == [(3, 2, True)]
    assert weights(outcome) == weights(whole)
    assert (outcome.epsilon, outcome.releases) == (whole.epsilon, 6)
    assert evaluations(folder) == evaluations(tmp_path / "whole")
    assert not (folder / "checkpoints").exists()


def test_it_may_die_again_and_again(quick, tmp_path):
    config = quick(steps=6, checkpoint_every=4)
    whole = train(replace(config, out=tmp_path / "whole"))
    folder = killed(config, after=1)
    for after in (2, 3, 5, 5):
        with pytest.raises(Killed):
            resume(folder, listener=DieAfter(after))
    assert weights(resume(folder)) == weights(whole)
    assert len(Ledger.read(folder / "ledger.jsonl").releases) == 6


def test_a_secure_run_pays_for_lost_steps_and_ends_earlier(quick):
    config = quick(steps=6, checkpoint_every=3, seed=None)
    folder = killed(config, after=5)
    listener = Heard()
    outcome = resume(folder, listener=listener)
    assert listener.heard == [(3, 2, False)]
    assert (outcome.steps, outcome.releases) == (4, 6)
    assert outcome.epsilon == outcome.run.mechanism.epsilon()
    steps = [release.step for release in Ledger.read(folder / "ledger.jsonl").releases]
    assert steps == [0, 1, 2, 3, 4, 3]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps_taken"], summary["releases"]) == (4, 6)


def test_a_budget_that_is_spent_buys_no_further_step(quick):
    config = quick(steps=4, checkpoint_every=4, seed=None)
    folder = killed(config, after=3)
    with pytest.raises(Killed):
        resume(folder, listener=DieAfter(1))
    outcome = resume(folder)
    assert (outcome.steps, outcome.releases) == (0, 4)
    assert outcome.epsilon == outcome.run.mechanism.epsilon()


def test_nothing_of_a_secure_run_is_drawn_twice(quick):
    """Neither noise nor sample: their difference would tell what the noise hides."""
    seen = []

    class Looks(DieAfter):
        def stepped(self, step, epsilon, examples_per_s):
            seen.append(step.unprotected)
            super().stepped(step, epsilon, examples_per_s)

    config = quick(steps=6, checkpoint_every=6, seed=None, show_unprotected=True)
    with pytest.raises(Killed):
        train(config, Looks(1))
    resume(config.out, listener=Looks(0))
    assert seen[0] != seen[1]


def test_a_key_that_was_kept_repeats_a_secure_run(quick, keys):
    config = quick(steps=6, checkpoint_every=3, seed=None, restart="replay")
    folder = killed(config, after=5)
    lost = Ledger.read(folder / "ledger.jsonl").releases
    (key,) = keys.iterdir()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = json.loads(key.read_text())["key"]
    for path in folder.rglob("*"):
        assert path.is_dir() or (
            secret.encode() not in path.read_bytes() and bytes.fromhex(secret) not in path.read_bytes()
        )
    outcome = resume(folder)
    assert (outcome.steps, outcome.releases) == (6, 6)
    assert Ledger.read(folder / "ledger.jsonl").releases[:5] == lost
    assert not list(keys.iterdir()), "a finished run needs no key"


def test_a_key_that_is_gone_is_replaced_and_paid_for(quick, keys):
    folder = killed(quick(steps=6, checkpoint_every=3, seed=None, restart="replay"), after=5)
    (key,) = keys.iterdir()
    key.unlink()
    listener = Heard()
    outcome = resume(folder, listener=listener)
    assert any("drawn afresh" in str(note) for note in listener.heard)
    assert (outcome.steps, outcome.releases) == (4, 6)


@pytest.mark.parametrize("damage", [lambda key: key.chmod(0o644), lambda key: key.write_text("{}")])
def test_a_key_that_others_may_know_is_refused(quick, keys, damage):
    folder = killed(quick(seed=None, restart="replay", checkpoint_every=2), after=3)
    (key,) = keys.iterdir()
    damage(key)
    with pytest.raises(ValueError, match="remove the file"):
        resume(folder)


@pytest.mark.parametrize("seed", [1, None])
def test_a_step_that_comes_out_otherwise_is_drawn_afresh(quick, monkeypatch, seed):
    """On another machine a sum may round differently; its noise must not be used again."""
    noises = []
    config = quick(steps=6, checkpoint_every=3, seed=seed, restart="replay")
    folder = killed(config, after=5)
    real = dpt.privatize

    def other_rounding(total, spec, key, **options):
        next(iter(total.grads.values())).view(-1)[0] += 1e-6
        noises.append(key)
        return real(total, spec, key, **options)

    monkeypatch.setattr(dpt, "privatize", other_rounding)
    listener = Heard()
    outcome = resume(folder, listener=listener)
    assert listener.heard[0] == (3, 2, True)
    assert "Step 4 did not come out as before" in listener.heard[1]
    assert (outcome.steps, outcome.releases) == (4, 6)
    assert len(set(noises)) == 2


def test_a_clip_norm_that_comes_out_otherwise_is_drawn_afresh(quick, monkeypatch):
    """The next clip norm is released with a step: its noise must not be used on another count either."""
    config = quick(steps=6, checkpoint_every=3, clip_rule="quantile", accountant="rdp")
    folder = killed(config, after=5)
    real = FollowedClipNorm.centred
    monkeypatch.setattr(FollowedClipNorm, "centred", lambda self, norms: real(self, norms) + 1)
    outcome = resume(folder)
    assert (outcome.steps, outcome.releases) == (4, 6)


def test_correlated_noise_is_not_drawn_afresh(quick, monkeypatch):
    """The noise of the steps that are kept is in that of the next: no other key will do."""
    config = quick(steps=6, checkpoint_every=3, noise_bands=4)
    folder = killed(config, after=5)
    real = dpt.privatize

    def other_rounding(total, *rest, **options):
        next(iter(total.grads.values())).view(-1)[0] += 1e-6
        return real(total, *rest, **options)

    monkeypatch.setattr(dpt, "privatize", other_rounding)
    with pytest.raises(ValueError, match="the run ends with the steps that it has"):
        resume(folder)
    assert len(Ledger.read(folder / "ledger.jsonl").releases) == 5
    assert (folder / "summary.json").exists()


def test_noise_of_an_abandoned_course_is_not_used_on_another(quick, monkeypatch):
    """Steps 3 and 4 are lost; 3 is drawn afresh and saved. The seed's noise for 4 is used up."""
    config = quick(steps=9, checkpoint_every=3)
    folder = killed(config, after=5)
    real, drawn = dpt.privatize, []

    def recorded(total, spec, key, **options):
        gradient = real(total, spec, key, **options)
        drawn.append(key)
        return gradient

    def other_rounding(total, *rest, **options):
        next(iter(total.grads.values())).view(-1)[0] += 1e-6
        return recorded(total, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dpt, "privatize", other_rounding)
        resume(folder, listener=DieAfter(4, KeyboardInterrupt))
    before = len(drawn)
    monkeypatch.setattr(dpt, "privatize", recorded)
    resume(folder)
    own = Key.from_seed(config.seed)
    assert drawn[before] == own.child("noise", 4), "it is tried, found to differ, and not released"
    assert drawn[before + 1] == own.child("afresh", 6).child("noise", 4)
    steps = [release.step for release in Ledger.read(folder / "ledger.jsonl").releases]
    assert steps == [0, 1, 2, 3, 4, 3, 4, 5, 6]


def test_interruption_loses_nothing(quick, tmp_path):
    config = quick(steps=6, checkpoint_every=6)
    whole = train(replace(config, out=tmp_path / "whole"))
    outcome = train(config, DieAfter(4, KeyboardInterrupt))
    assert outcome.interrupted and outcome.steps == 4
    listener = Heard()
    assert weights(resume(config.out, listener=listener)) == weights(whole)
    assert listener.heard == [(4, 0, True)]


def test_a_run_that_died_before_its_first_release_begins_again(quick, monkeypatch):
    config = quick(seed=None)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(config)
    outcome = resume(config.out)
    assert (outcome.steps, outcome.releases) == (4, 4)


def test_a_finished_run_cannot_be_resumed(quick):
    folder = train(quick()).folder.path
    with pytest.raises(ConfigError, match="finished"):
        resume(folder)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        resume(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.25}, "--lr was 0.5 and is 0.25"),
        ({"model": "mlp"}, "--model was linear and is mlp"),
        ({"noise_multiplier": 0.5}, "--noise-multiplier was 1.0 and is 0.5"),
        ({"steps": 40}, "--steps was 4 and is 40"),
    ],
)
def test_it_goes_on_with_its_own_settings(quick, changes, message):
    config = quick(checkpoint_every=2)
    folder = killed(config, after=3)
    before = (folder / "ledger.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=message):
        resume(folder, quick(checkpoint_every=2, **changes))
    assert (folder / "ledger.jsonl").read_bytes() == before


def test_a_data_set_of_another_size_is_refused(quick, monkeypatch):
    folder = killed(quick(checkpoint_every=2), after=3)
    prepare = importlib.import_module("dptrain.training.prepare")
    real = prepare.load_splits

    def fewer(*arguments):
        splits = real(*arguments)
        return replace(splits, train=splits.train.subset(torch.arange(1000)))

    monkeypatch.setattr(prepare, "load_splits", fewer)
    with pytest.raises(ConfigError, match="data set, size was 1438 and is 1000"):
        resume(folder)


def test_a_model_of_other_sizes_is_refused(quick, monkeypatch):
    folder = killed(quick(checkpoint_every=2, model="mlp"), after=3)
    prepare = importlib.import_module("dptrain.training.prepare")
    real = prepare.make_model

    def wider(config, splits):
        made = real(config, splits)
        made.model.head = torch.nn.Linear(made.model.head.in_features, 11)
        return made

    monkeypatch.setattr(prepare, "make_model", wider)
    with pytest.raises(ConfigError, match=r"head\.weight was \[10, .* and is \[11, "):
        resume(folder)


def test_a_damaged_checkpoint_is_not_accepted(quick, tmp_path):
    config = quick(steps=6, checkpoint_every=2)
    whole = train(replace(config, out=tmp_path / "whole"))
    folder = killed(config, after=5)
    _, newer = sorted((folder / "checkpoints").glob("step-*"))
    content = bytearray(newer.read_bytes())
    for place in (20, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 4
        newer.write_bytes(damaged)
        found, refused = Checkpoints(folder / "checkpoints").newest()
        assert found.step == 2 and len(refused) == 1
    listener = Heard()
    assert weights(resume(folder, listener=listener)) == weights(whole)
    assert listener.heard[0] == (2, 3, True) and newer.name in listener.heard[1]


def test_without_a_whole_checkpoint_it_cannot_go_on(quick):
    folder = killed(quick(checkpoint_every=2), after=3)
    for path in (folder / "checkpoints").glob("step-*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot go on"):
        resume(folder)


def test_a_ledger_that_was_cut_is_refused(quick):
    folder = killed(quick(steps=6, checkpoint_every=2), after=5)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:4]))
    with pytest.raises(LedgerError, match="holds 3 releases, but 4 had been made"):
        resume(folder)


def test_results_without_their_ledger_are_refused(quick):
    folder = killed(quick(steps=6, checkpoint_every=2), after=5)
    shutil.rmtree(folder / "checkpoints")
    (folder / "ledger.jsonl").unlink()
    with pytest.raises(LedgerError, match="without its ledger"):
        resume(folder)


def test_a_ledger_in_the_way_is_not_removed(quick, tmp_path):
    folder = killed(quick(checkpoint_every=2), after=3)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "ledger.jsonl", other)
    with pytest.raises(LedgerError, match="holds releases"):
        train(quick(out=other))
    assert len(Ledger.read(other / "ledger.jsonl").releases) == 3


def test_frozen_weights_that_chance_made_come_back(quick):
    """Without a seed nothing else could make them again."""
    folder = killed(
        quick(model="lenet", image_size=28, trainable="head", seed=None, checkpoint_every=2), after=3
    )
    frozen = load_file(folder / "checkpoints/fixed.safetensors")
    saved = load_file(resume(folder).folder.weights)
    assert len(frozen) >= 4 and all(torch.equal(saved[name], value) for name, value in frozen.items())


def test_what_was_measured_is_recalled(quick, monkeypatch):
    """`auto` takes the routes that it took before, or sums would round differently."""
    monkeypatch.setenv("DPTRAIN_CACHE", "")
    real, measured, seen = TorchLearner.get_ready, iter([1.0, 2.0]), []

    def measures(learner, compiles):
        memory = remembered("routes", "made up")
        if "gram" not in memory.known:
            memory.known["gram"] = next(measured)
        seen.append(memory.known["gram"])
        return real(learner, compiles)

    monkeypatch.setattr(TorchLearner, "get_ready", measures)
    resume(killed(quick(checkpoint_every=2), after=3))
    assert seen == [1.0, 1.0]


def test_frozen_weights_of_another_run_are_refused(quick, tmp_path):
    changes = {"model": "lenet", "image_size": 28, "trainable": "head", "checkpoint_every": 2}
    one = killed(quick(**changes), after=3)
    other = killed(quick(**changes, out=tmp_path / "other"), after=3)
    shutil.copy(other / "checkpoints/fixed.safetensors", one / "checkpoints/fixed.safetensors")
    with pytest.raises(CheckpointError, match="another run"):
        resume(one)


def test_nothing_else_is_removed_with_the_checkpoints(quick, tmp_path):
    """Also where the folder is a link to another one."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(elsewhere)
    train(quick())
    assert [path.name for path in elsewhere.iterdir()] == ["mine.txt"]


def test_a_run_that_goes_on_is_left_alone(quick):
    folder = killed(quick(checkpoint_every=2), after=3)
    with Ledger.open(folder / "ledger.jsonl"), pytest.raises(LedgerError, match="another process"):
        resume(folder)


@pytest.mark.parametrize(
    ("owner", "name", "spared"),
    [
        (Ledger, "_write", 2),
        (checkpoint, "save_file", 2),
        (run_folder.RunFolder, "append_metrics", 1),
        (run_folder, "save_file", 0),
    ],
    ids=["ledger", "checkpoint", "metrics", "weights"],
)
def test_a_full_disk_stops_a_run_that_can_go_on(quick, tmp_path, monkeypatch, owner, name, spared):
    config = quick(steps=6, checkpoint_every=2, evaluations=6)
    whole = train(replace(config, out=tmp_path / "whole"))
    real, calls = getattr(owner, name), []

    def until_full(*arguments, **options):
        calls.append(1)
        if len(calls) > spared:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, until_full)
        with pytest.raises(StorageError, match=r"No space left on device.*--resume"):
            train(config)
    outcome = resume(config.out)
    assert weights(outcome) == weights(whole) and outcome.releases == 6
    assert not list(config.out.rglob("*.unfinished"))


def test_dropout_is_decided_by_the_seed(quick, tmp_path):
    """A model's own random numbers belong to the step, whoever else has drawn some."""
    config = quick(model="tests.training.dropout:make", steps=6, checkpoint_every=3)
    whole = train(replace(config, out=tmp_path / "whole"))
    folder = killed(config, after=5)
    torch.rand(3)
    outcome = resume(folder)
    assert weights(outcome) == weights(whole) and outcome.releases == 6


def test_what_a_checkpoint_holds_is_what_the_run_may_show(quick, keys):
    """Weights, their average and the optimizer's state: made of releases alone; no loss, norm or sample."""
    folder = killed(quick(steps=4, checkpoint_every=2, seed=None, weight_average=0.5), after=3)
    found, _ = Checkpoints(folder / "checkpoints").newest()
    kinds = {name.split("/")[0] for name in found.tensors}
    assert kinds == {"weights", "average", "optimizer"}
    assert set(found.facts) == {
        "identity",
        "learner",
        "ledger",
        "measured",
        "metrics_bytes",
        "physical_batch_size",
        "training_s",
    }
    assert not keys.exists()


def test_tensors_of_a_checkpoint_cannot_be_swapped(quick):
    folder = killed(quick(checkpoint_every=2, model="mlp"), after=3)
    newest = max((folder / "checkpoints").glob("step-*"))
    with safe_open(newest, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(newest)
    for tensor in tensors.values():
        tensor.zero_()
    save_file(tensors, newest, metadata)
    found, refused = Checkpoints(folder / "checkpoints").newest()
    assert "checksum" in refused[0] and found.step == 0
