"""Tiny transformers models from configurations, and the losses they are trained with."""

from __future__ import annotations

import inspect
from functools import partial

import torch
import torch.nn.functional as F

from .entry import Case, Entry

VOCABULARY = 50
CLASSES = 3
#: whatever of these a configuration knows, under its own names
SMALL = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "num_labels": CLASSES,
    "hidden_size": 16,
    "d_model": 16,
    "dim": 16,
    "embed_dim": 16,
    "embedding_size": 8,
    "projection_dim": 8,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "d_ff": 24,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "ffn_dim": 24,
    "hidden_dim": 24,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 40,
    "max_source_positions": 40,
    "max_target_positions": 40,
    "image_size": 32,
    "patch_size": 8,
    "state_size": 4,
    "use_cache": False,
}


def shrink(config_class: str, **sizes):
    """A configuration of the family, tiny and without dropout."""
    import transformers

    config_class = getattr(transformers, config_class)
    known = inspect.signature(config_class.__init__).parameters
    rename = config_class.attribute_map
    options = {"num_labels": CLASSES}
    for name, value in SMALL.items():
        if rename.get(name, name) in known:
            options[rename.get(name, name)] = value
    options |= {name: 0.0 for name, p in known.items() if "drop" in name and isinstance(p.default, float)}
    config = config_class(**options | sizes)
    for part in (config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))):
        part._experts_implementation = "eager"  # the fused one knows no float64
    return config


# ---------------------------------------------------------------- batches


def sentences(batch_size: int, length: int = 9) -> dict:
    """Token identities padded on the right with 0, and what is real."""
    real = torch.arange(length) < torch.randint(2 * length // 3, length + 1, (batch_size, 1))
    ids = torch.randint(3, VOCABULARY, (batch_size, length)) * real
    return {"input_ids": ids, "attention_mask": real.long()}


def labelled(batch: dict) -> dict:
    return batch | {"label": torch.randint(CLASSES, (len(next(iter(batch.values()))),))}


def pictures(batch_size: int, size: int = 32, channels: int = 3) -> dict:
    return {"pixel_values": torch.randn(batch_size, channels, size, size, dtype=torch.float64)}


# ---------------------------------------------------------------- losses


def inputs_of(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name not in ("label", "target", "target_mask")}


def first(outputs):
    """Logits, or else the first output."""
    return outputs.logits if getattr(outputs, "logits", None) is not None else outputs[0]


def own_mean(values, mask):
    """Averaged over each example's own positions."""
    return (values * mask).sum(1) / mask.sum(1)


def classification(model, batch):
    return F.cross_entropy(first(model(**inputs_of(batch))), batch["label"], reduction="none")


def next_token(model, batch):
    logits = model(**inputs_of(batch)).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return own_mean(losses, batch["attention_mask"][:, 1:])


def next_token_unpadded(model, batch):
    """For models that take no mask: nothing real comes after the padding, so it changes nothing."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return own_mean(losses, batch["attention_mask"][:, 1:])


def reconstruction(name, model, batch):
    """The distance of one output from a constant."""
    output = getattr(model(**batch), name)
    return (output - 0.5).square().flatten(1).mean(1)


def masked_token(model, batch):
    logits = model(**inputs_of(batch)).logits
    return own_mean(
        F.cross_entropy(logits.transpose(1, 2), batch["target"], reduction="none"), batch["target_mask"]
    )


def translation(model, batch):
    """Teacher forcing: the decoder reads the target, shifted."""
    target, mask = batch["target"], batch["target_mask"]
    logits = model(**inputs_of(batch), decoder_input_ids=target[:, :-1]).logits
    losses = F.cross_entropy(logits.transpose(1, 2), target[:, 1:], reduction="none")
    return own_mean(losses, mask[:, 1:])


def features(model, batch):
    """A model without a head: its first output, averaged over positions, taken as logits."""
    output = first(model(**inputs_of(batch)))
    output = output.flatten(2).mean(2) if output.dim() == 4 else output
    output = output.mean(1) if output.dim() == 3 else output
    return F.cross_entropy(output, batch["label"], reduction="none")


def dense(model, batch):
    """A map of logits: every position has the example's label."""
    logits = first(model(**inputs_of(batch))).flatten(2)
    target = batch["label"][:, None].expand(-1, logits.shape[2])
    return F.cross_entropy(logits, target, reduction="none").mean(1)


def labelled_sentences(batch_size: int, length: int = 9) -> dict:
    return labelled(sentences(batch_size, length))


def labelled_pictures(batch_size: int, size: int = 32) -> dict:
    return labelled(pictures(batch_size, size))


def captions(batch_size: int) -> dict:
    return sentences(batch_size) | pictures(batch_size)


def masked_sentences(batch_size: int) -> dict:
    batch = sentences(batch_size)
    hidden = torch.zeros_like(batch["attention_mask"])
    hidden[:, 1:4:2] = 1
    return batch | {"target": torch.randint(3, VOCABULARY, hidden.shape), "target_mask": hidden}


def sentence_pairs(batch_size: int) -> dict:
    target = sentences(batch_size, 7)
    return sentences(batch_size) | {"target": target["input_ids"], "target_mask": target["attention_mask"]}


#: head -> loss and batches
TASKS = {
    "ForSequenceClassification": (classification, labelled_sentences),
    "ForCausalLM": (next_token, sentences),
    "LMHeadModel": (next_token, sentences),
    "ForMaskedLM": (masked_token, masked_sentences),
    "ForConditionalGeneration": (translation, sentence_pairs),
    "ForImageClassification": (classification, labelled_pictures),
    "ForSemanticSegmentation": (dense, labelled_pictures),
    "Model": (features, labelled_sentences),
}


def make(model: str, config: str, loss_fn, make_batch, sizes, change=None) -> Case:
    import transformers

    built = getattr(transformers, model)(shrink(config, **sizes))
    return Case(change(built) if change else built, loss_fn, make_batch)


def hub(family: str, model: str, config: str = "", *, loss=None, batch=None, change=None, **options) -> Entry:
    """An entry for a model class; its head says how it is trained, unless told otherwise."""
    flags = {name: options.pop(name) for name in ("batch_norm", "refuse", "wide", "slow") if name in options}
    head = next((head for head in TASKS if model.endswith(head)), "")
    usual_loss, usual_batch = TASKS.get(head, (None, None))
    config = config or f"{model.removesuffix(head)}Config"
    build = partial(make, model, config, loss or usual_loss, batch or usual_batch, options, change)
    return Entry(f"transformers/{family}", family, build, **flags)
