"""Texts, a tokenizer and models of transformers that are made on the spot: nothing is fetched."""

from __future__ import annotations

import csv
import os
import random
import tempfile
from pathlib import Path

import pytest

# Read when the libraries are first imported: no test reaches the network or leaves files behind.
os.environ["HF_HUB_OFFLINE"] = "1"
_CACHE = tempfile.TemporaryDirectory()
os.environ["DPTRAIN_CACHE"] = _CACHE.name
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
# Two processes of tests share the cores: threads that spin while they wait would take them from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

THINGS = ("film", "meal", "room", "book", "trip", "song")
WORDS = {"good": ("lovely", "great", "fine", "superb"), "bad": ("awful", "poor", "dull", "broken")}
LENGTH = 16
"""Tokens that the models read at most."""


def reviews(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) rows of one or two clauses."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        label = chance.choice(sorted(WORDS))
        clauses = [
            f"the {chance.choice(THINGS)} was {chance.choice(WORDS[label])}"
            for _ in range(chance.choice((1, 2)))
        ]
        rows.append((" and ".join(clauses) + ".", label))
    return rows


@pytest.fixture(scope="session")
def reviews_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv and test.csv with the columns review and verdict, and a row number."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("reviews")
    for split, count, seed in (("train", 600, 0), ("test", 100, 1)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["number", "review", "verdict"])
            writer.writerows((number, *row) for number, row in enumerate(reviews(count, seed)))
    return folder


@pytest.fixture(scope="session")
def text_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders bert, distilbert and gpt2 with a tiny configuration and a tokenizer, bert-weights also
    with weights."""
    transformers = pytest.importorskip("transformers")
    from tokenizers.implementations import BertWordPieceTokenizer

    wordpieces = BertWordPieceTokenizer()
    wordpieces.train_from_iterator((text for text, _ in reviews(200, 2)), vocab_size=120, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=wordpieces._tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )
    vocabulary = {"vocab_size": len(tokenizer)}
    bert = transformers.BertConfig(
        initializer_range=0.2,  # at this width, what is usual learns slowly
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        **vocabulary,
    )
    configs = {
        "bert": bert,
        "distilbert": transformers.DistilBertConfig(
            dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=LENGTH, **vocabulary
        ),
        "gpt2": transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=LENGTH, **vocabulary),
    }
    root = tmp_path_factory.mktemp("models")
    for name, config in configs.items():
        config.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    # Published models mostly come without a head for the task at hand.
    transformers.BertModel(bert).save_pretrained(root / "bert-weights")
    tokenizer.save_pretrained(root / "bert-weights")
    return root
