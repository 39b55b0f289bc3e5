"""Single rules on random shapes, arguments and sharing patterns, against the float64 oracle.

A family draws a *setting*: a model with one use or a few, and the shapes of its batch. Sizes are small
and drawn from few numbers, so that they often equal the batch size, which is what layouts can be
confused by. Everything drawn here must be exact: a refusal fails as an error does.

The examples are always the same. ``-m slow`` draws many more.
"""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dptrain.torch as dpt
from dptrain.core import methods

from . import oracle
from .families.convolutions import convolutions
from .families.linear_maps import MAPS, einsums, linears, products
from .families.norms import norms
from .families.pointwise import POINTWISE, SAME_SHAPE, pointwise
from .families.recurrent import cells, recurrent
from .families.routed import routed
from .families.settings import Setting, loss_fn, seeds
from .families.sharing import USES, VALUES, shared
from .families.tables import BAGS, LOOKUPS, tables

PRIVATE = [row.name for row in methods.TABLE if row.is_private]
#: vmap can neither branch nor pick rows by what the data hold
FOLLOWS_DATA = [name for name in PRIVATE if name != "per-example-vmap"]
TOLERANCE = 1e-9

PROFILE = settings(
    derandomize=True, database=None, deadline=None, print_blob=False, suppress_health_check=list(HealthCheck)
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop:UserWarning",
    # of PyTorch's own, for an even kernel with padding='same'
    "ignore:Using padding='same' with even kernel:UserWarning",
)


# ------------------------------------------------------------------ what must hold


def equals_single_examples(setting: Setting, method: str, seed: int) -> None:
    """Norms and the clipped sum of one batch, and of another of the same shape in which masked rows hold
    NaN and a row that counts is infinite."""
    torch.manual_seed(seed)
    model, rows, others = setting.model(), setting.rows(), setting.rows()
    mask = torch.rand(setting.size) < 0.7
    _, norms = oracle.clipped_sum(model, loss_fn, rows, 1.0)
    assume(float(norms.min()) > 1e-6)  # or all would be rounding
    # not all values that were drawn have a part in what was drawn for them
    clipped = dpt.clipped_grad(
        model, loss_fn, clip_norm=float(norms.median()), method=method, allow_unused=True
    )
    agrees(model, clipped, rows, None)
    agrees(model, clipped, {name: hostile(t, ~mask, torch.nan) for name, t in others.items()}, mask)
    if setting.overflows:
        last = torch.arange(setting.size) == setting.size - 1
        agrees(model, clipped, {name: hostile(t, last, torch.inf) for name, t in others.items()}, None)


def hostile(t: Tensor, rows: Tensor, value: float) -> Tensor:
    """With these rows set to a value, where they hold floats."""
    return torch.where(rows.view(-1, *[1] * (t.dim() - 1)), value, t) if t.is_floating_point() else t


def agrees(model: nn.Module, clipped, batch: dict[str, Tensor], mask: Tensor | None) -> None:
    keep = loss_fn(model, batch).detach().isfinite()  # an example without a loss counts for nothing
    keep = keep if mask is None else keep & mask
    expected, norms = oracle.clipped_sum(model, loss_fn, batch, clipped.clip_norm, keep)
    counted = norms.isfinite() & keep
    out = clipped(batch, mask)
    torch.testing.assert_close(out.norms[counted], norms[counted], rtol=TOLERANCE, atol=1e-12)
    assert oracle.relative_error(out.grads, expected) < TOLERANCE
    assert not any(t.requires_grad for t in (out.norms, out.losses, *out.grads.values()))


#: uses of whole matrices, which have a Gram form together
TIED = ("linear", "matmul", "from the left", "einsum", "lookup", "embedding")
#: by name: the settings, how many, and the methods that can do them
FAMILIES = {
    "convolution": (convolutions(), 70, PRIVATE),
    **{f"linear, {kind}": (linears(kind), 4, PRIVATE) for kind in MAPS},
    "matmul": (products(), 40, PRIVATE),
    "einsum": (einsums(), 50, PRIVATE),
    "norm": (norms(), 40, PRIVATE),
    **{f"pointwise, {kind}": (pointwise(kind), 3, PRIVATE) for kind in (*POINTWISE, *SAME_SHAPE)},
    **{f"table, {kind}": (tables(kind), 5, PRIVATE) for kind in (*BAGS, *LOOKUPS)},
    "sharing": (shared(USES, VALUES), 50, PRIVATE),
    "tied": (shared(TIED, ("a", "a^T")), 25, PRIVATE),
    "recurrent": (recurrent(), 30, FOLLOWS_DATA),
    "cell": (cells(), 10, FOLLOWS_DATA),
    "routed": (routed(), 30, FOLLOWS_DATA),
}
#: what no method could do anything about
LEGITIMATE = (
    "per-example-vmap cannot transform",  # nor can torch.vmap by itself
    "no stand-in example moved",  # the rows of the batch are alike, or have no gradient
    "came where the probe saw none",  # a maximum that lets a value through in some batches only
    "change from call to call",  # all of a small batch went to one expert, and not so in the next
)


