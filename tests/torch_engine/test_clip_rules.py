"""Rules other than flat clipping, by every method, against one example at a time; and what they promise."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import dptrain.torch as dpt
from dptrain.core.clip_rules import Automatic, ClipRule, Flat, GroupWise, PerLayer
from dptrain.core.entropy import Key
from dptrain.core.spec import Sampling, StepSpec

from . import cases, oracle
from .test_compile import as_traced, seen  # noqa: F401
from .test_exact import PRIVATE, TOLERANCE, poisoned


def every_other(names: list[str], *clip_norms: float) -> GroupWise:
    """Groups that run through layers, and through values made of several parameters."""
    first = "|".join(f"^{re.escape(name)}$" for name in names[::2])
    return GroupWise(clip_norms, (first, ""))


def rules(model: nn.Module) -> list[ClipRule]:
    names = [name for name, _ in model.named_parameters()]
    return [Automatic(0.5, 0.2), PerLayer.evenly(0.5, names), every_other(names, 0.3, 0.1)]


def example(model: nn.Module, loss_fn, batch, b: int) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    loss = loss_fn(model, tree_map(lambda t: t[b : b + 1], batch)).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found)}


def clipped(rule: ClipRule, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the text of the rule."""
    match rule:
        case Automatic():
            norm = torch.cat([g.flatten() for g in gradient.values()]).norm()
            return {n: g * rule.clip_norm / (norm + rule.stability) for n, g in gradient.items()}
        case PerLayer():
            layers = list(dict.fromkeys(name.rpartition(".")[0] for name in gradient))
            part = {name: layers.index(name.rpartition(".")[0]) for name in gradient}
        case GroupWise():
            part = {n: next(k for k, p in enumerate(rule.patterns) if re.search(p, n)) for n in gradient}
    out = {}
    for k, clip_norm in enumerate(rule.clip_norms):
        mine = [name for name in gradient if part[name] == k]
        norm = torch.cat([gradient[n].flatten() for n in mine]).norm()
        out |= {n: gradient[n] * min(1.0, clip_norm / max(float(norm), 1e-300)) for n in mine}
    return out


#: with values made of several parameters, one parameter in several places, standardised weights, routing
HARD = {"low-rank", "tied-lm", "standardised", "experts"}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("case", "number"),
    [
        pytest.param(c, n, id=f"{c.name}-{n}", marks=() if n == 2 and c.name in HARD else pytest.mark.slow)
        for c in cases.CASES
        for n in range(3)
    ],
)
def test_every_method_follows_every_rule(case, number):
    """With a row that holds NaN and is masked, and one that holds NaN and is not."""
    model, batch = cases.build(case)
    examples = [example(model, case.loss, batch, b) for b in range(2, case.size)]
    hostile = poisoned(poisoned(batch, 0, math.nan), 1, math.nan)
    mask = torch.tensor([b == 0 or b > 1 for b in range(case.size)])
    if not any(t.is_floating_point() for t in tree_leaves(batch)):
        examples.append(example(model, case.loss, batch, 0))
    rule = rules(model)[number]
    want = {n: sum(clipped(rule, g)[n] for g in examples) for n, _ in model.named_parameters()}
    for method in PRIVATE:
        if method == "per-example-vmap" and not case.transforms:
            continue
        out = dpt.clipped_grad(model, case.loss, clip_norm=rule, method=method)(hostile, mask)
        assert oracle.relative_error(out.grads, want) < TOLERANCE, method
        assert out.clip_norm == rule.sensitivity


@pytest.mark.parametrize("method", ["auto", "bk-ghost", "ghost", "per-example-vmap", "per-example-loop"])
def test_a_neighbour_moves_the_sum_by_no_more_than_the_sensitivity(method):
    """Also with an example whose gradient is as long as can be, in any of its parts, and in float32."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    batch = {"x": torch.randn(6, 5), "y": torch.randint(3, (6,))}
    batch["x"][0] *= 1e4
    for rule in rules(model):
        step = dpt.clipped_grad(model, loud, clip_norm=rule, method=method)
        with_all = step(batch)
        for b in range(6):
            without = step(batch, torch.arange(6) != b)
            moved = [with_all.grads[n] - without.grads[n] for n in with_all.grads]
            distance = float(torch.cat([m.double().flatten() for m in moved]).norm())
            assert distance <= rule.sensitivity * (1 + 1e-5), (rule.name, b)


def loud(model: nn.Module, batch) -> Tensor:
    return 1e3 * cases.classify(model, batch)


def test_a_single_example_never_exceeds_the_sensitivity_in_float32():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 10))
    for rule in (*rules(model), Flat(0.5)):
        one = dpt.clipped_grad(model, loud, clip_norm=rule)
        for _ in range(20):
            out = one({"x": torch.randn(1, 40), "y": torch.randint(10, (1,))})
            norm = float(torch.cat([g.double().flatten() for g in out.grads.values()]).norm())
            assert norm <= rule.sensitivity


def test_a_sum_is_released_by_a_mechanism_of_the_same_sensitivity_only():
    torch.manual_seed(3)
    model = nn.Linear(3, 2)
    batch = {"x": torch.randn(4, 3), "y": torch.randint(2, (4,))}
    rule = GroupWise((3.0, 4.0), ("weight", ""))
    out = dpt.clipped_grad(model, cases.classify, clip_norm=rule)(batch)
    spec = StepSpec(rule, 1.0, Sampling("poisson", 0.5), 4)
    assert spec.noise_stddev == 5.0
    dpt.privatize(out, spec, Key.from_seed(0))
    with pytest.raises(ValueError, match="accounts for 3"):
        dpt.privatize(out, StepSpec(Flat(3.0), 1.0, Sampling("poisson", 0.5), 4), Key.from_seed(0))


def test_what_a_rule_cannot_follow_is_refused_at_once():
    model = nn.Linear(3, 2)
    for rule, message in (
        (PerLayer((1.0, 1.0)), "2 thresholds"),
        (GroupWise((1.0,), ("weight",)), "bias belongs to no group"),
    ):
        with pytest.raises(ValueError, match=message):
            dpt.clipped_grad(model, cases.classify, clip_norm=rule)
    with pytest.raises(ValueError, match="on a grid"):
        dpt.clipped_grad(model, cases.classify, clip_norm=Automatic(1.0), grid=2.0**-12)


def test_groups_compile(as_traced):  # noqa: F811
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    batch = {"x": torch.randn(6, 5, dtype=torch.float64), "y": torch.randint(3, (6,))}
    for rule in rules(model):
        eager = dpt.clipped_grad(model, cases.classify, clip_norm=rule)(batch)
        out = seen(dpt.clipped_grad(model, cases.classify, clip_norm=rule, compile=True), batch)
        assert oracle.relative_error(out.grads, eager.grads) < TOLERANCE
