"""What Python code may call dptrain with: PyTorch's engine and the mechanism."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import dptrain.torch as dpt
from benchmarks.fuzz.target import Target, Wrong
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism

NAN, INF = float("nan"), float("inf")
NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    0.0,
    -0.0,
    0.5,
    1.0,
    1e-13,
    1e-12,
    5e-324,
    1e-300,
    1e300,
    1e38,
    3.5e38,
    NAN,
    INF,
    -INF,
    2**63,
    10**400,
    True,
    False,
    1j,
    1 + 0j,
    "1",
    "",
    "auto",
    b"1",
    None,
    [],
    [1.0],
    (1.0,),
    {},
    {"a": 1},
    object,
    Fraction(1, 3),
    np.float32(0.5),
    np.float64(NAN),
    np.int64(3),
    np.array(0.5),
    np.array([0.5, 1.0]),
    np.bool_(True),
    torch.tensor(0.5),
    torch.tensor([0.5]),
    torch.tensor([0.5, 1.0]),
    torch.tensor(NAN),
    torch.tensor(1j),
)
"""In the place of a number."""
REFUSALS = (ValueError, TypeError, dpt.Refused)
SIZE = 3


class Net(nn.Module):
    """A table, a linear map and a norm, on ids or on features."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear, self.norm = nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x) if x.dtype == torch.int64 else x
        return self.norm(self.linear(x))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """One loss per example, of a tensor or of what is under ``x``, or comes first."""
    if isinstance(batch, Mapping):
        batch = batch["x"]
    while isinstance(batch, list | tuple):
        batch = batch[0]
    return model(batch).flatten(1).pow(2).mean(1)


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    with torch.no_grad():
        made.norm.weight.uniform_(0.5, 1.5)
        made.norm.bias.uniform_(0.5, 1.5)
    return made


def _row(value: float) -> Tensor:
    x = torch.linspace(-1, 1, SIZE * 4).reshape(SIZE, 4)
    x[1] = value
    return x


BATCHES: dict[str, Callable[[], Any]] = {
    "plain": lambda: _row(0.5),
    "one": lambda: _row(0.5)[:1],
    "none": lambda: torch.zeros(0, 4),
    "no features": lambda: torch.zeros(SIZE, 0),
    "scalar": lambda: torch.tensor(1.0),
    "vector": lambda: torch.zeros(4),
    "sequence": lambda: torch.randn(SIZE, 2, 4, generator=torch.Generator().manual_seed(0)),
    "empty sequence": lambda: torch.zeros(SIZE, 0, 4),
    "wrong width": lambda: torch.zeros(SIZE, 5),
    "nan": lambda: _row(NAN),
    "inf": lambda: _row(INF),
    "huge": lambda: _row(1e38),
    "denormal": lambda: _row(1e-44),
    "all nan": lambda: torch.full((SIZE, 4), NAN),
    "double": lambda: _row(0.5).double(),
    "half": lambda: _row(0.5).half(),
    "complex": lambda: _row(0.5).to(torch.complex64),
    "bool": lambda: _row(0.5) > 0,
    "bytes": lambda: torch.zeros(SIZE, 4, dtype=torch.uint8),
    "ids": lambda: torch.tensor([[0, 4], [1, 1], [2, 3]]),
    "ids beyond": lambda: torch.tensor([[0, 5], [1, 1], [2, 3]]),
    "negative ids": lambda: torch.tensor([[0, -1], [1, 1], [2, 3]]),
    "strided": lambda: torch.linspace(-1, 1, SIZE * 8).reshape(SIZE, 8)[:, ::2],
    "transposed": lambda: torch.linspace(-1, 1, SIZE * 4).reshape(4, SIZE).T,
    "expanded": lambda: torch.linspace(-1, 1, 4).expand(SIZE, 4),
    "wants gradient": lambda: _row(0.5).requires_grad_(),
    "parameter": lambda: nn.Parameter(_row(0.5)),
    "meta": lambda: _row(0.5).to("meta"),
    "sparse": lambda: _row(0.5).to_sparse(),
    "numpy": lambda: _row(0.5).numpy(),
    "list of numbers": lambda: [[1.0, 2.0, 3.0, 4.0]] * SIZE,
    "nothing": lambda: None,
    "text": lambda: "batch",
    "empty tree": dict,
    "dictionary": lambda: {"x": _row(0.5), "y": torch.zeros(SIZE)},
    "nested": lambda: ([(_row(0.5),), torch.zeros(SIZE, 2)], {"a": torch.zeros(SIZE)}),
    "with a number": lambda: (_row(0.5), 3, "name", None),
    "other lengths": lambda: (_row(0.5), torch.zeros(SIZE + 1)),
    "with a scalar": lambda: (_row(0.5), torch.tensor(1.0)),
    "with no rows": lambda: (_row(0.5), torch.zeros(0)),
    "other devices": lambda: (_row(0.5), torch.zeros(SIZE, device="meta")),
}
MASKS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "all": lambda: torch.ones(SIZE, dtype=torch.bool),
    "some": lambda: torch.tensor([True, False, True]),
    "the odd one": lambda: torch.tensor([False, True, False]),
    "no one": lambda: torch.zeros(SIZE, dtype=torch.bool),
    "integers": lambda: torch.tensor([1, 0, 1]),
    "floats": lambda: torch.tensor([1.0, 0.0, 1.0]),
    "too long": lambda: torch.ones(SIZE + 1, dtype=torch.bool),
    "too short": lambda: torch.ones(1, dtype=torch.bool),
    "empty": lambda: torch.ones(0, dtype=torch.bool),
    "scalar": lambda: torch.tensor(True),
    "two axes": lambda: torch.ones(SIZE, 1, dtype=torch.bool),
    "list": lambda: [True, False, True],
    "numpy": lambda: np.array([True, False, True]),
    "meta": lambda: torch.ones(SIZE, dtype=torch.bool, device="meta"),
    "true": lambda: True,
    "text": lambda: "mask",
}
METHODS = (
    "auto",
    "per-example",
    "ghost",
    "bk-ghost",
    "bk-mix-opt",
    "per-example-vmap",
    "per-example-loop",
    "non-private",
)


