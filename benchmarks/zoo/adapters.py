"""Models of transformers of which only LoRA adapters train."""

from __future__ import annotations

from functools import partial

from .entry import Entry
from .hub import (
    classification,
    labelled_pictures,
    labelled_sentences,
    make,
    next_token,
    sentences,
)


def with_lora(targets, model, **options):
    """Only the adapters train; they start at zero, which the zoo moves."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))


def adapted(family: str, targets, model: str, config: str, loss, batch, options=None, **sizes) -> Entry:
    change = partial(with_lora, targets, **options or {})
    return Entry(f"peft/{family}", f"lora-{family}", partial(make, model, config, loss, batch, sizes, change))


ENTRIES = [
    adapted(
        "bert",
        ["query", "value"],
        "BertForSequenceClassification",
        "BertConfig",
        classification,
        labelled_sentences,
        {"task_type": "SEQ_CLS"},
    ),
    adapted("llama", ["q_proj", "v_proj"], "LlamaForCausalLM", "LlamaConfig", next_token, sentences),
    adapted(
        "llama-dora",
        ["q_proj", "down_proj"],
        "LlamaForCausalLM",
        "LlamaConfig",
        next_token,
        sentences,
        {"use_dora": True},
    ),
    adapted(
        "gpt2", ["c_attn"], "GPT2LMHeadModel", "GPT2Config", next_token, sentences, {"fan_in_fan_out": True}
    ),
    adapted(
        "vit",
        ["q_proj", "v_proj"],
        "ViTForImageClassification",
        "ViTConfig",
        classification,
        labelled_pictures,
    ),
    adapted(
        "llama-embedding",
        ["embed_tokens", "q_proj"],
        "LlamaForCausalLM",
        "LlamaConfig",
        next_token,
        sentences,
    ),
]
