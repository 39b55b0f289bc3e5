"""Small models that every rank and the judge build alike, and what they do with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import dptrain.torch as dpt
from dptrain.core.clip_rules import GroupWise, Quantile
from dptrain.core.correlated import correlated
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.methods import NAMES
from dptrain.core.sampling import physical_batches, share
from dptrain.core.spec import Sampling, StepSpec
from dptrain.torch.reduction import Reductions

EXAMPLES, PHYSICAL = 12, 2
#: sizes of logical batches: unequal shares, ranks without examples, nobody with any
SAMPLES = ([0, 2, 3, 5, 7, 8, 11], [4], [])
#: of ours, whose state two ranks share out
OPTIMIZERS = ("accumulated-momentum", "running-momentum", "adam-bc")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


class Tied(nn.Module):
    """Embedding, convolution, norm, biases, a sum of matrices, a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.norm = nn.LayerNorm(6)
        self.base, self.low, self.high = nn.Linear(6, 300), nn.Linear(6, 2), nn.Linear(2, 300, bias=False)
        self.back = nn.Linear(300, 6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        weight = self.base.weight + self.high.weight @ self.low.weight
        x = self.back(torch.tanh(F.linear(self.norm(x), weight, self.base.bias)))
        return F.linear(x + self.low(x).sum(-1, keepdim=True), self.embed.weight)


def build(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """The model, and the examples ``[N, T]``."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Tied().to(dtype), torch.randint(11, (EXAMPLES, 5))


def losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


@dataclass(frozen=True)
class Case:
    method: str
    dtype: str
    hardened: bool = False
    #: clipped in two groups, which run through layers
    grouped: bool = False


CASES = [
    *(Case(name, "float64") for name in NAMES),
    *(Case(name, "float32") for name in ("auto", "ghost")),
    Case("bk-ghost", "float64", grouped=True),
    Case("per-example", "float32", hardened=True),
]
GROUPS = GroupWise((0.18, 0.24), ("weight", ""))  # of sensitivity 0.3
#: four processes share few cores
FEWER = [*CASES[1::2], CASES[-1]]


def mechanism(noise_multiplier: float, hardened: bool = False) -> Mechanism:
    made = Mechanism.constant(
        noise_multiplier=noise_multiplier,
        clip_norm=0.3,
        sample_rate=0.5,
        steps=10,
        expected_batch_size=6,
        delta=1e-5,
    )
    return made.hardened() if hardened else made


def steps(case: Case, ranks: dpt.Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    """Of each sample: the mean without noise and the noisy mean, by what they are of."""
    model, data = build(DTYPES[case.dtype])
    laws = [mechanism(1.0, hardened=True)] if case.hardened else [mechanism(0.0), mechanism(1.0)]
    rule = GROUPS if case.grouped else 0.3
    options = {"clip_norm": rule, "method": case.method, "grid": laws[0].grid}
    clipped = dpt.clipped_grad(model, losses, **options, ranks=ranks)
    for number, sample in enumerate(SAMPLES):
        for law in laws:
            total = whole(clipped, data, np.array(sample, dtype=np.int64), ranks)
            for name, g in dpt.privatize(total, law, Key.from_seed(5)).grads.items():
                yield f"{case}, sample {number}, noise {law.noise_multiplier:g}: {name}", g


def whole(
    clipped: dpt.ClippedGrad, data: torch.Tensor, sample: np.ndarray, ranks: dpt.Ranks
) -> dpt.ClippedSum:
    """This rank's sum over its share of a logical batch."""
    total, pieces = None, list(physical_batches(share(sample, ranks.rank, ranks.size), PHYSICAL))
    for number, piece in enumerate(pieces, 1):
        rows, mask = torch.from_numpy(piece.indices), torch.from_numpy(piece.mask)
        total = clipped(data[rows], mask, total, last=number == len(pieces))
    # What is not private cannot be released: for once, its sum is passed off as clipped.
    return replace(total, clip_norm=0.3)


def quantile(steps: int = 10) -> Mechanism:
    """A clip norm that ends as another than it begins."""
    rule = Quantile(0.3, count_noise=2.0, quantile=0.9, learning_rate=0.5)
    return Mechanism(((StepSpec(rule, 1.0, Sampling("poisson", 0.5), 6), steps),), delta=1e-5)


def bands(steps: int = 10) -> Mechanism:
    """Correlated noise."""
    return correlated(
        bands=4,
        noise_multiplier=1.0,
        clip_norm=0.3,
        sample_rate=0.2,
        expected_batch_size=2.4,
        steps=steps,
        delta=1e-5,
    )


def train(
    ranks: dpt.Ranks,
    ledger: Ledger | None,
    make_optimizer: Callable[..., Any],
    law: Mechanism | None = None,
) -> dict[str, torch.Tensor]:
    """The weights after `make_private`'s steps; ranks begin with different ones, and rank 0's count."""
    model, data = build(torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * ranks.rank
    law = law or mechanism(1.0)
    training = dpt.make_private(
        model,
        make_optimizer(model.parameters()),
        TensorDataset(data),
        lambda model, batch: losses(model, batch[0]),
        law,
        physical_batch_size=PHYSICAL,
        method="bk-mixed-ghost",
        key=Key.from_seed(1 + ranks.rank),
        ledger=ledger,
        ranks=ranks,
    )
    for step in training.steps():
        assert step.epsilon == law.epsilon_so_far(step.number)
    assert training.taken == law.steps
    reached = {"clip norm": torch.tensor([training.clip_norm], dtype=torch.float64)}
    return reached | {name: p.detach().clone() for name, p in model.named_parameters()}


def otherwise(ranks: dpt.Ranks) -> dict[str, torch.Tensor]:
    """Sums that were added up by ``+``, privatized twice, while another was begun and not released."""
    model, data = build(torch.float64)
    clipped = dpt.clipped_grad(model, losses, clip_norm=0.3, method="bk-ghost", ranks=ranks)
    half = EXAMPLES // ranks.size
    mine = data[ranks.rank * half : (ranks.rank + 1) * half]
    other = clipped(mine)
    total = clipped(mine[:2]) + clipped(mine[2:])
    found = {}
    for turn in ("once", "twice"):
        gradient = dpt.privatize(total, mechanism(1.0), Key.from_seed(5))
        found |= {f"otherwise, {turn}: {name}": g for name, g in gradient.grads.items()}
    first = dpt.privatize(other, mechanism(1.0), Key.from_seed(5)).grads
    clipped(mine[:1])  # does not lie where a sum lies that was not given away
    gradient = dpt.privatize(other, mechanism(1.0), Key.from_seed(5), donate=True)
    assert all(torch.equal(first[name], g) for name, g in gradient.grads.items())
    found |= {f"otherwise, in one: {name}": g for name, g in gradient.grads.items()}
    if not ranks.alone:
        sent = clipped(mine, last=True)
        next(iter(sent.grads.values())).mul_(2)
        for changed in (sent, clipped(mine, last=True) + clipped(mine[:1])):
            try:
                dpt.privatize(changed, mechanism(1.0), Key.from_seed(5))
            except RuntimeError as error:
                assert "changed after it was sent" in str(error)
            else:
                raise AssertionError("a sum was released that is not the one that was sent")
    return found


def noise_of_nothing(ranks: dpt.Ranks) -> dict[str, torch.Tensor]:
    """The noisy mean of empty sums, large enough to be tested: all buckets, parts of parameters."""
    parameters = {"a": torch.zeros(700_001), "b": torch.zeros(3, 5), "c": torch.zeros(300_000)}
    total = Reductions(parameters, ranks).begin(0.3, None)
    return dpt.privatize(total, mechanism(1.0), Key.from_seed(9)).grads


def sent(ranks: dpt.Ranks, physical: int, last: bool) -> list[str]:
    """The collectives of one logical batch of so many physical ones, in their order among the batches."""
    model, data = build(torch.float32)
    clipped = dpt.clipped_grad(model, losses, clip_norm=0.3, method="bk-ghost", ranks=ranks)
    clipped(data[:2])  # what the first sum of all needs once
    calls: list[str] = []
    collectives = ("reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce", "broadcast", "all_gather")
    with contextlib.ExitStack() as patched:
        for name in collectives:
            real = getattr(dist, name)

            def noted(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
                calls.append(f"{name} {args[1].numel() if name.endswith('_tensor') else ''}")
                return real(*args, **options)

            patched.enter_context(patch.object(dist, name, noted))
        total = None
        for number in range(1, physical + 1):
            total = clipped(data[:2], None, total, last=last and number == physical)
            calls.append("batch")
        dpt.privatize(total, mechanism(1.0), Key.from_seed(9))
    return calls
