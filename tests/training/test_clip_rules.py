"""Runs whose clip rule is another than flat, or whose mechanism changes."""

from __future__ import annotations

import json

import pytest
import torch

import dptrain.torch as dpt
from dptrain.core.clip_rules import PerLayer, Quantile
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.spec import Sampling, StepSpec
from dptrain.training import ConfigError, RunFolder, train


def releases(out) -> list:
    return list(Ledger.read(RunFolder(out).ledger).releases)


ENGINES = pytest.mark.parametrize("engine", ["torch", "jax"])


@pytest.fixture(autouse=True)
def _skips_without_jax(request):
    if "engine" in request.fixturenames and request.getfixturevalue("engine") == "jax":
        pytest.importorskip("jax")


@ENGINES
def test_a_quantile_is_on_record_with_the_noise_on_its_count(engine, quick):
    config = quick(clip_rule="quantile", clip_quantile=0.8, accountant="rdp", model="mlp", engine=engine)
    outcome = train(config)
    rules = {release.spec.clip_rule for release in releases(outcome.folder.path)}
    assert rules == {Quantile(1.0, 0.05 * 200, 0.8)}
    assert outcome.epsilon == outcome.run.mechanism.epsilon(accountant="rdp")


@ENGINES
def test_a_ramp_is_on_record_step_by_step_and_meets_the_budget(engine, quick):
    config = quick(
        engine=engine,
        model="mlp",
        noise_ramp=0.5,
        clip_ramp=0.5,
        batch_ramp=2.0,
        logical_batch_size=128,
        steps=3,
        accountant="rdp",
        noise_multiplier=None,
        epsilon=8.0,
    )
    outcome = train(config)
    made = [release.spec for release in releases(config.out)]
    assert [spec.clip_norm / made[0].clip_norm for spec in made] == pytest.approx([1, 0.5**0.5, 0.5])
    assert [spec.expected_batch_size for spec in made] == pytest.approx([128, 128 * 2**0.5, 256])
    assert made[2].noise_multiplier == pytest.approx(made[0].noise_multiplier / 2)
    assert outcome.epsilon <= config.epsilon
    assert json.loads((config.out / "summary.json").read_text())["epsilon"] == outcome.epsilon


@ENGINES
def test_layers_are_clipped_each_by_itself_at_the_same_epsilon(engine, quick):
    outcome = train(quick(clip_rule="per-layer", model="mlp", engine=engine, steps=2))
    rule = releases(outcome.folder.path)[0].spec.clip_rule
    assert isinstance(rule, PerLayer) and rule.sensitivity == pytest.approx(1.0)
    layers = {name.rpartition(".")[0] for name, p in outcome.run.learner.named_parameters()}
    assert len(rule.clip_norms) == len(layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_rule": "quantile", "compile": True}, "leave out --compile"),
        ({"clip_rule": "automatic", "hardened": True}, "--hardened clips gradients as a whole"),
        ({"noise_bands": 4, "seed": None}, "needs --restart replay"),
        ({"noise_bands": 4, "hardened": True}, "does not go with --hardened"),
        ({"noise_ramp": 0.0}, "--noise-ramp is 0.0"),
        ({"augmentations": -1}, "number of views"),
        ({"clip_quantile": 1.0}, "between 0 and 1"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message, quick):
    with pytest.raises(ConfigError, match=message):
        quick(**changes).check()


def test_make_private_follows_a_quantile_and_goes_on_where_it_was():
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(40, 3), torch.randint(2, (40,)))
    loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
    spec = StepSpec(Quantile(5.0, count_noise=2.0), 1.0, Sampling("poisson", 0.5), 20)
    mechanism = Mechanism(((spec, 6),))

    def fresh():
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def private(model, optimizer, **options):
        return dpt.make_private(
            model, optimizer, data, loss, mechanism, physical_batch_size=8, key=Key.from_seed(1), **options
        )

    model, optimizer = fresh()
    whole = private(model, optimizer)
    norms = [whole.clip_norm for _ in whole.steps()]
    assert norms[-1] < 5.0 and len(set(norms)) == 6
    with pytest.raises(ValueError, match="leave out compile"):
        private(*fresh(), compile=True)
