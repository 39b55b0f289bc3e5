"""How people write things, one idiom at a time: exact, or refused with a sentence that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dptrain.torch as dpt

from . import oracle
from .test_attacks import Model

METHODS = ["auto", "ghost"]
SIZE, LENGTH, WIDTH, WORDS = 5, 4, 6, 5

pytestmark = pytest.mark.filterwarnings(
    # of PyTorch's own, in what is deliberately old or odd here
    "ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    "ignore:torch.chain_matmul is deprecated:UserWarning",
    "ignore:There is a performance drop:UserWarning",
    "ignore:`torch.jit.script` is deprecated:FutureWarning",
)


def rows() -> dict[str, Tensor]:
    return {"x": torch.randn(SIZE, LENGTH, WIDTH, dtype=torch.float64)}


def words() -> dict[str, Tensor]:
    return {"x": torch.randint(WORDS, (SIZE, LENGTH))}


def packed() -> dict[str, Tensor]:
    return {"x": torch.randn(SIZE, LENGTH, WIDTH).double(), "n": torch.randint(1, LENGTH + 1, (SIZE,))}


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(batch["x"] if len(batch) == 1 else batch)
    out = out.reshape(len(out), -1)
    return out.sin().sum(1) + out.square().mean(1)


def build(function: Callable, parts: dict[str, Any]) -> nn.Module:
    """Parameters by their shapes, modules by what builds them."""
    torch.manual_seed(0)
    made = {name: torch.randn(part) if isinstance(part, tuple) else part() for name, part in parts.items()}
    return Model(function, **made).double()


def equals_single_examples(model, method: str, batches, loss=loss_fn) -> None:
    """For each batch: the data may route its rows elsewhere in the second."""
    _, norms = oracle.clipped_sum(model, loss, batches[0], 1.0)
    clipped = dpt.clipped_grad(model, loss, clip_norm=float(norms.median()), method=method)
    for batch in batches:
        expected, norms = oracle.clipped_sum(model, loss, batch, clipped.clip_norm)
        out = clipped(batch)
        torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)
        assert oracle.relative_error(out.grads, expected) < 1e-9
        again = clipped(batch, None, out)  # in place
        assert oracle.relative_error(again.grads, {name: 2 * g for name, g in expected.items()}) < 1e-9


# ------------------------------------------------------------------ single operations


def written(target: Tensor, index: Any, value: Tensor) -> Tensor:
    target[index] = value
    return target


def expanded(p: Tensor, x: Tensor, *shape: int) -> Tensor:
    return p.expand(len(x), *shape)


FIRST, SECOND = (slice(None), 0), (slice(None), 1)

#: by name: a function of (model, x), its parameters, and what the batch is
EXACT: dict[str, tuple[Callable, dict[str, Any], Callable[[], dict[str, Tensor]]]] = {
    # repeated and expanded values
    "tile with a keyword": (lambda s, x: x * torch.tile(s.p, dims=(2,)), {"p": (3,)}, rows),
    "tile as a method": (lambda s, x: x * s.p.tile((4, 2)), {"p": (3,)}, rows),
    "a view of a repetition": (lambda s, x: x * s.p.repeat(1, 2).view(-1), {"p": (1, 3)}, rows),
    "a repetition changed in place": (lambda s, x: x * s.p.repeat(4, 1).mul_(2.0), {"p": (1, 6)}, rows),
    "matmul with expanded rows": (lambda s, x: x @ s.p.expand(6, 2), {"p": (1, 2)}, rows),
    "matmul with expanded columns": (lambda s, x: x @ s.p.expand(6, 2), {"p": (6, 1)}, rows),
    "matmul with repeated rows": (lambda s, x: x @ s.p.repeat(6, 1), {"p": (1, 2)}, rows),
    # pointwise
    "masked_fill": (lambda s, x: x.masked_fill(x > 0, s.p), {"p": ()}, rows),
    "masked_fill_": (lambda s, x: x.clone().masked_fill_(x > 0, s.p), {"p": ()}, rows),
    "lerp": (lambda s, x: torch.lerp(x, s.p, s.q), {"p": (6,), "q": (6,)}, rows),
    "where": (lambda s, x: torch.where(x > 0, s.p, x * s.q), {"p": (6,), "q": (6,)}, rows),
    "a mask token": (lambda s, x: torch.where(x[..., :1] > 0, s.p, x), {"p": (1, 1, 6)}, rows),
    "addcmul": (lambda s, x: torch.addcmul(x, x, s.p, value=2.0), {"p": (6,)}, rows),
    "addcdiv": (lambda s, x: torch.addcdiv(x, x, s.p.abs() + 1), {"p": (6,)}, rows),
    "maximum and minimum": (lambda s, x: torch.maximum(x, s.p).minimum(s.q), {"p": (6,), "q": (6,)}, rows),
    "clamp": (lambda s, x: torch.clamp(x, min=s.p, max=s.p + 1), {"p": (6,)}, rows),
    "power": (lambda s, x: x.abs().clamp(min=1e-6).pow(s.p), {"p": (1,)}, rows),
    "generalised mean": (
        lambda s, x: x.clamp(min=1e-6).pow(s.p).mean(1).pow(1.0 / s.p), {"p": (1,)}, rows,
    ),
    "softplus": (lambda s, x: F.softplus(x + s.p, beta=2), {"p": (6,)}, rows),
    "glu": (lambda s, x: F.glu(torch.cat([x, s.p.expand_as(x)], -1)), {"p": (6,)}, rows),
    "logaddexp": (lambda s, x: torch.logaddexp(x, s.p), {"p": (6,)}, rows),
    "__iadd__": (lambda s, x: x.clone().__iadd__(s.p), {"p": (6,)}, rows),
    "a constant by way of numpy": (
        lambda s, x: x * s.p * torch.from_numpy((x.detach().numpy() > 0).astype("float64")),
        {"p": (6,)}, rows,
    ),
    # values computed from parameters
    "cumulated softmax": (lambda s, x: x * s.p.cumsum(0).softmax(0), {"p": (6,)}, rows),
    "standardised": (lambda s, x: x * (s.p - s.p.mean()) / s.p.std(), {"p": (6,)}, rows),
    "padded": (lambda s, x: x + F.pad(s.p, (1, 2)), {"p": (3,)}, rows),
    "interpolated": (
        lambda s, x: x[..., :3] * F.interpolate(s.p, size=(4, 3), mode="bicubic")[0],
        {"p": (1, 1, 5, 5)}, rows,
    ),
    "a Kronecker product": (lambda s, x: x @ torch.kron(s.p, s.q), {"p": (2, 2), "q": (3, 3)}, rows),
    "a different row at each step": (
        lambda s, x: torch.stack([x[:, t] * s.p[t] for t in range(LENGTH)], 1), {"p": (4, 6)}, rows,
    ),
    # reading and writing
    "slices written": (lambda s, x: written(x.clone(), FIRST, s.p), {"p": (6,)}, rows),
    "a mask written": (lambda s, x: written(x.clone(), x > 0, s.p), {"p": ()}, rows),
    "copy_ into a slice": (
        lambda s, x: (y := x.clone(), y[:, 1].copy_(expanded(s.p, x, 6)))[0], {"p": (6,)}, rows,
    ),
    "index_fill": (lambda s, x: torch.index_fill(x, 1, torch.tensor([1]), 0.0) * s.p, {"p": (6,)}, rows),
    "index_add": (
        lambda s, x: x.index_add(1, torch.tensor([0, 0]), expanded(s.p, x, 2, 6)), {"p": (6,)}, rows,
    ),
    "index_copy": (
        lambda s, x: x.index_copy(1, torch.tensor([2]), expanded(s.p, x, 1, 6)),
        {"p": (6,)}, rows,
    ),
    "scatter_add": (
        lambda s, x: x.scatter_add(-1, torch.zeros_like(x, dtype=torch.int64), s.p.expand_as(x)),
        {"p": (6,)}, rows,
    ),
    "hstack": (lambda s, x: torch.hstack([expanded(s.p, x, -1, -1), x]), {"p": (1, 1, 6)}, rows),
    "column_stack": (
        lambda s, x: torch.column_stack([x.flatten(1), expanded(s.p, x, -1)]), {"p": (3,)}, rows,
    ),
    "split, scaled and joined": (
        lambda s, x: torch.cat([t.squeeze(1) * s.p for t in x.split(1, 1)], -1), {"p": (6,)}, rows,
    ),
    # tables
    "torch.embedding": (lambda s, x: torch.embedding(s.p, x), {"p": (5, 6)}, words),
    "a table with padding": (
        lambda s, x: s.e(x), {"e": lambda: nn.Embedding(5, 6, padding_idx=-4)}, words,
    ),
    "a table from its end": (lambda s, x: s.p[x - 5], {"p": (5, 6)}, words),
    "a table with sparse gradients": (
        lambda s, x: s.e(x), {"e": lambda: nn.Embedding(5, 6, sparse=True)}, words,
    ),
    "EmbeddingBag sum": (lambda s, x: s.e(x), {"e": lambda: nn.EmbeddingBag(5, 6, mode="sum")}, words),
    "EmbeddingBag mean, padded": (
        lambda s, x: s.e(x), {"e": lambda: nn.EmbeddingBag(5, 6, mode="mean", padding_idx=1)}, words,
    ),
    "EmbeddingBag max": (lambda s, x: s.e(x), {"e": lambda: nn.EmbeddingBag(5, 6, mode="max")}, words),
    "EmbeddingBag weighted": (
        lambda s, x: s.e(x, per_sample_weights=s.w[x]),
        {"e": lambda: nn.EmbeddingBag(5, 6, mode="sum"), "w": (5,)}, words,
    ),
    "gather": (
        lambda s, x: expanded(s.p, x, 5, 6).gather(1, x.unsqueeze(-1).expand(-1, -1, 6)),
        {"p": (5, 6)}, words,
    ),
    "take_along_dim": (lambda s, x: torch.take_along_dim(expanded(s.p, x, -1), x, 1), {"p": (5,)}, words),
    "one-hot": (lambda s, x: F.one_hot(x, 5).double() @ s.p, {"p": (5, 6)}, words),
    # linear maps
    "tensordot": (lambda s, x: torch.tensordot(x, s.p, dims=([2], [0])), {"p": (6, 3)}, rows),
    "tensordot over two axes": (lambda s, x: torch.tensordot(x, s.p, 2), {"p": (4, 6, 3)}, rows),
    "inner": (lambda s, x: torch.inner(x, s.p), {"p": (3, 6)}, rows),
    "matrix by vector": (lambda s, x: x @ s.p, {"p": (6,)}, rows),
    "one dot product each": (
        lambda s, x: torch.stack([torch.dot(row.flatten(), s.p) for row in x]), {"p": (24,)}, rows,
    ),
    "multi_dot": (
        lambda s, x: torch.linalg.multi_dot([x.flatten(0, 1), s.p, s.q]).unflatten(0, (-1, LENGTH)),
        {"p": (6, 5), "q": (5, 3)}, rows,
    ),
    "baddbmm of expanded values": (
        lambda s, x: torch.baddbmm(expanded(s.p, x, 4, 3), x, expanded(s.q, x, 6, 3)),
        {"p": (1, 3), "q": (6, 3)}, rows,
    ),
    "addmm with factors": (
        lambda s, x: torch.addmm(s.p, x.flatten(1), s.q, beta=0.5, alpha=2), {"p": (3,), "q": (24, 3)}, rows,
    ),
    "addmm with a number": (
        lambda s, x: torch.addmm(s.p, x.flatten(1), s.q), {"p": (), "q": (24, 3)}, rows,
    ),
    "einsum of three": (
        lambda s, x: torch.einsum("btd,d,de->bte", x, s.p, s.q), {"p": (6,), "q": (6, 6)}, rows,
    ),
    "einsum with a diagonal": (lambda s, x: torch.einsum("btd,dd->bt", x, s.p), {"p": (6, 6)}, rows),
    "bilinear": (lambda s, x: s.b(x, x), {"b": lambda: nn.Bilinear(6, 6, 4)}, rows),
    "solve": (lambda s, x: torch.linalg.solve(s.p + 6 * torch.eye(6), x.mT), {"p": (6, 6)}, rows),
    "a map and then a gate": (lambda s, x: F.linear(x, s.p)[..., None] * s.q, {"p": (3, 6), "q": (2,)}, rows),
    # distances and similarities
    "cdist": (lambda s, x: torch.cdist(x, s.q), {"q": (5, 6)}, rows),
    "cdist in a checkpoint": (
        lambda s, x: checkpoint(lambda y: torch.cdist(y, s.q), x, use_reentrant=False), {"q": (5, 6)}, rows,
    ),
    "a bucket and a distance in a checkpoint": (
        lambda s, x: checkpoint(
            lambda y: torch.logsumexp(
                torch.bucketize(y, y.new_tensor([0.0, 1.0])).to(y) * s.p + torch.cdist(y, s.q), -1
            ),
            x,
            use_reentrant=False,
        ),
        {"p": (6,), "q": (6, 6)}, rows,
    ),
    "cosine similarity": (
        lambda s, x: F.cosine_similarity(x.unsqueeze(2), s.p, dim=-1), {"p": (5, 6)}, rows,
    ),
    "normalised prototypes": (
        lambda s, x: F.normalize(x, dim=-1) @ F.normalize(s.p, dim=-1).T * s.t.exp(),
        {"p": (5, 6), "t": ()}, rows,
    ),
    # convolutions and images
    "GroupNorm of vectors": (lambda s, x: s.g(x.flatten(1)), {"g": lambda: nn.GroupNorm(3, 24)}, rows),
    "RMSNorm": (lambda s, x: s.r(x), {"r": lambda: nn.RMSNorm(6)}, rows),
    "grouped transposed convolution": (
        lambda s, x: s.c(x), {"c": lambda: nn.ConvTranspose1d(4, 4, 3, groups=2)}, rows,
    ),
    **{
        f"convolution, {mode} padding": (
            lambda s, x: s.c(x),
            {"c": lambda mode=mode: nn.Conv1d(4, 4, 3, 2, padding=1, padding_mode=mode)},
            rows,
        )
        for mode in ("reflect", "replicate", "circular")
    },
    "unfold and fold": (
        lambda s, x: F.fold(
            F.unfold(x.unsqueeze(1), 3, padding=1).mul(s.p[:, None]), (LENGTH, WIDTH), 3, padding=1
        ),
        {"p": (9,)}, rows,
    ),
    "grid_sample": (
        lambda s, x: F.grid_sample(
            expanded(s.p, x, 1, 5, 5), x[..., :2].unsqueeze(1).tanh(), align_corners=False
        ),
        {"p": (1, 1, 5, 5)}, rows,
    ),
    "convolution made for each example": (
        lambda s, x: F.conv1d(
            x.reshape(1, -1, 6), ((x.mean(2) @ s.m)[:, :, None] * s.p).reshape(-1, 1, 3), groups=len(x) * 4
        ).reshape(len(x), 4, -1),
        {"m": (4, 4), "p": (1, 4, 3)}, rows,
    ),
    "a mixture of weights for each example": (
        lambda s, x: torch.bmm(x, (x.mean(1) @ s.r).softmax(-1).matmul(s.w.flatten(1)).view(-1, 6, 3)),
        {"r": (6, 4), "w": (4, 6, 3)}, rows,
    ),
    "experts in one einsum": (
        lambda s, x: torch.einsum("bte,btd,edf->btf", (x @ s.r).softmax(-1), x, s.w),
        {"r": (6, 4), "w": (4, 6, 3)}, rows,
    ),
    # complex numbers
    "a filter of frequencies": (
        lambda s, x: torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(s.p), n=6),
        {"p": (4, 2)}, rows,
    ),
    "a filter of frequencies on two axes": (
        lambda s, x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(s.p), s=(4, 6)),
        {"p": (4, 4, 2)}, rows,
    ),
    "complex product": (
        lambda s, x: torch.view_as_real(
            torch.view_as_complex(x.reshape(-1, 4, 3, 2).contiguous()) * torch.view_as_complex(s.p)
        ),
        {"p": (4, 3, 2)}, rows,
    ),
    # attention
    "attention with a mask of parameters": (
        lambda s, x: F.scaled_dot_product_attention(x, x, x, attn_mask=s.p), {"p": (4, 4)}, rows,
    ),
    "attention of other widths": (
        lambda s, x: s.a(x, x[..., :3], x[..., :2])[0],
        {"a": lambda: nn.MultiheadAttention(6, 2, batch_first=True, kdim=3, vdim=2, add_bias_kv=True)}, rows,
    ),
    "encoder layer": (
        lambda s, x: s.t(x),
        {"t": lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)}, rows,
    ),
    "decoder layer": (
        lambda s, x: s.t(x, x),
        {"t": lambda: nn.TransformerDecoderLayer(6, 2, 12, dropout=0.0, batch_first=True)}, rows,
    ),
    # reparametrised layers
    "weight norm": (
        lambda s, x: s.l(x), {"l": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))}, rows,
    ),
    "weight norm, the older": (
        lambda s, x: s.l(x), {"l": lambda: nn.utils.weight_norm(nn.Linear(6, 3))}, rows,
    ),
    "spectral norm": (
        lambda s, x: s.l(x),
        {"l": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)).eval()}, rows,
    ),
    "orthogonal": (
        lambda s, x: s.l(x), {"l": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 3))}, rows,
    ),
    # losses
    "connectionist temporal classification": (
        lambda s, x: F.ctc_loss(
            (x.transpose(0, 1) @ s.p).log_softmax(-1),
            torch.ones(len(x), 2, dtype=torch.int64),
            torch.full((len(x),), LENGTH),
            torch.full((len(x),), 2),
            reduction="none",
        ),
        {"p": (6, 3)}, rows,
    ),
    "adaptive softmax": (
        lambda s, x: s.a.log_prob(x.flatten(0, 1)).unflatten(0, (-1, LENGTH)),
        {"a": lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 10, [3, 6], div_value=1.0)}, rows,
    ),
}  # fmt: skip

#: by name: the same, and a word of the sentence that says why
REFUSED: dict[str, tuple[Callable, dict[str, Any], Callable[[], dict[str, Tensor]], str]] = {
    "a weight from the mean of the batch": (
        lambda s, x: F.group_norm(x.flatten(1), 3, x.mean((0,))[0].repeat(4) * 0 + s.p, None),
        {"p": (24,)}, rows, "mix",
    ),
    "an operation that vmap cannot do": (
        lambda s, x: torch.chain_matmul(x.flatten(0, 1), s.p, s.q).unflatten(0, (-1, LENGTH)),
        {"p": (6, 5), "q": (5, 3)}, rows, "chain_matmul",
    ),
    "vmap": (lambda s, x: torch.func.vmap(lambda row: row @ s.p)(x), {"p": (6, 3)}, rows, "vmap"),
    "a forward derivative": (
        lambda s, x: torch.func.jvp(lambda row: (row @ s.p).tanh(), (x,), (torch.ones_like(x),))[1],
        {"p": (6, 3)}, rows, "jvp",
    ),
    "an embedding that renormalises": (
        lambda s, x: s.e(x), {"e": lambda: nn.Embedding(5, 6, max_norm=1.0)}, words, "max_norm",
    ),
    "clusters that no target is in": (
        lambda s, x: s.a(x[:, 0], (x[:, 0, 0] > 0).long() * 7).output,
        {"a": lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 10, [3, 6], div_value=1.0)}, rows, "no use",
    ),
    "data added to a parameter in place": (
        lambda s, x: expanded(s.p, x, 4, 6).clone().__iadd__(x), {"p": (6,)}, rows, "in place",
    ),
    "data written into parameters": (
        lambda s, x: written(expanded(s.p, x, 4, 6).clone(), (slice(None), slice(0, 2)), x[:, :2]),
        {"p": (6,)}, rows, "write the data first",
    ),
    "parameters and then data written into zeros": (
        lambda s, x: written(written(x.new_zeros(x.shape), FIRST, s.p), SECOND, x[:, 1]),
        {"p": (6,)}, rows, "write the data first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EXACT)
def test_exact(name, method):
    function, parts, batch = EXACT[name]
    equals_single_examples(build(function, parts), method, [batch(), batch()])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, parts, batch, word = REFUSED[name]
    with pytest.raises(dpt.Refused, match=word):
        dpt.clipped_grad(build(function, parts), loss_fn, clip_norm=1.0)(batch())


# ------------------------------------------------------------------ recurrent layers


def whole(s, x: Tensor) -> Tensor:
    """All outputs and the last states of a padded batch."""
    y, last = s.r(x if s.r.batch_first else x.transpose(0, 1))
    last = last if isinstance(last, tuple) else (last,)
    y = y if s.r.batch_first else y.transpose(0, 1)
    return torch.cat([y.flatten(1), *(h.transpose(0, 1).flatten(1) for h in last)], 1)


def sequence(s, batch: dict[str, Tensor]) -> Tensor:
    """The first outputs and the last states of sequences of unequal length."""
    y = nn.utils.rnn.pack_padded_sequence(
        batch["x"] * s.p, batch["n"], batch_first=True, enforce_sorted=False
    )
    y, last = s.r(y)
    last = last[0] if isinstance(last, tuple) else last
    y, _ = nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
    return torch.cat([y[:, 0], *last], 1)


def steps(s, x: Tensor) -> Tensor:
    state = None
    for t in range(LENGTH):
        state = s.r(x[:, t], state)
    return torch.cat(state, 1) if isinstance(state, tuple) else state


RECURRENT: dict[str, tuple[Callable, Callable[[], nn.Module]]] = {
    "LSTM": (whole, lambda: nn.LSTM(6, 5, batch_first=True)),
    "LSTM, two layers both ways": (whole, lambda: nn.LSTM(6, 5, 2, bidirectional=True)),
    "LSTM, projected": (whole, lambda: nn.LSTM(6, 5, 2, proj_size=3, bidirectional=True, bias=False)),
    "GRU": (whole, lambda: nn.GRU(6, 5, 2, batch_first=True, bidirectional=True)),
    "RNN": (whole, lambda: nn.RNN(6, 5, 2, nonlinearity="relu", batch_first=True)),
    "LSTMCell": (steps, lambda: nn.LSTMCell(6, 5)),
    "GRUCell": (steps, lambda: nn.GRUCell(6, 5)),
    "RNNCell": (steps, lambda: nn.RNNCell(6, 5)),
    "LSTM, packed": (sequence, lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)),
    "GRU, packed": (sequence, lambda: nn.GRU(6, 5, batch_first=True, bidirectional=True)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name, method):
    function, layer = RECURRENT[name]
    batch = packed if function is sequence else rows
    model = build(function, {"r": layer} | ({"p": (6,)} if function is sequence else {}))
    equals_single_examples(model, method, [batch(), batch()])


@pytest.mark.parametrize("method", METHODS)
def test_packed_sequences_that_are_all_of_one_length_at_first(method):
    """In the first batch row r is that of example r % B, in the second, of as many rows, it is not."""
    model = build(sequence, {"r": lambda: nn.GRU(6, 5, batch_first=True), "p": (6,)})
    first, second = packed(), packed()
    first["n"], second["n"] = torch.full((SIZE,), 2), torch.tensor([1, 4, 2, 1, 2])
    equals_single_examples(model, method, [first, second])


# ------------------------------------------------------------------ rows that the data order


def by_length(s, batch: dict[str, Tensor]) -> Tensor:
    """Longest first, as packed sequences are often prepared, and back again."""
    h = s.embed(batch["x"]).tanh()
    order = batch["n"].argsort(descending=True, stable=True)
    return s.layer(h[order])[order.argsort()]


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_sorted_by_what_was_alike_at_first(method):
    """Exact or refused: in the first batch nothing moves, in the second it does."""
    model = build(by_length, {"embed": lambda: nn.Linear(6, 4), "layer": lambda: nn.Linear(4, 2)})
    first, second = packed(), packed()
    first["n"], second["n"] = torch.full((SIZE,), 2), torch.tensor([1, 4, 2, 1, 3])
    try:
        equals_single_examples(model, method, [first, second])
    except dpt.Refused as refusal:
        assert "\n" not in str(refusal)


def rarely_active(s, x: Tensor) -> Tensor:
    """Sequence first and folded, with units that hardly any row moves."""
    y = torch.relu(x.transpose(0, 1).flatten(0, 1) @ s.w.detach() + s.b - 5)
    return y.unflatten(0, (x.shape[1], -1)).sum(0) + s.c


@pytest.mark.parametrize("seed", range(4))
def test_few_active_rows_do_not_tell_where_the_examples_lie(seed):
    """Exact or refused: what the few that were seen allow is not yet what holds."""
    model = build(rarely_active, {"w": (6, 2), "b": (2,), "c": (2,)})
    model.w.requires_grad_(False)
    torch.manual_seed(seed)
    try:
        equals_single_examples(model, "auto", [rows() for _ in range(4)])
    except dpt.Refused as refusal:
        assert "\n" not in str(refusal)


# ------------------------------------------------------------------ mixtures of experts


class Experts(nn.Module):
    """Two of four experts for each of the rows; those that none was sent to are passed over, or not."""

    def __init__(self, passed_over: bool, inner: int = 12):
        super().__init__()
        self.passed_over = passed_over
        self.embed, self.router, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, inner), nn.GELU(), nn.Linear(inner, 8)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(0, 1)
        weights, chosen = self.router(h).softmax(-1).topk(2)
        out = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == number)
            if self.passed_over and len(row) == 0:
                continue
            out.index_add_(0, row, expert(h[row]) * weights[row, rank, None])
        return self.head((h + out).unflatten(0, x.shape[:2]).mean(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("passed_over", [False, True])
def test_experts(passed_over, method):
    torch.manual_seed(0)
    equals_single_examples(Experts(passed_over).double(), method, [rows(), rows(), rows()])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [2, 3])
def test_experts_without_a_row(width, method):
    """An axis of the probe's own sizes in a gradient of no rows."""
    torch.manual_seed(0)
    model = Experts(False, inner=width).double()
    with torch.no_grad():
        model.router.bias.copy_(torch.tensor([9.0, 9.0, -9.0, 0.0]))
    batch = rows()

    def loss(model, batch):
        return loss_fn(model, batch) + sum(p.sum() for p in model.experts[2].parameters()) * 0

    _, norms = oracle.clipped_sum(model, loss, batch, 1.0)
    out = dpt.clipped_grad(model, loss, clip_norm=float(norms.median()), method=method, allow_unused=True)(
        batch
    )
    torch.testing.assert_close(out.norms, norms, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("experts, implementation", [(6, "eager"), (3, "batched_mm")])
def test_mixtral(experts, implementation, method):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            num_local_experts=experts,
            num_experts_per_tok=2,
            experts_implementation=implementation,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=12,
            vocab_size=50,
            max_position_embeddings=16,
        )
    )

    def loss(model, batch):
        ids = batch["ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").mean(1)

    batches = [{"ids": torch.randint(3, 50, (SIZE, 7))} for _ in range(2)]
    equals_single_examples(model.double(), method, batches, loss)
