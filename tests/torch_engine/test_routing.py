"""Rows that the data send about: experts in several styles, narrow types, loops over examples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dptrain.torch as dpt
from dptrain.torch import routing
from dptrain.torch.layout import Routed

from . import oracle

EXPERTS, WIDTH = 3, 6
METHODS = ["auto", "ghost", "bk-ghost", "bk-mix-opt", "per-example"]


def index_add(m, tokens, gate, chosen):
    out = torch.zeros_like(tokens)
    for e in range(EXPERTS):
        rows = torch.where(chosen == e)[0]
        out = out.index_add(0, rows, torch.tanh(tokens[rows] @ m.weight[e] + m.bias[e]) * gate[rows])
    return out


def linear_experts(m, tokens, gate, chosen):
    out = torch.zeros_like(tokens)
    for e in range(EXPERTS):
        rows = torch.where(chosen == e)[0]
        out = out.index_add(0, rows, tokens[rows] @ m.weight[e] * gate[rows])
    return out


def boolean_masks(m, tokens, gate, chosen):
    out = torch.zeros_like(tokens)
    for e in range(EXPERTS):
        mask = chosen == e
        if mask.any():
            out[mask] = torch.tanh(F.linear(tokens[mask], m.weight[e].T, m.bias[e])) * gate[mask]
    return out


def sort_and_split(m, tokens, gate, chosen):
    order = chosen.argsort()
    sizes = torch.bincount(chosen, minlength=EXPERTS).tolist()
    parts = [torch.tanh(x @ m.weight[e] + m.bias[e]) for e, x in enumerate(tokens[order].split(sizes))]
    return torch.empty_like(tokens).index_copy(0, order, torch.cat(parts) * gate[order])


def slots(tokens, chosen):
    """A place of its own at its expert for each token."""
    one_hot = F.one_hot(chosen, EXPERTS)
    return ((one_hot.cumsum(0) - 1) * one_hot).sum(1)


def gather_into_slots(m, tokens, gate, chosen):
    """All experts at once, ``[E, N, F]``, with room for all tokens at every expert."""
    place = slots(tokens, chosen)
    there = tokens.new_zeros(EXPERTS, len(tokens), WIDTH).index_put((chosen, place), tokens)
    there = torch.tanh(torch.bmm(there, m.weight) + m.bias.unsqueeze(1))
    return there[chosen, place] * gate


def dispatch_einsum(m, tokens, gate, chosen):
    """GShard's products with one-hot masks."""
    place, one_hot = slots(tokens, chosen), F.one_hot(chosen, EXPERTS).to(tokens)
    send = one_hot.unsqueeze(2) * F.one_hot(place, len(tokens)).to(tokens).unsqueeze(1)
    there = torch.einsum("nec,nd->ecd", send, tokens)
    there = torch.tanh(torch.einsum("ecd,edf->ecf", there, m.weight) + m.bias.unsqueeze(1))
    return torch.einsum("nec,ecf->nf", send, there) * gate


def grouped(m, tokens, gate, chosen):
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).int()
    out = GroupedProduct.apply(tokens[order], m.weight, ends)
    out = torch.tanh(out + m.bias[chosen[order]]) * gate[order]
    return torch.empty_like(tokens).index_copy(0, order, out)


class GroupedProduct:
    """torch's grouped_mm has no float64 kernel: the oracle multiplies run by run, dptrain sees the call."""

    @staticmethod
    def apply(x, weight, ends):
        if torch.overrides.has_torch_function((x,)) or torch._C._len_torch_function_stack():
            return F.grouped_mm(x, weight, offs=ends)
        starts = [0, *ends.tolist()]
        return torch.cat([x[a:b] @ w for a, b, w in zip(starts, starts[1:], weight)])


def one_by_one(m, tokens, gate, chosen):
    """A loop over tokens: values without any axis of rows."""
    return torch.stack(
        [
            torch.tanh(torch.mv(m.weight[e].T, t) + m.bias[e]) * g
            for t, g, e in zip(tokens, gate, chosen.tolist())
        ]
    )


STYLES = [index_add, boolean_masks, sort_and_split, gather_into_slots, grouped, one_by_one]


class Experts(nn.Module):
    def __init__(self, style):
        super().__init__()
        self.router, self.head = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 4)
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 2)
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH) / 2)
        self.style = style

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gate, chosen = self.router(tokens).softmax(-1).max(-1, keepdim=True)
        out = self.style(self, tokens, gate, chosen.squeeze(1))
        return self.head((tokens + out).view_as(x).mean(1))


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def batch(size: int = 5, tokens: int = 4, spread: float = 1.0, dtype=torch.float64):
    x = torch.randn(size, tokens, WIDTH, dtype=dtype) * spread
    return {"x": x, "y": torch.randint(4, (size,))}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("style", STYLES, ids=lambda s: s.__name__)
