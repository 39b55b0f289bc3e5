"""torch's own layers: recurrent, transformer, channels last."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .entry import Case, Entry
from .hub import (
    labelled,
    pictures,
    sentences,
)


class Recurrent(nn.Module):
    """An embedding, a recurrent layer and a classifier of the last state."""

    def __init__(self, layer: str, **options):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.layer = getattr(nn, layer)(8, 8, batch_first=True, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 3)

    def forward(self, input_ids):
        return self.head(self.layer(self.embedding(input_ids))[0][:, -1])


class Encoder(nn.Module):
    """torch's own transformer encoder with a padding mask, or with sequences first."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=attention_mask == 0)
        return self.head(x.mean(1 if self.batch_first else 0))


class ChannelsLast(nn.Module):
    """A small convolutional network in the memory format that is fast on most devices."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)
        )
        self.head = nn.Linear(8, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixel_values):
        x = self.body(pixel_values.contiguous(memory_format=torch.channels_last))
        return self.head(F.relu(x).mean((2, 3)))


def plain(family: str, build, inputs, batch) -> Entry:
    def loss(model, batch):
        logits = model(**{name: batch[name] for name in inputs})
        return F.cross_entropy(logits, batch["label"], reduction="none")

    return Entry(f"torch/{family}", family, lambda: Case(build(), loss, lambda n: labelled(batch(n))))


ENTRIES = [
    plain("lstm", partial(Recurrent, "LSTM", num_layers=2), ["input_ids"], sentences),
    plain("bi-lstm", partial(Recurrent, "LSTM", bidirectional=True), ["input_ids"], sentences),
    plain("gru", partial(Recurrent, "GRU"), ["input_ids"], sentences),
    plain("rnn", partial(Recurrent, "RNN"), ["input_ids"], sentences),
    plain("encoder", partial(Encoder, True), ["input_ids", "attention_mask"], sentences),
    plain("encoder-sequence-first", partial(Encoder, False), ["input_ids", "attention_mask"], sentences),
    plain("channels-last", ChannelsLast, ["pixel_values"], pictures),
]
