"""compile=True: one graph, exact, never stale, and the eager engine wherever a graph will not do.

What a graph computes is tested on all small models by running it as it was traced, which takes no
compiler; Inductor compiles a few.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.torch import clipping
from dptrain.torch import compile as compiling

from . import cases, oracle

C = 0.5
TRACEABLE = [case for case in cases.CASES if case.name not in ("experts", "recurrent")]


@pytest.fixture
def as_traced(monkeypatch):
    """Graphs are run node by node, not compiled."""
    monkeypatch.setattr(compiling, "by_inductor", lambda graph, inputs: graph)


def seen(clipped, batch, mask=None):
    """A compiled step, after the one in which it is rehearsed; no warning is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipped(batch, mask)
        out = clipped(batch, mask)
    assert clipped.compiler.graphs == 1
    return out


def masked(size: int, *rows: int) -> torch.Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[list(rows)] = False
    return mask


@pytest.mark.parametrize("case", TRACEABLE, ids=lambda case: case.name)
def test_a_traced_step_is_exact(case, as_traced):
    model, batch = cases.build(case)
    out = seen(dpt.clipped_grad(model, case.loss, clip_norm=C, compile=True), batch, masked(case.size, 1))
    want, norms = oracle.clipped_sum(model, case.loss, batch, C, keep=masked(case.size, 1))
    assert oracle.relative_error(out.grads, want) < 1e-9
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=0)
    assert all(out.grads[name].shape == p.shape for name, p in model.named_parameters())


@pytest.mark.parametrize("method", ["ghost", "bk-ghost", "bk-mix-opt", "per-example", "mixed-ghost"])
def test_every_captured_method_is_traced(method, as_traced):
    case = next(case for case in cases.CASES if case.name == "vit")
    model, batch = cases.build(case)
    out = seen(dpt.clipped_grad(model, case.loss, clip_norm=C, method=method, compile=True), batch)
    want, _ = oracle.clipped_sum(model, case.loss, batch, C)
    assert oracle.relative_error(out.grads, want) < 1e-9


def test_the_method_without_privacy_is_traced_too(as_traced):
    model, batch = cases.build(cases.CASES[0])
    mask = masked(4, 0)
    options = {"clip_norm": C, "method": "non-private"}
    out = seen(dpt.clipped_grad(model, cases.classify, **options, compile=True), batch, mask)
    want = dpt.clipped_grad(model, cases.classify, **options)(batch, mask)
    assert oracle.relative_error(out.grads, want.grads) < 1e-12
    assert out.clip_norm == float("inf")


@pytest.mark.parametrize("name", ["mlp", pytest.param("tied-lm", marks=pytest.mark.slow),
                                  pytest.param("vit", marks=pytest.mark.slow),
                                  pytest.param("convolutions", marks=pytest.mark.slow),
                                  pytest.param("low-rank", marks=pytest.mark.slow)])  # fmt: skip