@contextlib.contextmanager
def legitimate_refusals():
    """Other settings instead of those that none can do anything about."""
    try:
        yield
    except ZeroDivisionError:  # the judge's: an example without any gradient
        reject()
    except dpt.Refused as refusal:
        if any(word in str(refusal) for word in LEGITIMATE):
            reject()
        raise


MORE = pytest.param(20, marks=pytest.mark.slow, id="more")


@pytest.mark.parametrize("times", [pytest.param(1, id="few"), MORE])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_single_examples(family, times):
    drawn, examples, fit = FAMILIES[family]

    @settings(PROFILE, max_examples=times * examples)
    @given(drawn, st.sampled_from(fit), seeds)
    def holds(setting, method, seed):
        with legitimate_refusals():
            equals_single_examples(setting, method, seed)

    holds()


# ------------------------------------------------------------------ narrower types

#: without jumps that rounding could set off
SMOOTH = st.one_of(
    *(family for name, (family, *_) in FAMILIES.items() if name.split(",")[0] not in ("pointwise", "routed"))
)
#: what a few dozen roundings amount to, where nothing cancels
ROUNDING = 2000 * torch.finfo(torch.float32).eps
#: a Gram norm is taken as it is while the bound on its error, which is added, is below 1 % of its square
GRAM = 0.005


def in_float32(setting: Setting, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    rows = {name: t.float() if t.is_floating_point() else t for name, t in setting.rows().items()}
    return setting.model().float(), rows


def total_norm(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


@pytest.mark.parametrize("times", [pytest.param(1, id="few"), MORE])
def test_float32_is_off_by_rounding(times):
    """Norms are not understated, and overstated by no more than their bound."""

    @settings(PROFILE, max_examples=times * 50)
    @given(SMOOTH, st.sampled_from(PRIVATE), seeds)
    def holds(setting, method, seed):
        model, rows = in_float32(setting, seed)
        wide = copy.deepcopy(model).double()
        exact = {name: t.double() if t.is_floating_point() else t for name, t in rows.items()}
        with legitimate_refusals():
            _, norms = oracle.clipped_sum(wide, loss_fn, exact, 1.0)
            bound = float(norms.median())
            out = dpt.clipped_grad(model, loss_fn, clip_norm=bound, method=method, allow_unused=True)(rows)
        expected, norms = oracle.clipped_sum(wide, loss_fn, exact, bound)
        ratio = out.norms.double() / norms
        assert float(ratio.min()) > 1 - ROUNDING and float(ratio.max()) < 1 + GRAM + ROUNDING
        wrong = {name: out.grads[name].double() - want for name, want in expected.items()}
        assert total_norm(wrong) < (GRAM + ROUNDING) * bound * setting.size

    holds()


def under_autocast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss_fn(model, batch)


@pytest.mark.parametrize("times", [pytest.param(1, id="few"), MORE])
def test_bfloat16_never_exceeds_the_clip_norm(times):
    """What an example adds, by itself and to the others, is at most C, however rough the gradient."""

    @settings(PROFILE, max_examples=times * 40)
    @given(SMOOTH, st.sampled_from(FOLLOWS_DATA), seeds)
    def holds(setting, method, seed):
        model, rows = in_float32(setting, seed)
        with legitimate_refusals():
            _, norms = oracle.clipped_sum(model, loss_fn, rows, 1.0)
            bound = float(norms.min())
            clipped = dpt.clipped_grad(
                model, under_autocast, clip_norm=bound, method=method, allow_unused=True
            )
            whole = clipped(rows).grads
        for b in range(setting.size):
            alone = torch.arange(setting.size) == b
            part, others = clipped(rows, alone).grads, clipped(rows, ~alone).grads
            assert total_norm(part) < 1.01 * bound
            assert total_norm({name: g - others[name] for name, g in whole.items()}) < 1.01 * bound

    holds()
