"""Sums on an integer grid: exact sensitivity, whatever the order, the company and the method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism
from dptrain.torch import on_grid
from dptrain.torch.clipped_sum import ClippedSum

from . import oracle
from .cases import CASES, build

METHODS = ["per-example", "per-example-vmap", "per-example-loop"]
KEY = Key.from_seed(5)

every_method = pytest.mark.parametrize("method", METHODS)


def mechanism(clip_norm=0.5, **changes) -> Mechanism:
    options = {
        "noise_multiplier": 1.0,
        "clip_norm": clip_norm,
        "sample_rate": 0.5,
        "steps": 3,
        "expected_batch_size": 4,
        "delta": 1e-5,
    }
    return Mechanism.constant(**(options | changes)).hardened()


HARDENED = mechanism()


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def setting(size: int = 6, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3), nn.Linear(3, 3)
    )
    return model.to(dtype), (5 * torch.randn(size, 2, 8, dtype=dtype), torch.randint(3, (size,)))


def clipped_grad(model, method, **changes):
    options = {"clip_norm": 0.5, "method": method, "grid": HARDENED.grid}
    return dpt.clipped_grad(model, loss_fn, **(options | changes))


def integers(grads) -> list[int]:
    return [n for g in grads.values() for n in g.flatten().tolist()]


def squared(first, second=None) -> int:
    """The squared distance of two sums, in exact integers."""
    if second is None:
        return sum(n * n for n in integers(first))
    return sum((n - m) ** 2 for n, m in zip(integers(first), integers(second)))


def limit(clip_norm=0.5, grid=HARDENED.grid) -> float:
    return (clip_norm / grid) ** 2  # exact: the spacing is a power of two


def only(batch, *rows):
    return tuple(t[list(rows)] for t in batch)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize(
    ("case", "method"),
    [
        pytest.param(case, method, id=f"{case.name}-{method}")
        for case in CASES
        for method in METHODS
        if method == "per-example" or case.name in ("vit", "tied-lm")
    ],
)
def test_it_is_the_clipped_sum_to_a_spacing_for_each_example(case, method):
    model, batch = build(case)
    norms = oracle.clipped_sum(model, case.loss, batch, 1.0)[1]
    bound = float(norms.median())
    grid = mechanism(bound).grid
    want, norms = oracle.clipped_sum(model, case.loss, batch, bound)
    out = dpt.clipped_grad(model, case.loss, clip_norm=bound, method=method, grid=grid)(batch)
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)
    assert out.grid == grid and out.grads.keys() == want.keys()
    for name, total in out.grads.items():
        assert total.dtype == torch.int64 and total.shape == want[name].shape
        assert float((total * grid - want[name]).abs().max()) < (len(norms) + 0.1) * grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_method
def test_neighbours_differ_by_the_clip_norm_at_most(method, dtype):
    """Exactly, in integers: with or without an example, in whatever place, the others in any order."""
    model, batch = setting(dtype=dtype)
    clipped = clipped_grad(model, method)
    whole = clipped(batch)
    norms = []
    for b in range(6):
        alone, others = torch.arange(6) == b, torch.arange(6) != b
        distance = squared(whole.grads, clipped(batch, others).grads)
        norms.append(squared(clipped(batch, alone).grads))
        assert distance == norms[-1] <= limit(), "the sum is not one of integers that are each example's own"
    assert max(norms) > 0.9999 * limit(), "nothing was clipped"


@every_method
def test_the_order_of_summation_does_not_matter(method):
    model, batch = setting()
    clipped = clipped_grad(model, method)
    whole = clipped(batch)
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        assert integers(clipped(only(batch, *order)).grads) == integers(whole.grads)
    first, second = clipped(only(batch, 0, 1, 2)), clipped(only(batch, 3, 4, 5))
    assert integers((second + first).grads) == integers((first + second).grads)
    if method == "per-example-loop":  # others compute batches of another size as they please
        assert integers((first + second).grads) == integers(whole.grads)
    into = clipped(only(batch, 3, 4, 5), into=clipped(only(batch, 0, 1, 2)))
    assert integers(into.grads) == integers((first + second).grads) and len(into.norms) == 6
    assert into.grid == HARDENED.grid


@every_method
def test_an_example_is_its_own_to_the_last_bit(method):
    """Its part does not change when its neighbours do."""
    model, batch = setting()
    clipped = clipped_grad(model, method)
    parts = []
    for other in range(4):
        x, y = batch[0].clone(), batch[1].clone()
        x[1:] = 10.0 ** (2 * other - 3) * torch.randn(5, 2, 8)
        whole = clipped((x, y))
        without = clipped((x, y), torch.arange(6) != 0)
        parts.append([n - m for n, m in zip(integers(whole.grads), integers(without.grads))])
    assert all(part == parts[0] for part in parts) and any(parts[0])


@pytest.mark.parametrize("factor", [1.001, 3.0, 1e9])
@every_method
def test_an_example_that_is_too_long_after_all_contributes_nothing(method, factor, monkeypatch):
    """Should a norm ever be wrong: what is checked are the integers."""
    model, batch = setting()
    clipped = clipped_grad(model, method)
    norms = clipped(batch).norms
    long = (norms * factor * 1.01 > 0.5).tolist()
    assert any(long)
    add = on_grid.GridSums.add

    def careless(self, gradients, factors, included):
        add(self, gradients, factors * factor, included)

    monkeypatch.setattr(on_grid.GridSums, "add", careless)
    for b in range(6):
        part = clipped(batch, torch.arange(6) == b).grads
        assert squared(part) <= limit()
        if long[b]:
            assert not any(integers(part))
    assert integers(clipped(batch).grads) == [
        sum(parts) for parts in zip(*(integers(clipped(batch, torch.arange(6) == b).grads) for b in range(6)))
    ]


@every_method
def test_rows_that_are_masked_or_not_finite_contribute_nothing(method):
    model, batch = setting()
    clipped = clipped_grad(model, method)
    mask = torch.tensor([True, True, False, True, True, False])
    want = integers(clipped(batch, mask).grads)
    x = batch[0].clone()
    x[2], x[5] = float("nan"), 1e30
    assert integers(clipped((x, batch[1]), mask).grads) == want
    x[3] = float("inf")
    assert integers(clipped((x, batch[1]), mask).grads) == integers(
        clipped(batch, mask & (torch.arange(6) != 3)).grads
    )
    empty = clipped(batch, torch.zeros(6, dtype=torch.bool))
    assert not any(integers(empty.grads)) and empty.grid == HARDENED.grid


@pytest.mark.parametrize("at_once", [1, 100])
def test_how_many_examples_are_rounded_at_once_does_not_matter(at_once, monkeypatch):
    model, batch = setting()
    want = integers(clipped_grad(model, "per-example")(batch).grads)
    monkeypatch.setattr(on_grid, "AT_ONCE", at_once)
    assert integers(clipped_grad(model, "per-example")(batch).grads) == want


def test_auto_is_per_example():
    model, batch = setting()
    auto = clipped_grad(model, "auto")
    assert auto.method.name == "per-example"
    assert integers(auto(batch).grads) == integers(clipped_grad(model, "per-example")(batch).grads)


@pytest.mark.parametrize(
    "method", ["ghost", "mixed-ghost", "bk-ghost", "bk-mix-opt", "fast-gradient", "non-private"]
)
def test_methods_that_keep_no_gradients_are_refused(method):
    with pytest.raises(ValueError, match="does not keep the gradient of each example"):
        clipped_grad(setting()[0], method)


def test_what_cannot_be_followed_is_refused():
    model, batch = setting()
    with pytest.raises(ValueError, match="without options of 'auto'"):
        clipped_grad(model, "auto", memory_budget=10**6)
    with pytest.raises(ValueError, match="power of two"):
        clipped_grad(model, "auto", grid=1e-7)
    with pytest.raises(ValueError, match="overflow"):
        clipped_grad(model, "auto", grid=2.0**-40)
    with pytest.warns(UserWarning, match="compile=True has no effect"):
        compiled = clipped_grad(model, "per-example", compile=True)
    assert integers(compiled(batch).grads) == integers(clipped_grad(model, "per-example")(batch).grads)


def test_sums_of_different_grids_do_not_add():
    model, batch = setting()
    on, off = clipped_grad(model, "per-example"), clipped_grad(model, "per-example", grid=None)
    coarse = clipped_grad(model, "per-example", grid=2 * HARDENED.grid)
    for first, second in ((on, off), (off, on), (on, coarse)):
        with pytest.raises(ValueError, match="grids"):
            _ = first(batch) + second(batch)
        with pytest.raises(ValueError, match="grids"):
            first(batch).add_(second(batch))
        with pytest.raises(ValueError, match="another grid"):
            first(batch, into=second(batch))


# ---- release


def released(clipped, steps=HARDENED):
    return dpt.privatize(clipped, steps, KEY)


def test_what_is_released_is_the_integer_sum_and_integer_noise():
    model, batch = setting()
    clipped = clipped_grad(model, "per-example")
    out, nothing = clipped(batch), clipped(batch, torch.zeros(6, dtype=torch.bool))
    noisy, noise = released(out), released(nothing)
    scale = HARDENED.grid / 4
    for name, total in out.grads.items():
        assert noisy.grads[name].dtype == torch.float32 and noisy.grads[name].shape == total.shape
        z = noise.grads[name].double() / scale
        # float32 has 24 digits of what is 2^24 and more
        torch.testing.assert_close(noisy.grads[name].double() / scale - z, total.double(), rtol=0, atol=16)
    assert noisy.spec == HARDENED.step(0) and noisy.reproducible
    want = {name: g.clone() for name, g in noisy.grads.items()}
    donated = dpt.privatize(out, HARDENED, KEY, donate=True)
    assert all(torch.equal(donated.grads[name], g) for name, g in want.items()) and not out.grads
    with pytest.raises(ValueError, match="given away"):
        released(out)


def test_noise_on_a_grid_has_the_deviation_that_is_accounted():
    zeros = {"w": torch.zeros(10**6, dtype=torch.int64)}
    total = ClippedSum(zeros, torch.zeros(1), torch.zeros(1), 0.5, HARDENED.grid)
    g = released(total).grads["w"].double() * 4
    assert abs(float(g.std()) / 0.5 - 1) < 0.004 and abs(float(g.mean())) < 0.5 * 5e-3


def test_sums_and_mechanisms_must_agree_on_the_grid():
    model, batch = setting()
    plain = Mechanism.constant(
        noise_multiplier=1.0, clip_norm=0.5, sample_rate=0.5, steps=3, expected_batch_size=4
    )
    on, off = clipped_grad(model, "per-example")(batch), clipped_grad(model, "per-example", grid=None)(batch)
    with pytest.raises(ValueError, match="lies on a grid"):
        released(on, plain)
    with pytest.raises(ValueError, match="lies on no grid"):
        released(off)
    with pytest.raises(ValueError, match="lies on a grid"):
        released(on, mechanism(noise_multiplier=9.0))
    fake = ClippedSum(off.grads, off.norms, off.losses, 0.5, HARDENED.grid)
    with pytest.raises(TypeError, match="int64"):
        released(fake)


def test_make_private_trains_a_hardened_mechanism():
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 5), torch.randint(3, (32,)))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    before = [p.detach().clone() for p in model.parameters()]
    steps = mechanism(1.0, sample_rate=0.25, expected_batch_size=8, delta=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = dpt.make_private(model, optimizer, data, loss_fn, steps, physical_batch_size=4, key=KEY)
    assert [s.number for s in private.steps()] == [1, 2, 3]
    assert all((p != q).any() for p, q in zip(model.parameters(), before))
    sampled = {"sample_rate": 0.25, "expected_batch_size": 8}
    schedule = Mechanism(tuple((mechanism(noise_multiplier=s, **sampled).step(0), 1) for s in (2.0, 1.0)))
    with pytest.raises(ValueError, match="grid changes"):
        dpt.make_private(model, optimizer, data, loss_fn, schedule)


def test_exactness_of_the_bound_on_long_sums():
    """The check is in float64 and errs on the safe side only, by next to nothing."""
    sums = on_grid.GridSums({"w": torch.zeros(10**6)}, 1.0, 2.0**-24)
    assert sums.slack < 1e-9
    rng = np.random.default_rng(0)
    for size in (1, 1000, 10**6):
        n = torch.from_numpy(rng.integers(-(2**14), 2**14, size).astype(np.float32))
        exact = sum(int(m) ** 2 for m in n.tolist())
        found = float(torch.linalg.vector_norm(n, dtype=torch.float64)) ** 2
        assert math.isclose(found, exact, rel_tol=sums.slack)