def test_inductor_keeps_it_exact_and_compiles_once_in_50_poisson_steps(name):
    case = next(case for case in cases.CASES if case.name == name)
    model, batch = cases.build(case)
    clipped = dpt.clipped_grad(model, case.loss, clip_norm=C, compile=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    eager = dpt.clipped_grad(model, case.loss, clip_norm=C)
    torch._dynamo.utils.counters.clear()
    for step in range(50):
        batch, mask = case.batch(case.size), torch.rand(case.size) < 0.6
        out = clipped(batch, mask)
        if step % 10 == 9:
            want, _ = oracle.clipped_sum(model, case.loss, batch, C, keep=mask)
            assert oracle.relative_error(out.grads, want) < 1e-9
            assert oracle.relative_error(out.grads, eager(batch, mask).grads) < 1e-9
        for parameter_name, p in model.named_parameters():
            p.grad = out.grads[parameter_name] / case.size
        optimizer.step()
        optimizer.zero_grad()
    assert clipped.compiler.graphs == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_inductor_sees_what_is_not_finite():
    """Compiled with relaxed arithmetic, isfinite is the first thing to go."""
    model, batch = cases.build(cases.CASES[0])
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    seen(clipped, batch)
    for value in (torch.inf, -torch.inf, torch.nan, 1e300):
        wrong = {**batch, "x": batch["x"].clone()}
        wrong["x"][2] = value
        out = clipped(wrong)
        want, _ = oracle.clipped_sum(model, cases.classify, batch, C, keep=masked(4, 2))
        if value != 1e300:  # saturates tanh, which is finite and exact
            assert oracle.relative_error(out.grads, want) < 1e-12
        hidden = clipped(wrong, masked(4, 2))
        assert oracle.relative_error(hidden.grads, want) < 1e-12
        assert hidden.norms[2] == 0 and hidden.losses[2] == 0
    assert clipped.compiler.graphs == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_left_to_the_eager_engine(value, as_traced, monkeypatch):
    model, batch = cases.build(cases.CASES[3])
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    seen(clipped, batch)
    eager = []
    real = clipping.clip_batch
    monkeypatch.setattr(clipping, "clip_batch", lambda *a: (eager.append(1), real(*a))[1])
    broken = {**batch, "x": batch["x"].clone()}
    broken["x"][0] = value
    want, _ = oracle.clipped_sum(model, cases.classify, batch, C, keep=masked(4, 0))
    assert oracle.relative_error(clipped(broken).grads, want) < 1e-9
    assert eager == [1]
    assert oracle.relative_error(clipped(broken, masked(4, 0)).grads, want) < 1e-9
    assert eager == [1]  # masked, it is replaced before it can do harm
    assert clipped.compiler.graphs == 1


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.factor, self.options = 1.0, {"power": 1}

    def forward(self, x):
        return self.layer(x.flatten(1) * self.factor) ** self.options["power"]


def test_python_state_is_never_stale(as_traced):
    torch.manual_seed(0)
    model, batch = Scaled().double(), cases.images(1, 4)(4)
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    seen(clipped, batch)
    for graphs, change in ((2, "factor"), (3, "options")):
        if change == "factor":
            model.factor = 3.0
        else:
            model.options["power"] = 2
        for _ in range(2):
            want, _ = oracle.clipped_sum(model, cases.classify, batch, C)
            assert oracle.relative_error(clipped(batch).grads, want) < 1e-9
        assert clipped.compiler.graphs == graphs


def test_state_that_changes_in_every_step_ends_compilation(as_traced):
    torch.manual_seed(0)
    model, batch = Scaled().double(), cases.images(1, 4)(4)
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    with pytest.warns(UserWarning, match="runs uncompiled: what it reads of Python's state changes") as seen:
        for step in range(6):
            model.factor = 1.0 + step
            want, _ = oracle.clipped_sum(model, cases.classify, batch, C)
            assert oracle.relative_error(clipped(batch).grads, want) < 1e-9
    assert len(seen) == 1


def test_parameters_are_read_anew_in_each_step(as_traced):
    model, batch = cases.build(cases.CASES[0])
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    seen(clipped, batch)
    with torch.no_grad():
        for p in model.parameters():
            p.data = torch.randn_like(p)
    want, _ = oracle.clipped_sum(model, cases.classify, batch, C)
    assert oracle.relative_error(clipped(batch).grads, want) < 1e-9


def test_an_exchanged_parameter_is_not_taken_for_the_old_one(as_traced):
    model, batch = cases.build(cases.CASES[0])
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    seen(clipped, batch)
    model[1].weight = nn.Parameter(torch.randn_like(model[1].weight))
    want, _ = oracle.clipped_sum(model, cases.classify, batch, C)
    assert oracle.relative_error(clipped(batch).grads, want) < 1e-9


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        x = x.flatten(1)
        if bool(x.isnan().any()):
            return self.layer(x.nan_to_num())
        return self.layer(x)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls.add_(1)
        return self.layer(x.flatten(1))


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.last = nn.Linear(16, 4), None

    def forward(self, x):
        x = self.layer(x.flatten(1))
        self.last = x.detach()
        return x


@pytest.mark.parametrize(
    ("build", "reason"),
    [(Branches, "cannot trace it"), (Counts, "leaves something behind"), (Keeps, "leaves something behind")],
)
def test_what_cannot_be_traced_runs_uncompiled_after_one_sentence(build, reason, as_traced):
    torch.manual_seed(0)
    model, batch = build().double(), cases.images(1, 4)(4)
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    with pytest.warns(UserWarning, match=f"runs uncompiled: .*{reason}.*[.]$") as seen:
        for _ in range(3):
            out = clipped(batch)
    assert len(seen) == 1
    want, _ = oracle.clipped_sum(model, cases.classify, batch, C)
    assert oracle.relative_error(out.grads, want) < 1e-9


def test_what_the_eager_engine_refuses_is_refused(as_traced):
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            x = self.layer(x.flatten(1))
            return x - x.mean(0)

    clipped = dpt.clipped_grad(Mixes().double(), cases.classify, clip_norm=C, compile=True)
    with pytest.raises(dpt.Refused):
        clipped(cases.images(1, 4)(4))


def test_a_graph_that_disagrees_with_the_eager_engine_is_not_used(monkeypatch):
    def wrong(graph, inputs):
        return lambda *tensors: [t * 1.01 if t.is_floating_point() else t for t in graph(*tensors)]

    monkeypatch.setattr(compiling, "by_inductor", wrong)
    model, batch = cases.build(cases.CASES[0])
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    with pytest.warns(UserWarning, match="by the compiled step differ"):
        first = clipped(batch)
    want, _ = oracle.clipped_sum(model, cases.classify, batch, C)
    for out in (first, clipped(batch)):
        assert oracle.relative_error(out.grads, want) < 1e-9


@pytest.mark.parametrize("right", [True, False])
def test_models_that_amplify_rounding_are_rehearsed_to_what_rounding_does(monkeypatch, right):
    """Where rounding an example once more moves gradients by 1 %, so may a graph, but not by 20 %."""

    def rounded(graph, inputs):
        once = 1 + torch.finfo(torch.float32).eps
        return lambda *tensors: graph(*[t * once if t.is_floating_point() else t for t in tensors])

    def wrong(graph, inputs):
        return lambda *tensors: [t * 1.2 if t.is_floating_point() else t for t in graph(*tensors)]

    monkeypatch.setattr(compiling, "by_inductor", rounded if right else wrong)
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x = 1 + 1e-5 * torch.randn(4, 6)
    loss = lambda model, x: model((x - 1) * 1e5).square().sum(1)  # noqa: E731
    clipped = dpt.clipped_grad(model, loss, clip_norm=100.0, compile=True)
    state = torch.get_rng_state()
    if right:
        found = seen(clipped, x)
        truth = dpt.clipped_grad(model, loss, clip_norm=100.0)(x)
        assert compiling.difference(found, truth, 4)  # more than a model that does not amplify may
    else:
        with pytest.warns(UserWarning, match="by the compiled step differ"):
            clipped(x)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("last", [True, False])
def test_images_lie_as_the_model_lays_them(monkeypatch, last):
    asked = []
    monkeypatch.setattr(
        torch._inductor, "compile", lambda graph, inputs, options: asked.append(options) or graph
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    if last:
        model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    loss = lambda model, x: model(x).square().sum(1)  # noqa: E731
    seen(dpt.clipped_grad(model, loss, clip_norm=C, compile=True), x)
    assert [options.get("layout_optimization", True) for options in asked] == [last]


def test_rehearsing_leaves_random_numbers_where_an_eager_step_does(monkeypatch):
    monkeypatch.setattr(
        compiling, "by_inductor", lambda graph, inputs: lambda *t: graph(t[0], *(1.01 * s for s in t[1:]))
    )
    model, x = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.3)), torch.randn(4, 6)
    loss = lambda model, x: model(x).square().sum(1)  # noqa: E731
    states = []
    for options in ({}, {"compile": True}):
        clipped = dpt.clipped_grad(model, loss, clip_norm=C, **options)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            clipped(x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_no_more_is_put_down_to_rounding_than_a_little():
    """However much rounding moves a sum: a wrong graph may meet a chaotic model."""

    def summed(value: float) -> dpt.ClippedSum:
        return dpt.ClippedSum({"w": torch.full((2,), value)}, torch.ones(1), torch.ones(1), 1.0)

    chaos = summed(1.0), summed(3.0)
    assert not compiling.difference(summed(1.04), summed(1.0), 1, chaos)
    assert compiling.difference(summed(1.2), summed(1.0), 1, chaos) == "the sums of w"
    assert compiling.difference(summed(1.04), summed(1.0), 1) == "the sums of w"


def test_norms_that_nobody_can_tell_apart_are_not_taken_for_close():
    """A comparison with NaN is false: what rounding does must not be unknown."""
    one, none = (
        dpt.ClippedSum({"w": torch.ones(2)}, torch.tensor([n]), torch.ones(1), 1.0) for n in (1.0, torch.nan)
    )
    two = dpt.ClippedSum({"w": torch.ones(2)}, torch.tensor([2.0]), torch.ones(1), 1.0)
    assert compiling.difference(two, one, 1, (one, none)) == "the norms"
    assert compiling.difference(none, one, 1) == "the norms"
    assert not compiling.difference(none, none, 1)


def test_a_doubtful_gram_norm_is_left_to_the_eager_engine(as_traced):
    """Rows that cancel: the Gram norm's error bound exceeds 1 %, and the gradient is materialised."""
    torch.manual_seed(0)

    def loss(model, batch):
        y = model(batch["x"])
        return (y * batch["sign"]).sum((1, 2))

    x = torch.randn(4, 1, 6).expand(-1, 8, -1) * 1e3
    sign = torch.tensor([1.0, -1.0]).repeat(4).reshape(1, 8, 1).expand(4, -1, -1) + 1e-6 * torch.randn(
        4, 8, 1
    )
    batch = {"x": x.contiguous(), "sign": sign.contiguous()}
    model = nn.Linear(6, 3, bias=False)
    clipped = dpt.clipped_grad(model, loss, clip_norm=C, method="bk-ghost", compile=True)
    ordinary = {"x": torch.randn(4, 8, 6), "sign": torch.ones(4, 8, 1)}
    seen(clipped, ordinary)
    out = clipped(batch)
    eager = dpt.clipped_grad(model, loss, clip_norm=C, method="bk-ghost")
    eager(ordinary)
    want = eager(batch)
    assert torch.equal(out.norms, want.norms) and torch.equal(out.grads["weight"], want.grads["weight"])


class Rarely(nn.Module):
    """A branch of zeros, but for one value that no stand-in has."""

    def __init__(self):
        super().__init__()
        self.often, self.rarely = nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.often(x) + self.rarely(x) * (x[:, :1] == 12345.0)


def test_a_gradient_that_the_probe_never_saw_is_not_dropped(as_traced):
    torch.manual_seed(0)
    model, batch = Rarely().double(), cases.images(1, 4)(4)
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=1e3, compile=True)
    seen(clipped, batch)
    batch["x"][1, 0, 0, 0] = 12345.0
    with pytest.raises(dpt.Refused, match="came where the probe saw none"):
        clipped(batch)


