"""Routes of ``auto``, sums in place, reused memory, and norms without gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.core.remembered import Remembered
from dptrain.torch import planner, standardised, stopwatch
from dptrain.torch.batch import clip_batch
from dptrain.torch.fastest import Offer, choose
from dptrain.torch.layout import Layout
from dptrain.torch.routes import Route
from dptrain.torch.stopwatch import Stopwatch
from dptrain.torch.uses import convolution, gram
from dptrain.torch.uses.convolution import Convolution

from . import cases, oracle


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        w = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True, eps=1e-6)
        return self._conv_forward(x, w.reshape_as(self.weight), self.bias)


def network(standard=True):
    torch.manual_seed(0)
    conv = StandardisedConv if standard else nn.Conv2d
    return nn.Sequential(
        conv(3, 8, 3, padding=1),
        nn.ReLU(),
        conv(8, 8, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        conv(8, 6, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    ).double()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def batch(size=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(5, (size,), generator=generator)}


ROUTES = ["materialise+reuse", "materialise+contract", "gram+contract"]


@pytest.mark.parametrize("standard", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_is_exact(route, standard):
    model, data = network(standard), batch()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.3, routes={"*.weight": route})
    expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.3)
    out = clipped(data)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    assert torch.allclose(out.norms, norms, rtol=1e-9)


def test_standardised_weights_are_recognised_and_need_no_pull_back():
    clipped = dpt.clipped_grad(network(), loss_fn, clip_norm=1.0)
    kinds = {row["parameter"]: row["pull-back"] for row in clipped.plan(batch()).rows()}
    assert kinds["0.weight"] == kinds["2.weight"] == kinds["5.weight"] == "standardised"


def test_a_sum_is_added_to_in_place():
    model = network()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.3)
    first, second = clipped(batch(4)), clipped(batch(5))
    want = {name: first.grads[name] + second.grads[name] for name in first.grads}
    buffers = {name: g.data_ptr() for name, g in first.grads.items()}
    mask = torch.tensor([True] * 5)
    both = clipped(batch(5), mask, into=first)
    assert {name: g.data_ptr() for name, g in both.grads.items()} == buffers
    assert all(torch.allclose(both.grads[name], want[name], rtol=1e-12) for name in want)
    assert len(both.norms) == 9
    nothing = clipped(batch(5), ~mask, into=both)
    assert all(torch.equal(nothing.grads[name], both.grads[name]) for name in want)


def test_earlier_sums_survive_later_steps():
    """Memory for per-example gradients is used again: no sum may be a view of it."""
    clipped = dpt.clipped_grad(network(), loss_fn, clip_norm=0.3, method="per-example")
    first = clipped(batch())
    kept = {name: g.clone() for name, g in first.grads.items()}
    other = batch()
    other["x"] = other["x"] + 1
    clipped(other)
    assert all(torch.equal(first.grads[name], kept[name]) for name in kept)


def test_a_sum_that_was_only_partly_written_is_of_no_use(monkeypatch):
    clipped = dpt.clipped_grad(network(), loss_fn, clip_norm=0.3)
    total = clipped(batch())

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("dptrain.torch.bookkeeping.pull_back_sums", fail)
    with pytest.raises(MemoryError):
        clipped(batch(), into=total)
    with pytest.raises(ValueError, match="emptied"):
        clipped(batch(), into=total)


def test_sums_of_another_norm_are_refused():
    total = dpt.clipped_grad(network(), loss_fn, clip_norm=0.5)(batch())
    with pytest.raises(ValueError, match="another clip norm"):
        dpt.clipped_grad(network(), loss_fn, clip_norm=0.3)(batch(), into=total)


def test_a_memory_budget_is_kept_or_a_second_pass_taken():
    menu = [
        [Offer(Route("materialise", "reuse"), 1.0, 100), Offer(Route("gram", "contract"), 2.0, 10)],
        [Offer(Route("materialise", "reuse"), 1.0, 50), Offer(Route("gram", "contract"), 5.0, 10)],
    ]
    norms = lambda *args: [route.norm for route in choose(menu, *args).routes]  # noqa: E731
    assert norms(None) == ["materialise", "materialise"]
    assert norms(70) == ["gram", "materialise"]
    assert norms(20) == ["gram", "gram"]
    assert choose(menu, 19) is None
    assert choose(menu, 70, 8, 0.1).parts == 3 and norms(70, 8, 0.1) == norms(None)
    assert choose(menu, 70, 8, 0.6).parts == 1 and norms(70, 8, 0.6) == norms(70)
    assert choose(menu, 19, 8, 100.0).parts == 8
    assert choose(menu, 18, 8, 0.1) is None
    assert choose(menu, 50, 7, 0.1).parts == 4  # not 3 of 3 examples, which would hold 64
    model, data = network(), batch()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.3, memory_budget=0)
    assert clipped.plan(data).second_backward
    expected, _ = oracle.clipped_sum(model, loss_fn, data, 0.3)
    assert oracle.relative_error(clipped(data).grads, expected) < 1e-9


@pytest.mark.parametrize("mask", [None, [True, False, True, True, True, False, True]])
def test_examples_are_taken_in_parts_where_memory_is_short(mask, monkeypatch):
    monkeypatch.setattr(planner, "PART_S_PER_USE", 0.0)
    model, data = network(), batch(7)
    mask = None if mask is None else torch.tensor(mask)
    whole = dpt.clipped_grad(model, loss_fn, clip_norm=0.3)
    held = sum(g.numel() for g in whole(data).grads.values()) * 7 * 4
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.3, memory_budget=held // 3)
    plan = clipped.plan(data, mask)
    assert plan.parts > 1 and str(plan.parts) in plan.describe()
    want = whole(data, mask)
    for into in (None, whole(batch(2))):
        start = 0 if into is None else 2
        before = {name: 0 if into is None else into.grads[name].clone() for name in want.grads}
        out = clipped(data, mask, into=into)
        assert torch.allclose(out.norms[start:], want.norms) and torch.allclose(
            out.losses[start:], want.losses
        )
        for name, g in want.grads.items():
            assert torch.allclose(out.grads[name] - before[name], g, rtol=1e-9, atol=1e-12)


def test_a_sum_of_some_parts_is_of_no_use(monkeypatch):
    model, data = network(), batch(6)
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.3)
    total = clipped(batch(3))
    calls = []

    def fail_later(*args, **kwargs):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryError
        return clip_batch(*args, **kwargs)

    monkeypatch.setattr("dptrain.torch.clipping.clip_batch", fail_later)
    with pytest.raises(MemoryError):
        clipped._in_parts(3, data, None, 6, total, last=False)
    assert not total.grads


@pytest.mark.parametrize("options", [{"memory_budget": -1}, {"routes": {"*": "fast"}}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError):
        dpt.clipped_grad(network(), loss_fn, clip_norm=1.0, **options)
    with pytest.raises(ValueError, match="auto"):
        dpt.clipped_grad(network(), loss_fn, clip_norm=1.0, method="ghost", memory_budget=5)


@pytest.mark.parametrize("positions", [1, 5, 96, 197])
def test_gram_norms_by_blocks(positions):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 2, positions, 300, generator=generator) + 1
    cols = torch.randn(2, 2, positions, 520, generator=generator) + 1
    squared, bound = gram.squared_norms(rows, cols)
    true = (rows.double().mT @ cols.double()).square().sum((1, 2, 3))
    assert ((squared.double() - true).abs() <= bound.double()).all()
    assert (bound < 0.01 * squared).all()
    exact, _ = gram.squared_norms(rows.double(), cols.double())
    assert torch.allclose(exact, true, rtol=1e-12)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_gram_matrix_of_patches_is_that_of_pixels(dilation, groups):
    rule = Convolution((3, 2), (1, 1), (2, 1), (dilation, 1), False, groups)
    image = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    out = F.conv2d(image, torch.randn(4, 4 // groups, 3, 2).double(), None, 1, (2, 1), (dilation, 1), groups)
    patches = rule._patches(image, out.shape[2:])
    assert torch.allclose(rule.patch_gram(image, out.shape[2:]), patches @ patches.mT)


def test_standardised_norms_carry_their_error():
    torch.manual_seed(0)
    leaf = torch.randn(7, 4, 3, 3, requires_grad=True)
    value = F.batch_norm(leaf.reshape(1, 7, -1), None, None, training=True, eps=1e-6).reshape_as(leaf)
    standard = standardised.of(value, leaf)
    image, g = torch.rand(3, 4, 6, 6) + 2, torch.randn(3, 7, 6, 6)
    rule = Convolution((3, 3), (1, 1), (1, 1), (1, 1))
    gradients = rule.example_gradients(value.shape, image, g, Layout(), 3)
    wide = leaf.detach().double().requires_grad_()
    exact = F.batch_norm(wide.reshape(1, 7, -1), None, None, training=True, eps=1e-6).reshape_as(wide)
    per_example = rule.example_gradients(value.shape, image.double(), g.double(), Layout(), 3)
    true = torch.stack(
        [torch.autograd.grad(exact, wide, each, retain_graph=True)[0].square().sum() for each in per_example]
    )
    for squared, bound in (
        standard.norms(gradients),
        standard.gram_norms(rule, image, g, None, Layout(), 3),
    ):
        assert ((squared.double() - true).abs() <= bound.double()).all()
    plain = standard.pulled_back(gradients).double().square().sum((1, 2))
    assert torch.allclose(plain, true, rtol=1e-4)
    level = gradients + 1000 * gradients.std()  # nearly all of it has no part in the norm
    squared, bound = standard.norms(level)
    wide = standard.pulled_back(level.double()).square().sum((1, 2))
    assert ((squared.double() - wide).abs() <= bound.double()).all()
    assert ((squared.double() - wide).abs() > 0.1 * wide).any()


def large_use():
    """Facts of a use that is worth a measurement at 1000 examples."""
    model = nn.Linear(600, 600, bias=False)
    data = {"x": torch.randn(300, 600), "y": torch.randint(5, (300,))}
    return dpt.clipped_grad(model, loss_fn, clip_norm=1.0).plan(data).findings.uses[0]


def test_what_could_exhaust_the_memory_is_not_tried(monkeypatch):
    watch, fact = Stopwatch(torch.device("cpu"), torch.float32), large_use()
    assert 0 < watch.seconds(fact, "keep", 1000, False) < float("inf")
    monkeypatch.setattr(stopwatch, "total_memory", lambda _: 2**30)
    assert watch.seconds(fact, "keep", 1000, False) == float("inf")
    assert 0 < watch.seconds(fact, "gram", 1000, False) < float("inf")


def test_a_measurement_leaves_no_trace():
    """Neither random numbers nor autocast of the caller's have a part in it."""
    watch, fact = Stopwatch(torch.device("cpu"), torch.float32), large_use()
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        for part in ("keep", "reuse", "drop", "gram", "contract"):
            assert 0 < watch.seconds(fact, part, 1000, False) < float("inf")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_failed_for_want_of_memory_is_tried_again(monkeypatch, tmp_path):
    watch, fact = (
        Stopwatch(torch.device("cpu"), torch.float32, Remembered(tmp_path / "routes.json")),
        large_use(),
    )

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Stopwatch, "_measure", fail)
        assert watch.seconds(fact, "gram", 1000, False) == float("inf")
    assert watch.seconds(fact, "gram", 1000, False) < float("inf")
    watch.remember()
    again = Stopwatch(torch.device("cpu"), torch.float32, Remembered(tmp_path / "routes.json"))
    monkeypatch.setattr(Stopwatch, "_measure", fail)
    assert again.seconds(fact, "gram", 1000, False) < float("inf")


