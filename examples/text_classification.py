"""A transformers model trained privately on tokenised text with padding masks. Runs offline.

Task: did a sentence come from the documentation of NumPy, SciPy or PyTorch? Those sentences stand in
for private texts, one sentence being one example: they are real and lie on every machine that runs
this. The tokenizer is trained on other, public text, the language reference that comes with Python: a
vocabulary made from the private texts would give some of them away, outside of epsilon.

    python examples/text_classification.py
    python examples/text_classification.py --model prajjwal1/bert-tiny     # pre-trained, from the hub
"""

import argparse
import inspect
import re
import warnings
from pydoc_data.topics import topics

import numpy
import scipy
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers.implementations import BertWordPieceTokenizer
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

import dptrain
import dptrain.torch as dpt

LENGTH = 32  # tokens; fixed, so that neither shapes nor timing depend on the texts
LIBRARIES = [
    (numpy, numpy.ndarray, numpy.linalg, numpy.ma, numpy.fft, numpy.random.Generator),
    (scipy.stats, scipy.optimize, scipy.signal, scipy.special),
    (torch, torch.Tensor, torch.nn, torch.nn.functional, torch.optim, torch.distributions),
]


def sentences(namespaces):
    """All distinct sentences of at least six words in the documentation of what is inside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some names are deprecated
        docs = [inspect.getdoc(getattr(x, name, None)) or "" for x in namespaces for name in dir(x)]
    found = {" ".join(part.split()) for doc in docs for part in re.split(r"(?<=\.)\s|\n\n", doc)}
    return sorted(text for text in found if re.fullmatch(r"[A-Z].*\.", text) and len(text.split()) >= 6)


def small_model():
    """A BERT of one layer with random weights, and a tokenizer trained on public text."""
    wordpieces = BertWordPieceTokenizer(lowercase=True)
    wordpieces.train_from_iterator(topics.values(), vocab_size=2000, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=wordpieces._tokenizer,
        pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
    )  # fmt: skip
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=LENGTH, num_labels=len(LIBRARIES),
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), tokenizer


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a model of the hub or a folder; by default a small new one")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--epsilon", type=float, default=8.0)
parser.add_argument("--sentences", type=int, default=10_000, help="of each library, at most")
parser.add_argument("--batch", type=int, default=480, help="expected number of examples per step")
options = parser.parse_args()

if options.model:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=len(LIBRARIES))
else:
    model, tokenizer = small_model()

texts = [sentences(namespaces) for namespaces in LIBRARIES]
size = min(options.sentences, *map(len, texts))
rows = [{"text": t, "label": i} for i, own in enumerate(texts) for t in own[:: len(own) // size][:size]]
data = Dataset.from_list(rows).map(
    lambda row: tokenizer(row["text"], padding="max_length", truncation=True, max_length=LENGTH),
    batched=True,
)
columns = ["input_ids", "attention_mask", "label"]
data = data.with_format("torch", columns=columns).train_test_split(0.2, seed=0)
train, test = DataLoader(data["train"], batch_size=256), DataLoader(data["test"], batch_size=256)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def loss_fn(model, batch):
    return F.cross_entropy(logits(model, batch), batch["label"], reduction="none")  # one loss per example


mechanism = dptrain.Mechanism.calibrate(
    epsilon=options.epsilon, delta=1e-5, sample_rate=options.batch / len(data["train"]),
    steps=options.steps, clip_norm=1.0, expected_batch_size=options.batch,
)  # fmt: skip
model.train()
private = dpt.make_private(model, optimizer, train, loss_fn, mechanism, physical_batch_size=128)
for step in private.steps():
    if step.number % 10 == 0:
        print(f"step {step.number} of {step.steps}, epsilon {step.epsilon:.2f}")

model.eval()
with torch.no_grad():
    right = sum(int((logits(model, batch).argmax(1) == batch["label"]).sum()) for batch in test)
print(
    f"test accuracy {right / len(data['test']):.3f} (chance {1 / len(LIBRARIES):.3f}) "
    f"at epsilon {private.epsilon:.2f}, delta {mechanism.delta:g}"
)
