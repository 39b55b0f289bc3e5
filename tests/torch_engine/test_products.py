"""Matrix products by oneDNN where MKL is slow: the same numbers, whatever lies how in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import dptrain.torch as dpt
from dptrain.torch import compile as compiling
from dptrain.torch import products

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this PyTorch is built without oneDNN",
)


@pytest.fixture
def calls(monkeypatch):
    """oneDNN for every product, as if it were faster here; the type of what it was asked to multiply."""
    made = []
    original = products.by_onednn
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    for name in ("WORTHWHILE", "PAYS"):
        monkeypatch.setattr(products, name, 0)
    monkeypatch.setattr(products, "by_onednn", lambda *each: made.append(type(each[0])) or original(*each))
    return made


def laid(shape, how):
    """Random numbers of a shape: contiguous, a transposed view, or every other row of more."""
    if how == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2] if how == "strided" else torch.randn(shape)


LAYOUTS = ["contiguous", "transposed", "strided"]


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
def test_products_are_those_of_float64(calls, left, right):
    torch.manual_seed(0)
    x, w, bias = laid((5, 7, 12), left), laid((9, 12), right), torch.randn(9)
    g, a, b = laid((5, 7, 9), left), laid((5, 7, 12), left), laid((5, 7, 9), right)
    long, narrow = laid((5, 70, 12), left), laid((5, 70, 3), right)  # of which the narrower one is transposed
    out, total = torch.full((5, 12, 9), torch.nan), torch.ones(12, 9)
    found = [
        (products.linear(x, w, bias), x.double() @ w.double().T + bias),
        (products.linear(x, w), x.double() @ w.double().T),
        (products.product(g, w), g.double() @ w.double()),
        (products.each(a, b, out), a.double().mT @ b.double()),
        (products.each(a, b), a.double().mT @ b.double()),
        (products.each(long, narrow), long.double().mT @ narrow.double()),
        (products.add_product(None, a[0], b[0]), a[0].double().T @ b[0].double()),
        (products.add_product(total, a[0], b[0]), 1 + a[0].double().T @ b[0].double()),
    ]
    assert len(calls) == 3 + 5 + 5 + 5 + 2
    for got, want in found:
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), found[3][1], rtol=1e-5, atol=1e-5)  # in place
    assert found[-1][0] is total


@pytest.mark.parametrize("case", ["float64", "bfloat16", "mixed", "switched off", "one axis", "a subclass"])
def test_all_else_is_left_to_pytorch(calls, case):
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    x, w = torch.randn(4, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    if case == "mixed":
        with pytest.raises(RuntimeError):
            products.linear(x, w.double())
    elif case == "switched off":
        torch._C._set_mkldnn_enabled(False)  # what ``torch.backends.mkldnn.flags`` does, and warns of TF32
        try:
            products.linear(x, w)
        finally:
            torch._C._set_mkldnn_enabled(True)
    elif case == "one axis":
        products.linear(x[0], w)
    elif case == "a subclass":

        class Own(torch.Tensor):
            pass

        assert type(products.linear(x.as_subclass(Own), w)) is Own
    else:
        torch.testing.assert_close(products.linear(x, w), x @ w.T)
    assert not calls


@pytest.mark.parametrize("method", ["auto", "bk-ghost", "per-example", "ghost"])
def test_a_step_is_the_same_by_either_library(calls, method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 2, 2), nn.Flatten(2), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)
    )
    images = torch.randn(6, 3, 8, 8)
    loss_fn = lambda model, x: model(x).square().mean((1, 2))  # noqa: E731
    fast = dpt.clipped_grad(model, loss_fn, clip_norm=0.01, method=method)(images)
    assert len(calls) > 4
    exact = dpt.clipped_grad(model.double(), loss_fn, clip_norm=0.01, method="per-example-loop")(
        images.double()
    )
    torch.testing.assert_close(fast.norms.double(), exact.norms, rtol=1e-4, atol=0)
    for name, sum_ in fast.grads.items():
        torch.testing.assert_close(sum_.double(), exact.grads[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["auto", "bk-ghost"])
def test_compiled_steps_multiply_likewise(calls, method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)), torch.randn(6, 3, 16)
    loss_fn = lambda model, x: model(x).square().mean((1, 2))  # noqa: E731
    compiled = dpt.clipped_grad(model, loss_fn, clip_norm=0.01, method=method, compile=True)
    compiled(x)  # the first batch is clipped in both ways
    assert FakeTensor in calls and torch.Tensor in calls  # into the graph, and by the eager engine
    calls.clear()
    found = compiled(x)
    assert not calls  # by the graph, whose products are called by name
    exact = dpt.clipped_grad(model.double(), loss_fn, clip_norm=0.01, method="per-example-loop")(x.double())
    torch.testing.assert_close(found.norms.double(), exact.norms, rtol=1e-4, atol=0)
    for name, sum_ in found.grads.items():
        torch.testing.assert_close(sum_.double(), exact.grads[name], rtol=1e-3, atol=1e-6)


def test_norms_are_in_float32_by_onednn_too(calls, monkeypatch):
    """Rule 7: bfloat16 that a user allows oneDNN is for the model alone."""
    torch.manual_seed(0)
    model, x = nn.Linear(256, 128), torch.randn(4, 16, 256)
    loss_fn = lambda model, x: model(x).square().mean((1, 2))  # noqa: E731
    want = dpt.clipped_grad(model, loss_fn, clip_norm=1.0, method="per-example")(x)
    setting = torch.backends.mkldnn.matmul
    before, seen, plainly = setting.fp32_precision, [], products.each
    monkeypatch.setattr(products, "each", lambda *a: seen.append(setting.fp32_precision) or plainly(*a))
    try:
        setting.fp32_precision = "bf16"
        dpt.clipped_grad(model, loss_fn, clip_norm=1.0, method="per-example")(x)
    finally:
        setting.fp32_precision = before
    assert set(seen) == {"ieee"} and want.norms.isfinite().all()


def test_ordinary_training_with_the_same_products(calls):
    from dptrain.bench.torch_products import SameProducts

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4, bias=False)), torch.randn(3, 2, 6)
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with SameProducts():
        loss = model(x).square().sum()
    assert calls
    for found, expected in zip(torch.autograd.grad(loss, list(model.parameters())), want):
        torch.testing.assert_close(found, expected)
    bias, weight = torch.randn(4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    want = torch.autograd.grad(torch.addmm(bias, x[0], weight).square().sum(), [bias, weight])
    with SameProducts():
        loss = torch.addmm(bias, x[0], weight).square().sum()
    for found, expected in zip(torch.autograd.grad(loss, [bias, weight]), want):
        torch.testing.assert_close(found, expected)


def test_graphs_hold_one_call_for_the_gradients_of_all_examples(calls, monkeypatch):
    torch.manual_seed(0)
    graphs = []
    monkeypatch.setattr(compiling, "by_inductor", lambda graph, inputs: graphs.append(graph) or graph)
    wide, narrow, patches = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 2, 2, groups=2)
    model = nn.Sequential(wide, nn.ReLU(), narrow, patches, nn.Flatten(2), nn.Linear(16, 5), nn.Linear(5, 7))
    images = torch.randn(6, 3, 8, 8)
    loss_fn = lambda model, x: model(x).square().mean((1, 2))  # noqa: E731
    compiled = dpt.clipped_grad(model, loss_fn, clip_norm=0.01, method="per-example", compile=True)
    compiled(images)
    fast = compiled(images)
    (graph,) = graphs
    assert sum(node.target is torch.ops.dptrain.onednn_each.default for node in graph.graph.nodes) == 5
    exact = dpt.clipped_grad(model.double(), loss_fn, clip_norm=0.01, method="per-example-loop")(
        images.double()
    )
    torch.testing.assert_close(fast.norms.double(), exact.norms, rtol=1e-4, atol=0)
    for name, sum_ in fast.grads.items():
        torch.testing.assert_close(sum_.double(), exact.grads[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_operator_for_all_examples(swapped):
    rows, cols = laid((5, 7, 12), "contiguous"), laid((5, 7, 9), "transposed")
    found = torch.ops.dptrain.onednn_each(rows, cols, swapped)
    torch.testing.assert_close(found.double(), rows.double().mT @ cols.double(), rtol=1e-5, atol=1e-5)