def test_a_sum_is_never_pulled_back_through_a_narrower_type():
    """A weight that was rounded to bfloat16 on its way would round the clipped sum as well, beyond C."""

    class Rounded(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight.bfloat16().float().mul(1.0), self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Rounded(192, 5))
    data = {"x": torch.randn(40, 3, 8, 8), "y": torch.randint(5, (40,))}
    out = dpt.clipped_grad(model, loss_fn, clip_norm=1e-2)(data)
    expected, _ = oracle.clipped_sum(model, loss_fn, data, 1e-2)
    assert oracle.relative_error(out.grads, expected) < 1e-5


@pytest.mark.parametrize("groups", [4, 2])
def test_channels_last_is_as_exact(groups):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(groups, 8), nn.Conv2d(8, 8, 5, groups=8), nn.ReLU()]
    head = [StandardisedConv(8, 8, 2), nn.Flatten(), nn.Linear(8, 5)]
    model = nn.Sequential(*layers, *head).double().to(memory_format=torch.channels_last)
    data = batch()
    data["x"] = data["x"].contiguous(memory_format=torch.channels_last)
    expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.3)
    for method in ("auto", "bk-ghost", "per-example"):
        clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.3, method=method)
        kinds = {row["parameter"]: row["pull-back"] for row in clipped.plan(data).rows()}
        assert kinds["4.weight"] == "standardised"
        out = clipped(data)
        assert oracle.relative_error(out.grads, expected) < 1e-9
        assert torch.allclose(out.norms, norms, rtol=1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("method", ["auto", "bk-ghost", "bk-mix-opt", "per-example"])
def test_windows_that_do_not_overlap_in_groups(method, memory_format):
    """Such convolutions are matrix products of each example and group, in the plan's own memory."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 6, 2, 2, groups=2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 5)).double().to(memory_format=memory_format)
    data = batch()
    data["x"] = data["x"].contiguous(memory_format=memory_format)
    expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.3)
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.3, method=method)(data)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    assert torch.allclose(out.norms, norms, rtol=1e-9)


WAYS = {
    "examples as groups": {"FEW_POSITIONS": 0, "FEW_ROWS": 0, "LANES": 1, "FEW_CHANNELS": 0},
    "one by one": {"FEW_POSITIONS": 0, "FEW_ROWS": 0, "LANES": 10**6, "FEW_CHANNELS": 10**6},
    "products of patches": {"FEW_POSITIONS": 10**6, "FEW_ROWS": 10**6},
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_gradients_of_convolutions(monkeypatch, way, memory_format):
    """Which one is taken depends on the numbers of positions and channels, and on the memory format."""
    for name, value in WAYS[way].items():
        monkeypatch.setattr(convolution, name, value)
    case = next(case for case in cases.CASES if case.name == "convolutions")
    model, data = cases.build(case)
    model = model.to(memory_format=memory_format)
    data["x"] = data["x"].contiguous(memory_format=memory_format)
    expected, norms = oracle.clipped_sum(model, case.loss, data, 0.3)
    for routes in ("materialise+reuse", "materialise+contract", "gram+contract"):
        out = dpt.clipped_grad(model, case.loss, clip_norm=0.3, routes={"*.weight": routes})(data)
        assert oracle.relative_error(out.grads, expected) < 1e-9
        assert torch.allclose(out.norms, norms, rtol=1e-9)


@pytest.mark.parametrize("groups", [6, 3, 1])
def test_group_norm_keeps_channels_last(groups):
    """Float64 convolutions do not, so that it is asked by itself."""
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(6, 1, 1))
            self.norm = nn.GroupNorm(groups, 6)
            self.norm.weight.data.normal_()

        def forward(self, x):
            y = self.norm(self.scale * x)
            seen.append(y.is_contiguous(memory_format=torch.channels_last))
            return y.tanh().mean((2, 3))[:, :5]

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(4, 6, 3, 5, dtype=torch.float64)
    data = {"x": x.contiguous(memory_format=torch.channels_last), "y": torch.arange(4)}
    expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.1)
    seen.clear()
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.1)(data)
    assert seen[0] and seen[-1]  # stand-ins too
    assert oracle.relative_error(out.grads, expected) < 1e-9
    assert torch.allclose(out.norms, norms, rtol=1e-9)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "channels, out, groups, kernel, stride, padding, dilation, side",
    [
        (6, 6, 6, (7, 5), (1, 1), (3, 2), (1, 1), (9, 11)),  # bands
        (6, 6, 6, (5, 5), (1, 1), (0, 1), (1, 1), (12, 20)),  # too wide for them
        (6, 6, 6, (5, 5), (2, 2), (2, 2), (1, 1), (12, 20)),
        (6, 6, 6, (5, 5), (1, 1), (2, 2), (2, 2), (12, 12)),
        (6, 12, 6, (5, 5), (1, 1), (2, 2), (1, 1), (9, 9)),
        (6, 12, 3, (3, 2), (2, 1), (1, 0), (1, 1), (9, 9)),  # groups
        (6, 4, 1, (2, 2), (2, 2), (1, 1), (1, 1), (9, 9)),  # disjoint patches
        (6, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1), (4, 4)),  # few positions
        (6, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1), (19, 14)),
    ],
)
def test_convolutions_by_every_way(channels, out, groups, kernel, stride, padding, dilation, side, last):
    image = torch.randn(3, channels, *side, dtype=torch.float64)
    weight = torch.randn(out, channels // groups, *kernel, dtype=torch.float64, requires_grad=True)
    geometry = (stride, padding, dilation, groups)
    result = F.conv2d(image, weight, None, *geometry)
    g = torch.randn_like(result)
    expected = torch.stack(
        [
            torch.autograd.grad(F.conv2d(image[b : b + 1], weight, None, *geometry), weight, g[b : b + 1])[0]
            for b in range(3)
        ]
    )
    if last:
        image, g = (t.contiguous(memory_format=torch.channels_last) for t in (image, g))
    rule = Convolution(kernel, stride, padding, dilation, False, groups)
    found = rule.example_gradients(weight.shape, image, g, Layout(), 3)
    assert torch.allclose(found, expected)
    squared, _ = rule.squared_norms(image, g, Layout(), 3)
    assert torch.allclose(squared, expected.square().flatten(1).sum(1))
    scratch = torch.empty_like(found)
    assert torch.equal(rule.example_gradients(weight.shape, image, g, Layout(), 3, scratch), found)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    total = rule.contract(weight.shape, image, g, weights, Layout(), 3)
    assert torch.allclose(total, torch.einsum("b,b...->...", weights, expected))
