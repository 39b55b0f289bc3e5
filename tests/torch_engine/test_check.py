"""``check``: exact models are called so, others refused or wrong, and the forecast of memory holds."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.torch import exactness, live_bytes, memory
from dptrain.torch.clipping import clipped_grad
from dptrain.torch.guards import trainable

WIDTH, CLASSES = 6, 3


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def rows(size: int = 3, *shape: int):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, *(shape or (WIDTH,)), generator=generator)
    return {"x": x, "y": torch.randint(CLASSES, (size,), generator=generator)}


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *middle, nn.Linear(WIDTH, CLASSES))


def test_an_exact_model():
    model = net(nn.Tanh())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = dpt.check(model, loss_fn, rows())
    assert (report.verdict, report.exact, report.reason) == ("EXACT", True, None)
    assert report.uses == {"0.weight": 1, "0.bias": 1, "2.weight": 1, "2.bias": 1}
    assert report.unused == () and report.probed_size == 3
    assert report.exactness.worst < 1e-12 and report.exactness.one_by_one
    assert ("x", (3, WIDTH), "float32") in report.batch
    assert sum(row["cost"] for row in report.plan) == pytest.approx(1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None and p.dtype == torch.float32
    assert json.loads(json.dumps(report.to_dict()))["exactness"]["exact"] is True


@pytest.mark.parametrize("method", ["auto", "per-example", "ghost", "bk-mix-opt", "fast-gradient"])
def test_every_planned_method(method):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, CLASSES))
    report = dpt.check(model, loss_fn, rows(3, 2, 6, 6), method=method)
    assert report.exact, report.reason
    assert report.memory.largest > 0


@pytest.mark.parametrize("method", ["per-example-loop", "non-private"])
def test_a_method_without_a_plan_is_bad_input(method):
    with pytest.raises(ValueError, match="makes no plan"):
        dpt.check(net(), loss_fn, rows(), method=method)


def test_batch_norm_is_refused_with_advice():
    report = dpt.check(net(nn.BatchNorm1d(WIDTH)), loss_fn, rows())
    assert report.verdict == "REFUSED" and "BatchNorm" in report.reason
    assert "dptrain.torch.convert" in report.advice
    assert report.probed_size is None and report.exactness is None


def test_mixing_is_refused():
    class Mean(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True).detach()

    report = dpt.check(net(Mean()), loss_fn, rows())
    assert report.verdict == "REFUSED" and "mix" in report.reason and report.advice is None


def test_unused_parameters_are_named():
    model = net()
    model.spare = nn.Parameter(torch.ones(2))
    report = dpt.check(Skip(model), loss_fn, rows())
    assert report.verdict == "REFUSED" and report.unused == ("inner.spare",)
    assert "inner.spare" in report.reason
    assert dpt.check(Skip(model), loss_fn, rows(), allow_unused=True).exact
    model.spare.requires_grad_(False)
    report = dpt.check(Skip(model), loss_fn, rows())
    assert report.exact and report.frozen == 1


class Skip(nn.Module):
    """Takes no notice of parameters that hang on a Sequential."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def test_a_wrong_plan_is_called_wrong(monkeypatch):
    """Whatever the rehearsal lets pass (its bound is for float32) shows in float64."""
    by_plan = exactness._Comparison._by_plan

    def nearly(self, bound):
        found = by_plan(self, bound)
        found.grads["0.bias"][0] += 1e-6
        return found

    monkeypatch.setattr(exactness._Comparison, "_by_plan", nearly)
    report = dpt.check(net(), loss_fn, rows())
    assert report.verdict == "WRONG" and not report.exact
    assert report.exactness.gradient_errors[0][0] == "0.bias"
    assert "report this model" in report.reason


def test_dropout_is_stilled_and_named():
    model = net(nn.Dropout(0.5), nn.Dropout(0.0))
    report = dpt.check(model, loss_fn, rows())
    assert report.exact and report.exactness.stilled == ("1",)
    assert all(module.training for module in model.modules())


def test_a_model_that_always_draws_is_compared_under_the_same_draws():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    report = dpt.check(net(Noisy()), loss_fn, rows())
    assert report.exact and not report.exactness.one_by_one


def test_casts_to_float32_do_not_hide_errors():
    class Norm(nn.Module):
        def forward(self, x):
            wide = x.float()
            wide = wide * torch.rsqrt(wide.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)
            return (wide * torch.ones(WIDTH, dtype=torch.float32)).to(x.dtype)

    report = dpt.check(net(Norm()), loss_fn, rows())
    assert report.exact and report.exactness.worst < 1e-12


def test_zero_initialised_heads_are_moved():
    model = net(nn.Tanh())
    nn.init.zeros_(model[2].weight)
    report = dpt.check(model, loss_fn, rows())
    assert report.exact and report.exactness.worst > 0  # something was compared


def test_spectral_norm_keeps_its_state():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, CLASSES)))
    before = {n: b.clone() for n, b in model.named_buffers()}
    report = dpt.check(model, loss_fn, rows())
    assert report.exact, report.reason
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_half_precision_parameters():
    model = net(nn.Tanh()).bfloat16()
    batch = {**rows(), "x": rows()["x"].bfloat16()}
    report = dpt.check(model, loss_fn, batch)
    assert report.exact and next(model.parameters()).dtype == torch.bfloat16


# ---------------------------------------------------------------------- memory


class Standardised(nn.Conv2d):
    """By batch_norm, as BiT does it: its pull-back loops over the examples."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.view(1, len(self.weight), -1), None, None, training=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


def convnet() -> nn.Module:
    torch.manual_seed(0)
    layers = [Standardised(2, 8, 3), nn.GELU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3), nn.GELU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, CLASSES))


@pytest.mark.parametrize("method", ["auto", "per-example", "ghost"])
def test_the_forecast_holds_at_another_size(method):
    """From 2 and 3 examples to 24: what is counted there is what was predicted, within 1 %."""
    model, batch = convnet(), rows(3, 2, 12, 12)
    task = clipped_grad(model, loss_fn, clip_norm=1.0, method=method)
    plan = task.plan(batch)
    found = memory.forecast(task, plan, batch, 10**9)
    assert [size for size, _ in found.measured] == [2, 3]
    step = memory._step(task, plan, trainable(model))
    moments = memory._moments(step, memory._rows(batch, 24), model)
    assert found.peak_bytes(24) == pytest.approx(found.resident_bytes + max(b for _, b in moments), rel=0.01)


def test_the_largest_batch_is_the_last_that_fits():
    lines = (memory.Line(100.0, 1.0), memory.Line(0.0, 2.0))
    room = 1000
    budget = round((room + memory.RUNTIME_BYTES) / (1 - memory.LOST_SHARE))
    found = memory.Forecast(budget, 0, (), lines)
    assert found.largest in (499, 500)
    assert memory.Forecast(1000, 0, (), lines).largest == 0


def test_lines_that_are_never_highest_are_dropped():
    line = memory.Line
    kept = memory._highest([line(100, 1), line(50, 1), line(0, 2), line(0, 1.5), line(90, 0.5)])
    assert kept == (line(100, 1), line(0, 2))


def test_bytes_alive_fall_when_a_tensor_is_freed():
    with live_bytes.LiveBytes() as live:
        x = torch.zeros(256)
        y = x.view(16, 16)  # shares its bytes
        del x, y
        z = torch.zeros(1024)
        del z
    assert [alive for _, alive in live.moments] == [1024, 4096]