def test_experts(style, method):
    """Several batches through one plan, whose routing differs; at last all tokens go to one expert."""
    torch.manual_seed(0)
    model = Experts(style).double()
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method)
    for round_ in range(4):
        data = batch()
        if round_ == 3:
            data["x"] = data["x"][:1, :1].expand(5, 4, WIDTH) + 1e-3 * data["x"]
        expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.5)
        out = clipped(data)
        torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)
        assert oracle.relative_error(out.grads, expected) < 1e-9


def test_products_with_masks_hand_on_what_is_no_number():
    with pytest.raises(dpt.Refused, match="0 \\* NaN"):
        dpt.clipped_grad(Experts(dispatch_einsum), loss_fn, clip_norm=1.0)(batch(dtype=torch.float32))


@pytest.mark.parametrize("style", [index_add, gather_into_slots], ids=lambda s: s.__name__)
def test_masked_and_broken_examples(style):
    torch.manual_seed(0)
    model = Experts(style).double()
    data = batch()
    expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.5, [True, False, False, True, True])
    data["x"][1], data["x"][2] = float("nan"), float("inf")
    mask = torch.tensor([True, False, True, True, True])
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.5)(data, mask)
    assert oracle.relative_error(out.grads, expected) < 1e-9
    torch.testing.assert_close(out.norms[[0, 3, 4]], norms[[0, 3, 4]], rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [1, 2, 16, 17, 40, 257])
def test_batch_sizes(size):
    """One digit, two digits and three."""
    torch.manual_seed(0)
    model, data = Experts(index_add).double(), batch(size, 2)
    expected, _ = oracle.clipped_sum(model, loss_fn, data, 0.1)
    out = dpt.clipped_grad(model, loss_fn, clip_norm=0.1)(data)
    assert oracle.relative_error(out.grads, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 40])
def test_narrow_types(dtype, size):
    """Subnormal gradients do not scale by powers of two: then each loss takes part or does not."""
    torch.manual_seed(0)
    model = Experts(index_add)

    def narrow(model, batch):
        with torch.autocast("cpu", dtype):
            logits = model(batch["x"])
        return 1e-3 * F.cross_entropy(logits.float(), batch["y"], reduction="none")

    data = batch(size, dtype=torch.float32)
    clipped = dpt.clipped_grad(model, narrow, clip_norm=1e-5)
    for b in range(0, size, 7):
        out = clipped(data, torch.arange(size) == b)
        norm = sum(g.double().square().sum() for g in out.grads.values()).sqrt()
        assert 0.98e-5 < norm <= 1e-5


def test_a_row_of_two_examples_is_refused():
    """Neighbours meet in the rows of an expert."""

    def pairs(m, tokens, gate, chosen):
        order = chosen.argsort()
        mixed = tokens[order] + tokens[order].roll(1, 0)
        return torch.empty_like(tokens).index_copy(0, order, mixed @ m.weight[0])

    with pytest.raises(dpt.Refused, match="mix"):
        dpt.clipped_grad(Experts(pairs), loss_fn, clip_norm=1.0)(batch(dtype=torch.float32))


SHUFFLES = {
    "sorted and put back": lambda m, x, key: m(x[key.argsort()])[key.argsort().argsort()],
    "by index_select": lambda m, x, key: m(x.index_select(0, key.argsort()))[key.argsort().argsort()],
    "with the rest of a tuple": lambda m, x, key: m(x[key.argsort(), :])[key.argsort().argsort()],
    "at random": lambda m, x, key: (lambda p: m(x[p])[p.argsort()])(torch.randperm(len(x))),
}


@pytest.mark.parametrize("method", ["auto", "ghost", "per-example"])
@pytest.mark.parametrize("name", SHUFFLES)
def test_rows_that_change_places_in_a_later_batch_only(name, method):
    """All shapes stay the same: only the owners of the rows are others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def loss_fn(model, batch):
        return F.cross_entropy(SHUFFLES[name](model, batch["x"], batch["key"]), batch["y"], reduction="none")

    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, method=method)
    x, y = torch.randn(6, WIDTH).double(), torch.randint(4, (6,))
    for key in (torch.zeros(6).long(), torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([0, 1, 0, 1, 1, 0])):
        data = {"x": x, "y": y, "key": key}
        expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.5)
        out = clipped(data)
        torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=0)
        assert oracle.relative_error(out.grads, expected) < 1e-9


class Heads(nn.Module):
    """A head for each domain that an example may come from."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))

    def forward(self, x, domain):
        h, out = self.body(x).tanh(), x.new_zeros(len(x), 4)
        for d in domain.unique().tolist():
            out[domain == d] = self.heads[d](h[domain == d])
        return out


