"""A small model for ``fully_shard``, and the steps that one process and several sharded ones take with it."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import dptrain.torch as dpt
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.mechanism import Mechanism
from dptrain.core.methods import NAMES
from dptrain.core.sampling import physical_batch_count, physical_batches, share
from tests.distributed.scenes import DTYPES, GROUPS, bands, losses, mechanism, quantile

EXAMPLES, PHYSICAL, CLIP_NORM, BLOCKS = 12, 3, 0.3, 2
#: logical batches: unequal shares, ranks without examples, nobody with any
SAMPLES = ([0, 2, 3, 5, 7, 8, 11], [4], [])


class Attention(nn.Module):
    """A block as transformers have it; 7 and 1 rows divide by no number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 6)
        self.scale = nn.Parameter(torch.full((1, 6), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out((q @ k.mT / 3).softmax(-1) @ v)
        return x + self.scale * self.down(torch.tanh(self.up(self.norm2(x))))


class Made(nn.Module):
    """Values made of parameters: a sum of matrices with a frozen one, a standardised convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.low, self.high = (
            nn.Linear(6, 6),
            nn.Linear(6, 2, bias=False),
            nn.Linear(2, 6, bias=False),
        )
        self.magnitude = nn.Parameter(torch.rand(6, 1) + 0.5)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.base.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.magnitude * (self.base.weight + self.high.weight @ self.low.weight)
        x = x + F.linear(x, weight, self.base.bias)
        flat = self.conv.weight.reshape(1, 6, -1)
        kernel = F.batch_norm(flat, None, None, training=True, eps=1e-3).reshape_as(self.conv.weight)
        return x + F.conv1d(x.mT, kernel, self.conv.bias, padding=1).mT


class Net(nn.Module):
    """Embeddings tied to the head in the root, and two units."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 6), nn.Parameter(torch.randn(4, 6))
        self.blocks = nn.ModuleList([Made(), Attention()])
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    """The model, and the examples ``[N, T]``."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net().to(dtype), torch.randint(11, (EXAMPLES, 5))


def sharded(model: nn.Module, mesh: Any) -> nn.Module:
    """The model with its blocks and the rest as units."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@dataclass(frozen=True)
class Case:
    method: str
    dtype: str = "float64"
    grouped: bool = False


QUICK = [
    *map(Case, NAMES),
    Case("auto", grouped=True),
    Case("ghost", grouped=True),
    Case("auto", "float32"),
    Case("ghost", "float32"),
]
ALL = [Case(method, dtype) for method in NAMES for dtype in DTYPES]


def steps(case: Case, rank: int = 0, ranks: int = 1, mesh: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
    """What a training comes to: the sums of each logical batch, and the weights after noisy steps of Adam."""
    model, data = build(DTYPES[case.dtype])
    if mesh is not None:
        model = sharded(model, mesh)
    rule = GROUPS if case.grouped else CLIP_NORM
    clipped = dpt.clipped_grad(model, losses, clip_norm=rule, method=case.method, ranks=dpt.Ranks())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number, sample in enumerate(SAMPLES):
        total = logical(clipped, data, sample, rank, ranks)
        for name, g in total.grads.items():
            yield f"{case}, sample {number}: sum of {name}", whole(g)
        # what is not private cannot be released: for once, its sum is passed off as clipped
        released = replace(total, clip_norm=CLIP_NORM)
        gradient = dpt.privatize(released, mechanism(1.0), Key.from_seed(5).child(number), donate=number == 1)
        dpt.apply(optimizer, model, gradient)
    for name, p in model.named_parameters():
        yield f"{case}: weights of {name}", whole(p.detach())


def trained(mesh: Any = None, ledger: Ledger | None = None) -> dict[str, torch.Tensor]:
    """The weights after `make_private` by several mechanisms, by name."""
    found = _trained(mechanism(1.0), mesh, ledger)
    for law in (quantile(3), bands(3)):
        found |= {f"{law.describe()['clip rule']}, {n}": p for n, p in _trained(law, mesh, None).items()}
    return found


def _trained(law: Mechanism, mesh: Any, ledger: Ledger | None) -> dict[str, torch.Tensor]:
    model, data = build(torch.float64)
    if mesh is not None:
        model = sharded(model, mesh)
    private = dpt.make_private(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        TensorDataset(data),
        lambda model, batch: losses(model, batch[0]),
        law,
        physical_batch_size=2,
        method="bk-mixed-ghost",
        key=Key.from_seed(2),
        ledger=ledger,
        ranks=dpt.Ranks() if mesh is None else None,
    )
    assert len(list(private.steps())) == private.mechanism.steps
    return {f"trained: {name}": whole(p.detach()) for name, p in model.named_parameters()}


def logical(clipped: dpt.ClippedGrad, data: torch.Tensor, sample: list[int], rank: int, ranks: int):
    """This rank's part in the sum over a logical batch."""
    total, count = None, physical_batch_count(len(sample), PHYSICAL, ranks)
    for piece in physical_batches(share(np.array(sample), rank, ranks), PHYSICAL, count=count):
        rows, mask = torch.from_numpy(piece.indices), torch.from_numpy(piece.mask)
        tokens = torch.where(mask[:, None], data[rows], 99)  # no token: masked rows hold anything
        total = clipped(tokens, mask, total)
    return total


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All rows of a tensor that may be sharded. Called by all ranks."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


#: what is counted, by the names that versions of torch.distributed have for it
COLLECTIVES = {
    "gathers": ("all_gather_into_tensor", "all_gather_single"),
    "reduce-scatters": ("reduce_scatter_tensor", "reduce_scatter_single"),
    "agreements": ("all_reduce",),
    "others": ("broadcast", "all_gather", "reduce_scatter", "all_to_all_single"),
}


#: by method: gathers, reduce-scatters and agreements of a physical batch for U blocks and the root
EXPECTED = {
    "auto": (2 * BLOCKS + 1, BLOCKS + 1, 2, 0),
    "ghost": (3 * BLOCKS + 2, BLOCKS + 1, 2, 0),
    "non-private": (2 * BLOCKS + 1, BLOCKS + 1, 2, 0),
    "per-example-loop": (BLOCKS + 1, BLOCKS + 1, 2, 0),
}
#: of two batches, which ranks have examples
WHO = ("all ranks", "all but one")


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """The collectives that are called inside, by kind."""
    calls: Counter[str] = Counter()

    def counts(kind: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[kind] += 1
            return original(*args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for kind, names in COLLECTIVES.items():
            for name in filter(functools.partial(hasattr, dist), names):
                stack.enter_context(mock.patch.object(dist, name, counts(kind, getattr(dist, name))))
        yield calls


def counted(rank: int, mesh: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The collectives of a physical batch, and of one for which rank 0 has no examples."""
    for method in EXPECTED:
        model, data = build(torch.float64)
        model.blocks = nn.ModuleList(Attention().double() for _ in range(BLOCKS))
        clipped = dpt.clipped_grad(sharded(model, mesh), losses, clip_norm=CLIP_NORM, method=method)
        total = clipped(data[:PHYSICAL])
        clipped(data[:PHYSICAL], torch.full((PHYSICAL,), rank > 0), total)  # shares a row to stand in
        for number, present in enumerate((True, rank > 0)):
            with counting() as calls:
                clipped(data[:PHYSICAL], torch.full((PHYSICAL,), present), total)
            yield f"calls of {method}, {WHO[number]}", torch.tensor([calls[kind] for kind in COLLECTIVES])


class Switched(nn.Module):
    """A unit that does more for examples with a flag: by a product with it, or by a branch."""

    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.always, self.seldom, self.branch = nn.Linear(4, 4), nn.Linear(4, 4), branch

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.always(x))
        if self.branch:
            return self.seldom(y) if bool(flag.any()) else y
        return y + flag[:, None] * self.seldom(x)


class Flagged(nn.Module):
    def __init__(self, branch: bool) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Switched(branch)]), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](x, flag)).square().sum(1)


def flagged(branch: bool) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """The model, and a batch of whose rows the last two have the flag."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return Flagged(branch).double(), (torch.randn(4, 4).double(), torch.tensor([0, 0, 1, 1]))


def flagged_sum(branch: bool, rows: slice, mesh: Any = None) -> dict[str, torch.Tensor]:
    """The sum over these rows, of which the first may have no flag."""
    model, batch = flagged(branch)
    if mesh is not None:
        model = sharded(model, mesh)
    clipped = dpt.clipped_grad(
        model, lambda m, b: m(*b), clip_norm=1.0, allow_unused=branch, ranks=dpt.Ranks()
    )
    grads = clipped(tuple(t[rows] for t in batch)).grads
    return {name: whole(g) for name, g in grads.items()}


def in_trouble(rank: int, mesh: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Rank 1 has what rank 0, with whose rows the model is probed, has not."""
    rows = slice(2 * rank, 2 * rank + 2)
    for name, g in flagged_sum(False, rows, mesh).items():
        yield f"flagged {name}", g
    model, batch = flagged(True)
    clipped = dpt.clipped_grad(
        sharded(model, mesh), lambda m, b: m(*b), clip_norm=1.0, allow_unused=True, ranks=dpt.Ranks()
    )
    refused = 0
    try:
        clipped(tuple(t[rows] for t in batch))
    except dpt.Refused:
        refused = 1
    yield "refused", torch.tensor([refused])
    for name, g in clipped(tuple(t[:2] for t in batch)).grads.items():
        yield f"after refusal {name}", whole(g)


class Again(nn.Module):
    """A unit that is called twice, and recomputes what it has saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.blocks = nn.ModuleList([Recomputed()])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        block = self.blocks[0]
        return self.head(block(block(self.embed(tokens))))


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def again(method: str, ranks: int = 1, mesh: Any = None) -> dict[str, torch.Tensor]:
    """The sum over four examples."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model, data = Again().double(), torch.randint(11, (4, 5))
    rows = slice(None)
    if mesh is not None:
        model, rows = sharded(model, mesh), slice(mesh.get_local_rank(), None, ranks)
    clipped = dpt.clipped_grad(model, losses, clip_norm=CLIP_NORM, method=method, ranks=dpt.Ranks())
    return {f"{method} again: {name}": whole(g) for name, g in clipped(data[rows]).grads.items()}
