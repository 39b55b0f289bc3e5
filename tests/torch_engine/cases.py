"""Small models that between them meet every kind of use; all in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]
    #: a batch size that equals other sizes of the model, to confuse layouts
    size: int = 4
    #: whether torch.func can transform it
    transforms: bool = True


def classify(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def images(channels: int, side: int, classes: int = 4):
    def make(size: int):
        return {
            "x": torch.randn(size, channels, side, side, dtype=torch.float64),
            "y": torch.randint(classes, (size,)),
        }

    return make


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(16, 4),
        nn.Tanh(),
        nn.Linear(4, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 4),
    )


class ConvNet(nn.Module):
    """Grouped, dilated, strided, depthwise, 1x1, transposed, 'same' and circular convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding="same", groups=8)
        self.pointwise = nn.Conv2d(8, 4, 1)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.circular = nn.Conv2d(6, 4, (2, 3), stride=(2, 1), padding=1, padding_mode="circular")
        self.norm = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.prelu = nn.PReLU(4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        x = x + self.depthwise(F.silu(self.grouped(x)))
        x = self.up(self.pointwise(x))
        x = self.prelu(self.instance(self.norm(self.circular(x))))
        return self.head(x.mean((2, 3)))


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation by hand, as BiT-ResNet does it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        variance, mean = torch.var_mean(flat, dim=1, keepdim=True, correction=0)
        weight = ((flat - mean) / (variance + 1e-5).sqrt()).view_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardised() -> nn.Module:
    return nn.Sequential(
        StandardisedConv2d(4, 8, 3, padding=1, bias=False),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        StandardisedConv2d(8, 4, 3, stride=2, groups=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 4),
    )


class SmallViT(nn.Module):
    """Class token, position table, fused QKV, LayerScale, a mask made of parameters."""

    def __init__(self, width: int = 8, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.register = nn.Parameter(torch.randn(2, width) * 0.1)
        self.position = nn.Parameter(torch.randn(1, 4, width) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = nn.Parameter(torch.randn(heads, 7, 7) * 0.1)
        self.proj = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.rms = nn.RMSNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        size = x.shape[0]
        registers = self.register.unsqueeze(0).repeat(size, 1, 1)
        x = torch.cat([self.token.expand(size, -1, -1), registers, x], 1)
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        x = x + self.scale * self.proj(y.transpose(1, 2).flatten(2))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(self.rms(x[:, 0]))


class TiedLanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 11, width: int = 4):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(6, width)
        self.mix = nn.GRUCell(width, width)
        self.inner = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        place = self.place(torch.arange(tokens.shape[1], device=tokens.device))
        h = self.embed(tokens) + place
        h = h + torch.tanh(self.inner(h).cumsum(1))
        return h @ self.embed.weight.T

    def __repr__(self) -> str:
        return "TiedLanguageModel"


def tied() -> nn.Module:
    model = TiedLanguageModel()
    del model.mix
    return model


def tokens(size: int):
    return {"ids": torch.randint(11, (size, 5))}


def next_token(model: nn.Module, batch) -> Tensor:
    ids = batch["ids"]
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


class Attention(nn.Module):
    """torch's own attention, sequence first."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, 1, 8))
        self.attend = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).transpose(0, 1)
        q = self.query.expand(-1, x.shape[1], -1)
        y, _ = self.attend(x, x, x)
        z, _ = self.attend(q + y[:2], x, y)
        return self.head(z.transpose(0, 1).flatten(1))


def sequences(length: int, width: int):
    def make(size: int):
        return {
            "x": torch.randn(size, length, width, dtype=torch.float64),
            "y": torch.randint(4, (size,)),
        }

    return make


class LowRank(nn.Module):
    """W + BA with every part trainable, and a weight-normalised layer."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.down = nn.Parameter(torch.randn(2, 4))
        self.up = nn.Parameter(torch.randn(4, 2))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.halved = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + 0.5 * self.up @ self.down
        x = torch.tanh(F.linear(x, weight, self.base.bias))
        return (self.normed(x) @ (0.5 * self.halved)).mean(1)


class Thrice(nn.Module):
    """One layer called three times, views, in-place operations, slices of one parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(3, 4))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        x.mul_(0.5)
        x += self.table[0]
        x = x.sin()
        x[:, 1:].mul_(self.gain)
        x = F.relu(self.layer(x) + 1, inplace=True).clone()
        x[:, 0] = self.table[1]
        x = torch.einsum("btd,de->bte", x, self.layer.weight)
        x = x * self.table[1:2] + torch.where(x > 0, self.gain, x)
        return x.mean(1)


class Einsums(nn.Module):
    """Contractions in which a parameter has three axes, and products from the left."""

    def __init__(self):
        super().__init__()
        self.heads = nn.Parameter(torch.randn(2, 4, 3))
        self.mix = nn.Parameter(torch.randn(2, 2))
        self.left = nn.Parameter(torch.randn(5, 4))
        self.stack = nn.Parameter(torch.randn(2, 3, 3))
        self.vector = nn.Parameter(torch.randn(3))
        self.out = nn.Parameter(torch.randn(2, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("btd,hde->bhte", x, self.heads)
        x = torch.einsum("bhte,hg->bgte", x, self.mix)
        x = self.left @ x
        x = torch.matmul(x, self.stack) @ self.vector
        return torch.einsum("bht,htc->bc", torch.tanh(x), self.out)


class Experts(nn.Module):
    """Each token goes to two of four experts; those that no token goes to are skipped."""

    def __init__(self):
        super().__init__()
        self.embed, self.router = nn.Linear(4, 6), nn.Linear(6, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for _ in range(4)
        )
        self.shared = nn.Parameter(torch.randn(4, 6, 6) / 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(0, 1)
        gates, chosen = self.router(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for e in torch.unique(chosen):
            rows, place = torch.where(chosen == e)
            mine = tokens[rows]
            mine = self.experts[int(e)](mine) + mine @ self.shared[e]
            out.index_add_(0, rows, mine * gates[rows, place, None])
        return self.head((tokens + out).unflatten(0, x.shape[:2]).mean(1))


class Recurrent(nn.Module):
    """Layers of each kind, both directions, projections, a cell called five times, packed sequences."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, bidirectional=True, proj_size=3, batch_first=True)
        self.gru, self.rnn = nn.GRU(6, 4, bias=False), nn.RNN(4, 4, nonlinearity="relu")
        self.cell, self.packed = nn.LSTMCell(4, 4), nn.GRU(4, 4, batch_first=True, bidirectional=True)
        self.start, self.head = nn.Parameter(torch.randn(1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        y, last = self.rnn(self.gru(y.transpose(0, 1))[0])
        h = self.start.expand(len(x), -1)
        c = torch.zeros_like(h)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        lengths = 1 + (x.detach()[:, 0, 0] > 0).long() * 3
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(y.mean(0) + last[0] + h + self.packed(packed)[1].sum(0))


CASES = [
    Case("mlp", mlp, images(1, 4), classify),
    Case("convolutions", ConvNet, images(4, 8), classify),
    Case("standardised", standardised, images(4, 7), classify),
    Case("vit", SmallViT, images(3, 8), classify),
    Case("tied-lm", tied, tokens, next_token),
    Case("attention", Attention, sequences(4, 8), classify),
    Case("low-rank", LowRank, sequences(4, 4), classify),
    Case("thrice", Thrice, sequences(4, 4), classify),
    Case("einsum", Einsums, sequences(4, 4), classify),
    Case("experts", Experts, sequences(5, 4), classify, transforms=False),
    Case("recurrent", Recurrent, sequences(5, 4), classify, transforms=False),
]


def build(case: Case, size: int | None = None, seed: int = 0):
    """(model in float64, batch) for a case, always the same."""
    torch.manual_seed(seed)
    return case.model().double(), case.batch(size or case.size)