@pytest.mark.parametrize("first", [[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]])
def test_heads_that_come_into_use_later(first):
    """Exact from the first batch on, also for a domain that the probe has not seen."""
    torch.manual_seed(0)
    model = Heads().double()

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["x"], batch["domain"]), batch["y"], reduction="none")

    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, allow_unused=True)
    for domain in (first, [2, 1, 0, 2, 2, 0], [2, 2, 2, 2, 2, 2]):
        x, y = torch.randn(6, WIDTH).double(), torch.randint(4, (6,))
        data = {"x": x, "y": y, "domain": torch.tensor(domain)}
        expected, norms = oracle.clipped_sum(model, loss_fn, data, 0.5)
        out = clipped(data)
        torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=0)
        assert oracle.relative_error(out.grads, expected) < 1e-9


def test_rows_of_nobody_may_hold_anything():
    """A padded token that is not finite has no gradient, and its row at the expert must not reach the sum."""

    class Padded(Experts):
        def forward(self, x):
            tokens = x.flatten(0, 1)
            gate, chosen = self.router(tokens.nan_to_num()).softmax(-1).max(-1, keepdim=True)
            out = self.style(self, tokens, gate, chosen.squeeze(1)).view_as(x)
            return self.head(torch.where(x.isfinite(), out, 0.0).mean(1))

    torch.manual_seed(0)
    model = Padded(linear_experts).double()
    clipped, data = dpt.clipped_grad(model, loss_fn, clip_norm=0.5, allow_unused=True), batch()
    clipped(data)
    data["x"][1, 2:] = float("inf")
    assert all(g.isfinite().all() for g in clipped(data).grads.values())


def test_several_broken_examples_among_rows_that_change_places():
    """Rows that are not finite spell no owner: those of other examples must still be found at home."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    def loss_fn(model, batch):
        order = batch["key"].argsort()
        return F.cross_entropy(model(batch["x"][order])[order.argsort()], batch["y"], reduction="none")

    data = {"x": torch.randn(6, WIDTH).double(), "y": torch.randint(4, (6,)), "key": torch.zeros(6).long()}
    clipped = dpt.clipped_grad(model, loss_fn, clip_norm=0.5)
    clipped(data)
    expected, _ = oracle.clipped_sum(model, loss_fn, data, 0.5, [True, False, True, False, False, True])
    data["x"][1], data["x"][3], data["x"][4] = float("nan"), float("inf"), float("nan")
    assert oracle.relative_error(clipped(data).grads, expected) < 1e-9
    assert not clipped.plan(data).findings.routed
    data["key"] = torch.tensor([3, 1, 5, 0, 2, 4])
    assert oracle.relative_error(clipped(data).grads, expected) < 1e-9
    assert clipped.plan(data).findings.routed


def test_picking_in_order_costs_no_search(monkeypatch):
    """``h[arange(B), last]`` moves no rows between examples."""

    def loss_fn(model, batch):
        h = model(batch["x"].mean(1))
        return h[torch.arange(len(h)), batch["y"]] + h.gather(1, batch["y"][:, None]).squeeze(1)

    def never(*_):
        raise AssertionError("owners were searched")

    monkeypatch.setattr(routing, "_owners", never)
    clipped = dpt.clipped_grad(nn.Linear(WIDTH, 4), loss_fn, clip_norm=0.5)
    clipped(batch(dtype=torch.float32))


def test_routed_rows_come_home():
    """Rows of each example in their order, padded with zeros; rows of nobody nowhere."""
    owners = torch.tensor([2, 0, -1, 2, 0, 2])
    layout = Routed(owners, 4)
    rows = torch.arange(1.0, 7.0).unsqueeze(1)
    split = layout.split(rows, 4)
    assert split.shape == (4, 1, 3, 1)
    assert split.flatten(1).tolist() == [[2, 5, 0], [0, 0, 0], [1, 4, 6], [0, 0, 0]]
    weights = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert layout.per_row(weights, 2).flatten().tolist() == [30, 10, 0, 30, 10, 30]