def test_autocast_is_traced_as_it_is_and_norms_stay_in_float32(as_traced):
    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)), {}
    batch = {"x": torch.randn(4, 16), "y": torch.randint(4, (4,))}
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = seen(clipped, batch)
        want = dpt.clipped_grad(model, cases.classify, clip_norm=C)(batch)
    assert {g.dtype for g in out.grads.values()} == {torch.float32} and out.norms.dtype == torch.float32
    assert oracle.relative_error(out.grads, want.grads) < 1e-5


def test_random_numbers_are_those_of_the_eager_engine():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 4)).double()
    batch = {"x": torch.randn(4, 16, dtype=torch.float64), "y": torch.randint(4, (4,))}
    clipped = dpt.clipped_grad(model, cases.classify, clip_norm=C, compile=True)
    seen(clipped, batch)
    torch.manual_seed(7)
    out = clipped(batch)
    torch.manual_seed(7)
    want = dpt.clipped_grad(model, cases.classify, clip_norm=C)
    want.plan(batch)
    torch.manual_seed(7)
    assert oracle.relative_error(out.grads, want(batch).grads) < 1e-12


def test_methods_that_capture_nothing_say_so():
    with pytest.warns(UserWarning, match="per-example-loop"):
        dpt.clipped_grad(nn.Linear(2, 2), F.mse_loss, clip_norm=C, method="per-example-loop", compile=True)
