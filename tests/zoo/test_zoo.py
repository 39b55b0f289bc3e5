"""Every model of the zoo is exact under dptrain, or refused where no private gradient exists."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.zoo.docs import write_docs
from benchmarks.zoo.engines import Engine, Missing, dptrain, engine_named
from benchmarks.zoo.entry import Case, Entry, has_batch_norm
from benchmarks.zoo.families import CATALOGUE
from benchmarks.zoo.verdict import TOLERANCE, Answer, judge

pytestmark = [
    # said by libraries about themselves
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


#: refused although single examples have gradients, with a word of why; all others must be exact
KNOWN_REFUSALS = {
    "transformers/reformer": "received an ordinary gradient",  # its layers differentiate by themselves
    "transformers/timesformer": "examples mix",  # takes class tokens from the rows of other examples
}


def parameters(refusable: bool):
    return [
        pytest.param(entry, id=entry.name, marks=[pytest.mark.slow] if entry.slow else [])
        for entry in CATALOGUE
        if entry.refusable == refusable
    ]


@pytest.mark.parametrize("entry", parameters(refusable=False))
def test_exact(entry):
    verdict = judge(entry, dptrain())
    if entry.name in KNOWN_REFUSALS:
        assert verdict.verdict == "refused" and KNOWN_REFUSALS[entry.name] in verdict.sentence
    else:
        assert verdict.verdict == "exact", verdict.sentence


@pytest.mark.parametrize("entry", parameters(refusable=True))
def test_refused(entry):
    assert has_batch_norm(entry.make().model) == entry.batch_norm
    verdict = judge(entry, dptrain())
    assert verdict.verdict == "refused", verdict.sentence


def test_breadth():
    """Many families, in the part that always runs too, and no name twice."""
    assert len({entry.name for entry in CATALOGUE}) == len(CATALOGUE)
    fit = [entry for entry in CATALOGUE if not entry.refusable]
    assert len({entry.family for entry in fit}) >= 90
    assert len({entry.family for entry in fit if not entry.slow}) >= 60


# ---------------------------------------------------------------- the judge itself


def linear() -> Case:
    def loss(model, batch):
        return model(batch["x"]).square().sum(1)

    return Case(nn.Linear(3, 2), loss, lambda size: {"x": torch.randn(size, 3, dtype=torch.float64)})


ENTRY = Entry("torch/linear", "linear", linear)


def single_examples(case: Case, batch, clip_norm: float, stabiliser: float = 0.0) -> Answer:
    total = {name: torch.zeros_like(p) for name, p in case.model.named_parameters()}
    for x in batch["x"]:
        loss = case.loss_fn(case.model, {"x": x[None]}).sum()
        grads = torch.autograd.grad(loss, list(case.model.parameters()))
        norm = sum(g.square().sum() for g in grads).sqrt()
        for name, g in zip(total, grads):
            total[name] += g * min(1.0, clip_norm / (float(norm) + stabiliser))
    return Answer(total, stabiliser=stabiliser)


def altered(change):
    def clipped_sum(*args) -> Answer:
        answer = single_examples(*args)
        return Answer(change(answer.grads))

    return Engine(clipped_sum, (), tolerance=TOLERANCE)


@pytest.mark.parametrize("stabiliser", [0.0, 1e-2])
def test_an_exact_engine_is_exact(stabiliser):
    """A constant beside the norm is compared with the formula that has it."""
    engine = Engine(lambda *args: single_examples(*args, stabiliser), (), tolerance=TOLERANCE)
    assert judge(ENTRY, engine).verdict == "exact"


@pytest.mark.parametrize(
    "change",
    [
        lambda grads: grads | {"bias": grads["bias"] * (1 + 1e-7)},
        lambda grads: grads | {"weight": grads["weight"].flip(0)},
        lambda grads: grads | {"weight": grads["weight"] * float("nan")},
    ],
)
def test_a_wrong_engine_is_wrong(change):
    verdict = judge(ENTRY, altered(change))
    assert verdict.verdict == "WRONG" and verdict.sentence


def test_a_skipped_parameter_is_wrong():
    verdict = judge(ENTRY, altered(lambda grads: {"weight": grads["weight"]}))
    assert verdict.verdict == "WRONG" and verdict.skipped == ("bias",)


def test_an_exception_is_a_verdict():
    def fails(*args):
        raise KeyError("weight")

    assert judge(ENTRY, Engine(fails, ())).verdict == "raises"
    assert judge(ENTRY, Engine(fails, (), lambda: (KeyError,))).verdict == "refused"


# ---------------------------------------------------------------- the command and its page


def test_an_unknown_engine_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown engine 'tf-privacy': choose from dptrain, opacus-hooks"):
        engine_named("tf-privacy")


def test_a_missing_peer_says_where_to_name_it(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTDP", str(tmp_path))
    with pytest.raises(Missing, match="FASTDP"):
        engine_named("fastdp")


def test_the_page_shows_the_records(tmp_path):
    """``python -m benchmarks.zoo --docs`` would change nothing."""
    root = Path(__file__).parents[2]
    page = shutil.copy(root / "docs" / "zoo.md", tmp_path)
    write_docs(root / "results", Path(page))
    assert Path(page).read_text() == (root / "docs" / "zoo.md").read_text()