def _oracle(model: nn.Module, batch: Any, mask: Any, clip_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Sum of clipped gradients and norms, by one example at a time in float64."""
    model = net().double()
    tensors = [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor)]
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    norms = []
    for row in range(len(tensors[0])):
        norms.append(torch.tensor(0.0, dtype=torch.float64))
        if mask is not None and not mask[row]:
            continue
        one = tree_map(lambda t: _doubled(t[row : row + 1]) if isinstance(t, Tensor) else t, batch)  # noqa: B023
        model.zero_grad(set_to_none=True)
        loss_fn(model, one).sum().backward()
        grads = {
            n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in model.named_parameters()
        }
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        norms[-1] = norm.detach()
        if not all(bool(g.isfinite().all()) for g in grads.values()):
            continue
        factor = 1.0 if math.isinf(clip_norm) else min(1.0, clip_norm / max(float(norm.detach()), 1e-300))
        total = {n: total[n] + factor * g for n, g in grads.items()}
    return total, torch.stack(norms)


def _doubled(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t.detach()


def _feed_batch(given: tuple[str, str, str, float], scratch: Path) -> None:
    batch_name, mask_name, method, clip_norm = given
    model, batch, mask = net(), BATCHES[batch_name](), MASKS[mask_name]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clipped = dpt.clipped_grad(model, loss_fn, clip_norm=clip_norm, method=method, allow_unused=True)
        try:
            out = clipped(batch, mask)
        except REFUSALS:
            raise
        except Exception as error:
            if type(error) is not _own_error(batch):
                raise
            raise ValueError(f"The model itself raises {type(error).__name__}.") from error
    if any(p.grad is not None for p in model.parameters()):
        raise Wrong("a parameter has a gradient.")
    if not bool(out.norms.isfinite().all()) and (method == "non-private" or batch_name == "huge"):
        return  # in float32 there is no gradient
    bound = INF if method == "non-private" else clip_norm
    wanted, norms = _oracle(model, batch, mask, bound)
    for name, total in wanted.items():
        if not torch.isfinite(out.grads[name]).all() and bool(torch.isfinite(total).all()):
            raise Wrong(f"{name} is not finite.")
        scale = max(1e-30, float(total.abs().max()), min(bound, 1e30) if method != "non-private" else 0.0)
        if float((out.grads[name].double() - total).abs().nan_to_num(0.0).max()) > 2e-3 * scale:
            raise Wrong(f"{name} is {out.grads[name].flatten()[:3]} and should be {total.flatten()[:3]}.")
    finite = torch.isfinite(norms) & (norms < 1e18)
    if not torch.allclose(out.norms.double()[finite], norms[finite], rtol=2e-2, atol=1e-4):
        raise Wrong(f"norms are {out.norms} and should be {norms}.")


def _own_error(batch: Any) -> type[BaseException] | None:
    """What the model raises for a batch when nobody clips."""
    try:
        loss_fn(net(), batch).sum().backward()
    except Exception as error:
        return type(error)
    return None


def _batch(chance: random.Random) -> tuple[str, str, str, float]:
    return (
        chance.choice(list(BATCHES)),
        chance.choice(list(MASKS)) if chance.random() < 0.6 else "none",
        chance.choice(METHODS),
        chance.choice((1e-12, 1e-3, 0.5, 1.0, 1e6, 1e30)),
    )


def _options(chance: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {"clip_norm": 0.5}
    pools: dict[str, tuple[Any, ...]] = {
        "clip_norm": NUMBERS,
        "method": (*METHODS, "", "AUTO", None, 3, ["auto"], "O-flat", NAN),
        "memory_budget": NUMBERS,
        "routes": (
            None,
            {},
            {"*": "gram+contract"},
            {"*": "x"},
            {"*": None},
            {3: "gram+contract"},
            {"[": "gram+contract"},
            [("*", "gram+contract")],
            "gram+contract",
            3,
            {"linear.*": "materialise+reuse"},
        ),
        "allow_unused": (True, False, None, 0, "no"),
        "model": (None, 3, "model", net, nn.Linear, nn.Sequential(), torch.zeros(2)),
        "loss_fn": (
            None,
            3,
            "loss",
            lambda m, b: 3,
            lambda m, b: None,
            lambda m, b: m(b).sum(),
            lambda m, b: m(b),
            lambda m, b: m(b).mean(1).detach(),
            lambda m, b: m(b).mean(1)[:2],
            lambda m, b: m(b).mean(1).int(),
            lambda m, b: [m(b).mean(1)],
            lambda m, b: m(b).mean(1) * NAN,
        ),
    }
    for name in chance.sample(list(pools), chance.choice((1, 1, 2, 3))):
        given[name] = chance.choice(pools[name])
    return given


def _feed_options(given: dict[str, Any], scratch: Path) -> None:
    options = dict(given)
    model, loss = options.pop("model", None), options.pop("loss_fn", loss_fn)
    model = net() if "model" not in given else model
    options = {"allow_unused": True, **options}
    out = dpt.clipped_grad(model, loss, **options)(_row(0.5))
    if loss is loss_fn:
        bound = float(out.clip_norm)
        wanted, _ = _oracle(model, _row(0.5), None, bound)
        if any(not torch.allclose(out.grads[n].double(), g, atol=1e-4, rtol=1e-3) for n, g in wanted.items()):
            raise Wrong("the sum is wrong.")
    elif not all(bool(torch.isfinite(g).all()) for g in out.grads.values()):
        raise Wrong("the sum is not finite.")


def mechanism(**changes: Any) -> Mechanism:
    constants = {
        "noise_multiplier": 1.0,
        "clip_norm": 0.5,
        "sample_rate": 0.5,
        "steps": 2,
        "expected_batch_size": 8,
    }
    return Mechanism.constant(**(constants | {"delta": 1e-5} | changes))


def _clipped_sum() -> dpt.ClippedSum:
    return dpt.clipped_grad(net(), loss_fn, clip_norm=0.5, allow_unused=True, method="per-example")(_row(0.5))


def _privatized(chance: random.Random) -> dict[str, int]:
    return {
        name: chance.randrange(100) if chance.random() < 0.5 else 0
        for name in ("sum", "mechanism", "key", "donate")
    }


def _feed_privatized(given: dict[str, int], scratch: Path) -> None:
    good = _clipped_sum()
    other = dpt.ClippedSum({}, good.norms, good.losses, 0.5)
    unclipped = dpt.ClippedSum(good.grads, good.norms, good.losses, INF)
    pools: dict[str, tuple[Any, ...]] = {
        "sum": (good, other, unclipped, good.grads, None, 3, {}, good + good, list(good.grads.values())),
        "mechanism": (
            mechanism(),
            mechanism(clip_norm=1.0),
            mechanism(noise_multiplier=0.0),
            mechanism().step(0),
            None,
            3,
            "m",
            {},
            mechanism,
            mechanism().to_dict(),
            mechanism(clip_norm=0.5 + 1e-6),
        ),
        "key": (Key.from_seed(1), None, 3, "key", b"k" * 32, Key, [Key.from_seed(1)], torch.Generator()),
        "donate": (False, True),
    }
    chosen = {name: pool[given[name] % len(pool)] for name, pool in pools.items()}
    names = set(getattr(chosen["sum"], "grads", ()))
    gradient = dpt.privatize(chosen["sum"], chosen["mechanism"], chosen["key"], donate=chosen["donate"])
    if not all(bool(torch.isfinite(g).all()) for g in gradient.grads.values()):
        raise Wrong("the gradient is not finite.")
    if names != gradient.grads.keys() or not names:
        raise Wrong(f"{names} were privatized to {set(gradient.grads)}.")
    if float(gradient.spec.clip_norm) != 0.5:
        raise Wrong("the noise belongs to another clip norm.")


class Rows(torch.utils.data.Dataset):
    """A map-style data set of a stated length."""

    def __init__(self, size: Any = 16) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.linspace(-1, 1, 4) * (index + 1) / 16


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Rows())


def _trained(chance: random.Random) -> dict[str, int]:
    names = ("model", "optimizer", "dataset", "loss_fn", "mechanism", "physical_batch_size", "method", "key")
    given = dict.fromkeys(names, 0)
    for name in chance.sample(names, chance.choice((1, 1, 2))):
        given[name] = chance.randrange(1, 100)
    return given


def _feed_trained(given: dict[str, int], scratch: Path) -> None:
    model, used = net(), net()
    model.table.requires_grad_(False)
    used.linear.weight.grad = torch.zeros_like(used.linear.weight)
    sgd = torch.optim.SGD([*model.linear.parameters(), *model.norm.parameters()], lr=0.1)
    pools: dict[str, tuple[Any, ...]] = {
        "model": (model, None, 3, "model", nn.Sequential(), used, net, torch.zeros(3)),
        "optimizer": (
            sgd,
            None,
            3,
            torch.optim.SGD(net().parameters(), lr=0.1),
            torch.optim.LBFGS(model.parameters()),
            torch.optim.SGD([model.linear.weight], lr=0.1),
            torch.optim.SGD,
            "sgd",
            object(),
        ),
        "dataset": (
            Rows(),
            None,
            3,
            "data",
            [],
            Rows(0),
            Rows(17),
            Rows(32),
            Rows(15),
            Stream(),
            _row(0.5),
            {"x": _row(0.5)},
            [_row(0.5)[0]] * 16,
            range(5),
        ),
        "loss_fn": (_loss, None, 3, "loss", lambda m, b: 3, lambda m, b: m(b).sum()),
        "mechanism": (
            mechanism(),
            None,
            3,
            "m",
            {},
            mechanism().to_dict(),
            mechanism().step(0),
            mechanism,
            mechanism(expected_batch_size=9),
            mechanism(sample_rate=1.0, expected_batch_size=16),
            mechanism(noise_multiplier=0.0),
            mechanism(delta=None),
        ),
        "physical_batch_size": (4, *NUMBERS),
        "method": ("per-example", "auto", "x", None, 3, "ghost"),
        "key": (Key.from_seed(1), None, 3, "key", b"k" * 32, Key, 0, False),
    }
    chosen = {name: pool[given[name] % len(pool)] for name, pool in pools.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        private = dpt.make_private(**chosen)
        steps = list(private.steps())
    except REFUSALS:
        if any(not torch.equal(before[n], p) for n, p in model.named_parameters()):
            raise Wrong("it was refused after a step had been taken.") from None
        raise
    if len(steps) != 2 or not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise Wrong(f"{len(steps)} steps were taken.")


def _loss(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch), torch.zeros(len(batch), 3), reduction="none").mean(1)


def _called(chance: random.Random) -> tuple[str, dict[str, Any]]:
    base: dict[str, Any] = {"clip_norm": 1.0, "sample_rate": 0.25, "expected_batch_size": 8, "delta": 1e-5}
    name = chance.choice(("constant", "constant", "constant", "calibrate", "calibrate_steps"))
    base |= {
        "constant": {"noise_multiplier": 2.0, "steps": 3},
        "calibrate": {"epsilon": 3.0, "steps": 3, "accountant": "rdp"},
        "calibrate_steps": {"epsilon": 3.0, "noise_multiplier": 3.0, "accountant": "rdp"},
    }[name]
    names = [*base, "sampler", "neighbours", "dataset_size", "max_batch_size"]
    for changed in chance.sample(names, chance.choice((1, 1, 2, 3))):
        texts = (
            "poisson",
            "truncated-poisson",
            "fixed-size",
            "shuffle",
            "shuffle-without-amplification",
            "replace-one",
            "add-or-remove-one",
            "replace-special",
            "rdp",
            "pld",
            "x",
            3,
            None,
        )
        pool = texts if changed in ("sampler", "neighbours", "accountant") else NUMBERS
        base[changed] = chance.choice(pool)
    return name, base


def _feed_called(given: tuple[str, dict[str, Any]], scratch: Path) -> None:
    name, arguments = given
    with np.errstate(all="ignore"):
        made = getattr(Mechanism, name)(**arguments)
    if Mechanism.from_dict(made.to_dict()) != made:
        raise Wrong("it does not survive a file.")
    spec = made.step(0)
    numbers = (
        spec.noise_multiplier,
        spec.sensitivity,
        spec.sample_rate,
        spec.expected_batch_size,
        spec.noise_stddev,
    )
    if (
        not all(type(n) is float and math.isfinite(n) and n >= 0 for n in numbers)
        or type(made.steps) is not int
    ):
        raise Wrong(f"{numbers} are no quantities.")
    if name != "constant" and made.delta is not None:
        spent = made.epsilon(accountant=arguments["accountant"])
        if not spent <= float(arguments["epsilon"]) * (1 + 1e-9):
            raise Wrong(f"epsilon is {spent}, more than {arguments['epsilon']}.")


def _asked(chance: random.Random) -> tuple[str, tuple[Any, ...]]:
    question = chance.choice(("epsilon", "step", "epsilon_curve", "event", "epsilon_so_far"))
    return question, tuple(chance.choice(NUMBERS) for _ in range(chance.choice((1, 1, 2))))


_MECHANISM = mechanism(noise_multiplier=4.0)


def _feed_asked(given: tuple[str, tuple[Any, ...]], scratch: Path) -> None:
    question, arguments = given
    names = {
        "epsilon": ("delta", "steps"),
        "step": ("index",),
        "epsilon_curve": ("points", "delta"),
        "event": ("steps",),
        "epsilon_so_far": ("steps", "delta"),
    }[question]
    chosen = dict(zip(names, arguments))
    if question in ("epsilon", "epsilon_curve"):
        chosen["accountant"] = "rdp"
    found = getattr(_MECHANISM, question)(**chosen)
    values = [found] if question.startswith("epsilon") and not isinstance(found, list) else []
    values += [e for _, e in found] if isinstance(found, list) else []
    if not all(isinstance(v, float) and v >= 0 for v in values):
        raise Wrong(f"epsilon is {values}.")


TARGETS: tuple[Target, ...] = (
    Target("clipped-grad-batches", _batch, _feed_batch, REFUSALS, 20),
    Target("clipped-grad-options", _options, _feed_options, REFUSALS, 20),
    Target("privatize", _privatized, _feed_privatized, REFUSALS, 200),
    Target("make-private", _trained, _feed_trained, REFUSALS, 20),
    Target("mechanism-makers", _called, _feed_called, REFUSALS, 100),
    Target("mechanism-questions", _asked, _feed_asked, (*REFUSALS, IndexError), 300),
)
