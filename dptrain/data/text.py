"""Texts as tokens of fixed length, kept where they are used."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from dptrain.core.printable import reason
from dptrain.data.protocol import Batch, DataError
from dptrain.data.resident import fits

DEFAULT_LENGTH = 128
STAND_INS = 16
CHUNK = 1000


class Encoder:
    """A tokenizer of transformers that makes every text `length` tokens long.

    Longer texts are cut, shorter ones padded and masked. The length is fixed in advance: one that
    followed the texts would tell something about them. The vocabulary should be public too, as
    that of a published model is.
    """

    def __init__(self, source: str, length: int | None = None, longest: int | None = None) -> None:
        """source: name on the hub or folder; length: by default 128, or what tokenizer and model
        (`longest`) can take if that is less. Raises DataError."""
        self._tokenizer = _load_tokenizer(source)
        if self._tokenizer.pad_token is None:
            # Masked, so that it may be any token; GPT-2, for one, has no token for it.
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)
        most = min(self._tokenizer.model_max_length, longest or self._tokenizer.model_max_length)
        if length is not None and length > most:
            raise DataError(f"--max-length is {length}, but the model and its tokenizer take at most {most}.")
        self.length: int = length or min(DEFAULT_LENGTH, most)

    @property
    def vocabulary(self) -> int:
        """Number of different tokens."""
        return len(self._tokenizer)

    @property
    def pad_token(self) -> int:
        return int(self._tokenizer.pad_token_id)

    def __call__(self, *columns: Sequence[str]) -> dict[str, torch.Tensor]:
        """One column of texts, or two for pairs: tensors [N, length] int32 by name."""
        parts = []
        for start in range(0, len(columns[0]), CHUNK):
            encoded = self._tokenizer(
                *(list(column[start : start + CHUNK]) for column in columns),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="np",
            )
            parts.append({key: torch.from_numpy(value).to(torch.int32) for key, value in encoded.items()})
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def stand_ins(self, columns: int) -> dict[str, torch.Tensor]:
        """Rows of random tokens and lengths, the same every time and taken from no text."""
        chance = random.Random(0)
        usual = sorted(set(range(self.vocabulary)) - set(self._tokenizer.all_special_ids))
        texts = [
            self._tokenizer.decode(chance.choices(usual, k=1 + row * self.length // STAND_INS))
            for row in range(STAND_INS)
        ]
        return self(*[texts] * columns)


class ResidentTexts:
    """Tokens [N, T] by name and labels [N] that stay in memory as int32 and int64.

    They lie on `device` when they fit into a quarter of its free memory, otherwise in host memory.
    """

    def __init__(
        self,
        name: str,
        tokens: dict[str, torch.Tensor],
        labels: torch.Tensor,
        num_classes: int,
        encoder: Encoder,
        stand_ins: dict[str, torch.Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.num_classes = num_classes
        self.encoder = encoder
        self.device = torch.device(device)
        self.input_shape: tuple[int, ...] = (encoder.length,)
        size_bytes = sum(value.numel() * value.element_size() for value in tokens.values())
        home = self.device if fits(size_bytes, self.device) else torch.device("cpu")
        self._tokens = {key: value.to(home) for key, value in tokens.items()}
        self._labels = labels.to(home, torch.int64)
        self._stand_ins = stand_ins

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> torch.Tensor:
        """All labels [N] int64."""
        return self._labels

    def gather(self, indices: torch.Tensor) -> Batch:
        at = indices.to(self._labels.device)
        tokens = {key: self._on_device(value.index_select(0, at)) for key, value in self._tokens.items()}
        return tokens, self._labels.index_select(0, at).to(self.device)

    def stream(self, indices: Iterable[torch.Tensor]) -> Iterator[Batch]:
        return map(self.gather, indices)

    def subset(self, indices: torch.Tensor) -> ResidentTexts:
        at = indices.to(self._labels.device)
        return ResidentTexts(
            self.name,
            {key: value.index_select(0, at) for key, value in self._tokens.items()},
            self._labels.index_select(0, at),
            self.num_classes,
            self.encoder,
            self._stand_ins,
            self.device,
        )

    def stand_in(self, size: int) -> Batch:
        """Random tokens: zeros would be an unusual text, for which a model may do unusual things."""
        rows = torch.arange(size) % STAND_INS
        tokens = {key: self._on_device(value[rows]) for key, value in self._stand_ins.items()}
        return tokens, (torch.arange(size) % self.num_classes).to(self.device)

    def _on_device(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.to(self.device, non_blocking=True).to(torch.int64)


def _load_tokenizer(source: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DataError(
            "Texts need the package transformers; install it with `pip install 'dptrain[transformers]'`."
        ) from error
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of files of any content
        raise DataError(
            f"There is no tokenizer {source!r} ({reason(error)}); name one with --tokenizer, on the Hugging "
            "Face hub or in a folder."
        ) from error
