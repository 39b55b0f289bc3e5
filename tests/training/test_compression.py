"""Runs that compress: what they keep, what they say of it, and what has no guarantee."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dptrain.cli import privacy
from dptrain.core.ledger import Ledger
from dptrain.data import Splits
from dptrain.training import ConfigError, train
from dptrain.training.config import KNOWN_BEFORE, LEAKY
from dptrain.training.prepare import PUBLIC_SEED, declare_public, prepare

PUBLIC = {"public_examples": 100}
HIDDEN = "hidden.weight", 128 * 64


def summary(outcome):
    return json.loads((outcome.folder.path / "summary.json").read_text())


def changed(config):
    """How many hidden weights one step of plain SGD has changed, and the outcome."""
    before = dict(prepare(config).model.named_parameters())["hidden.weight"].detach().clone()
    outcome = train(config)
    return int((load_file(outcome.folder.weights)["hidden.weight"] != before).sum()), outcome


@pytest.mark.parametrize("name", ["topk", "random-k", "public-topk"])
def test_a_step_changes_what_is_kept_and_says_what_it_sends(quick, name):
    own = PUBLIC if name.startswith("public") else {}
    config = quick(model="mlp", steps=1, optimizer="sgd", compress=name, keep=0.05, evaluations=1, **own)
    moved, outcome = changed(config)
    kept = round(0.05 * HIDDEN[1])
    assert moved == kept
    total = kept + sum(max(1, round(0.05 * n)) for n in (128, 10 * 128, 10))
    said = summary(outcome)
    assert said["bytes_per_step"]["release_bytes"] == total * (8 if name == "topk" else 4)
    dense = 4 * (HIDDEN[1] + 128 + 10 * 128 + 10)
    assert said["bytes_per_step"]["sum_bytes"] == (dense if name == "topk" else 4 * total)
    assert said["private"] and said["compression"].startswith(f"{name}: 5 % of each tensor, after the noise")


@pytest.mark.parametrize("name", KNOWN_BEFORE)
def test_what_is_clipped_is_what_is_kept(quick, name, monkeypatch):
    """Before clipping: the clipped sum of every step lies in the projections of that step."""
    import dptrain.torch as dpt
    from dptrain.training.compress import Compressor

    seen = []
    privatize, before = dpt.privatize, Compressor.before

    def watched(compressor, key):
        before(compressor, key)
        seen.append(compressor)

    def released(total, *args, **options):
        for n, g in total.grads.items():
            kept = seen[-1]._projections[n]
            assert g.any() or kept.size == 0
            torch.testing.assert_close(kept(g), g, atol=1e-5, rtol=1e-4)
        return privatize(total, *args, **options)

    monkeypatch.setattr(Compressor, "before", watched)
    monkeypatch.setattr(dpt, "privatize", released)
    config = quick(steps=2, compress=name, keep=0.1, evaluations=1, compress_before_clipping=True, **PUBLIC)
    if name == "public-topk":  # public images are seen as private ones are
        config = replace(config, augmentations=2)
    outcome = train(config)
    assert len(seen) == 2 and "before clipping" in summary(outcome)["compression"]


def test_public_examples_have_no_part_in_the_private_ones(quick):
    config = quick(**PUBLIC)
    run, plain = prepare(config), prepare(quick())
    assert len(run.train) == len(plain.train) - 100 and len(run.public) == 100
    assert run.mechanism.sample_rate == 200 / len(run.train) != plain.mechanism.sample_rate
    assert run.mechanism.expected_batch_size == 200

    class Indices:
        """Of a data set, which examples it has."""

        def __init__(self, own):
            self.own = own

        def __len__(self):
            return len(self.own)

        def subset(self, indices):
            return Indices(self.own[indices])

    found = declare_public(Splits(Indices(torch.arange(50)), None), 20)
    assert len(found.public) == 20
    assert sorted([*found.train.own.tolist(), *found.public.own.tolist()]) == list(range(50))
    assert PUBLIC_SEED == 2, "resumed runs have the same public examples"
    with pytest.raises(ConfigError, match="there are 50"):
        declare_public(Splits(Indices(torch.arange(50)), None), 50)


def test_what_leaks_has_no_guarantee_wherever_it_is_asked(quick, capsys):
    outcome = train(quick(model="mlp", compress=LEAKY, keep=0.05))
    said = summary(outcome)
    assert outcome.epsilon == float("inf") and said["epsilon"] is None and not said["private"]
    assert said["compression"].startswith("leaky-topk-no-guarantee")
    assert outcome.run.in_vain.noise_multiplier == 1.0 and outcome.run.mechanism.noise_multiplier == 0.0
    assert all(e["epsilon"] is None for e in outcome.folder.evaluations())
    ledger = Ledger.read(outcome.folder.ledger)
    assert {r.spec.noise_multiplier for r in ledger.releases} == {0.0} and len(ledger.releases) == 4
    assert ledger.epsilon(1e-4) == float("inf")
    privacy.run(["--ledger", str(outcome.folder.ledger), "--delta", "1e-4"])
    assert "inf" in capsys.readouterr().out


def test_what_leaks_still_gets_the_noise_that_it_is_to_show(quick):
    """Otherwise it would be compared with something else than it claims."""
    settings = {
        "model": "mlp",
        "steps": 1,
        "optimizer": "sgd",
        "lr": 1.0,
        "compress": LEAKY,
        "evaluations": 1,
    }
    config = quick(**settings, keep=1.0, noise_multiplier=50.0)
    before = dict(prepare(config).model.named_parameters())["hidden.weight"].detach().clone()
    after = load_file(train(config).folder.weights)["hidden.weight"]
    assert float((after - before).std()) == pytest.approx(50.0 * 1.0 / 200, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress": "public-topk"}, "needs public examples"),
        ({"compress": "topk", "compress_before_clipping": True}, "no private example decides"),
        ({"error_feedback": True}, "not for --compress none"),
        ({"compress": LEAKY, "error_feedback": True}, "not for --compress leaky"),
        ({"compress": LEAKY, "hardened": True}, "cannot go with --hardened"),
        ({"compress": LEAKY, "method": "public"}, "cannot go with --method public"),
        (
            {"compress": "random-k", "compress_before_clipping": True, "error_feedback": True},
            "after the noise",
        ),
        ({"compress": "topk", "optimizer": "adam-bc"}, "noise of all coordinates"),
        ({"compress": LEAKY, "clip_rule": "quantile"}, "follow a quantile"),
        ({"compress": "random-k", "compress_before_clipping": True, "denoise": 0.5}, "leave one of them out"),
        ({"compress": LEAKY, "noise_bands": 4}, "no noise to correlate"),
        ({"compress": "topk", "engine": "jax"}, "for --engine torch"),
        ({"compress": "topk", "keep": 2.0}, "at most 1"),
        ({"compress": "topk", "keep": 0.0}, "positive"),
        ({"compress": "leaky"}, "cannot be"),
        ({"public_examples": -1}, "at least 0"),
    ],
)
def test_what_cannot_be_compressed_is_refused(quick, changes, message):
    with pytest.raises(ConfigError, match=message):
        quick(**changes).check()
