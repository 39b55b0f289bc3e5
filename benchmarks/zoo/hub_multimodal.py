"""Text with images or pages, time series and decisions: models of transformers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from .hub import (
    captions,
    classification,
    hub,
    labelled,
    next_token,
    own_mean,
    pictures,
    reconstruction,
    sentences,
)

PATCHED = {"context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2}


def series(batch_size: int) -> dict:
    return {"past_values": torch.randn(batch_size, 16, 2, dtype=torch.float64)}


def series_labelled(batch_size: int) -> dict:
    return labelled(series(batch_size))


def prediction_logits(model, batch):
    outputs = model(past_values=batch["past_values"])
    return F.cross_entropy(outputs.prediction_logits, batch["label"], reduction="none")


def forecast(model, batch):
    return model(past_values=batch["past_values"]).prediction_outputs.square().flatten(1).mean(1)


def decisions(batch_size: int) -> dict:
    draw = partial(torch.randn, dtype=torch.float64)
    return {
        "states": draw(batch_size, 4, 5),
        "actions": draw(batch_size, 4, 2),
        "rewards": draw(batch_size, 4, 1),
        "returns_to_go": draw(batch_size, 4, 1),
        "timesteps": torch.randint(10, (batch_size, 4)),
        "attention_mask": torch.ones(batch_size, 4, dtype=torch.long),
    }


def captioned(batch_size: int) -> dict:
    return labelled(sentences(batch_size) | pictures(batch_size))


def pages(batch_size: int) -> dict:
    corners = torch.randint(0, 500, (batch_size, 9, 2))
    return labelled(sentences(batch_size) | {"bbox": torch.cat([corners, corners + 50], 2)})


def regions(batch_size: int) -> dict:
    draw = partial(torch.randn, dtype=torch.float64)
    words = sentences(batch_size)
    return labelled(words | {"visual_feats": draw(batch_size, 4, 8), "visual_pos": draw(batch_size, 4, 4)})


def answer(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "label"}
    return F.cross_entropy(model(**inputs).question_answering_score, batch["label"], reduction="none")


def caption(model, batch):
    """The logits of the words come after those of the picture."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(**batch).logits[:, -ids.shape[1] : -1]
    return own_mean(F.cross_entropy(logits.mT, ids[:, 1:], reduction="none"), mask[:, 1:])


def looked_at(batch_size: int) -> dict:
    words = sentences(batch_size)
    return labelled(
        words
        | {
            "visual_embeds": torch.randn(batch_size, 4, 8, dtype=torch.float64),
            "visual_attention_mask": torch.ones(batch_size, 4, dtype=torch.long),
        }
    )


def prompted(batch_size: int) -> dict:
    """An image's patches take the place of the 16 image tokens at the start."""
    words = sentences(batch_size, 6)
    image = torch.full((batch_size, 16), 49)
    ids = torch.cat([image, words["input_ids"].clamp(max=48)], 1)
    mask = torch.cat([torch.ones_like(image), words["attention_mask"]], 1)
    return {"input_ids": ids, "attention_mask": mask} | pictures(batch_size)


TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40,
}


CLIP = dict(model_type="clip_vision_model", **TOWER, image_size=32, patch_size=8, projection_dim=8)


ENTRIES = [
    hub(
        "vilt",
        "ViltForQuestionAnswering",
        "ViltConfig",
        max_image_length=-1,
        loss=classification,
        batch=captioned,
    ),
    hub(
        "layoutlm",
        "LayoutLMForSequenceClassification",
        max_2d_position_embeddings=600,
        batch=pages,
        loss=classification,
    ),
    hub(
        "layoutlmv3",
        "LayoutLMv3ForSequenceClassification",
        max_2d_position_embeddings=600,
        coordinate_size=2,
        shape_size=4,
        input_size=32,
        visual_embed=False,
        batch=pages,
        loss=classification,
    ),
    hub(
        "visual-bert",
        "VisualBertForQuestionAnswering",
        "VisualBertConfig",
        visual_embedding_dim=8,
        loss=classification,
        batch=looked_at,
    ),
    hub(
        "lxmert",
        "LxmertForQuestionAnswering",
        "LxmertConfig",
        visual_feat_dim=8,
        l_layers=1,
        x_layers=1,
        r_layers=1,
        num_qa_labels=3,
        loss=answer,
        batch=regions,
    ),
    hub(
        "git",
        "GitForCausalLM",
        vision_config=dict(**TOWER, image_size=32, patch_size=8),
        loss=caption,
        batch=captions,
    ),
    hub(
        "blip-text-vision",
        "BlipForConditionalGeneration",
        "BlipConfig",
        vision_config=dict(**TOWER, image_size=32, patch_size=8),
        text_config=dict(
            **TOWER,
            vocab_size=50,
            encoder_hidden_size=16,
            max_position_embeddings=40,
            bos_token_id=1,
            sep_token_id=2,
            pad_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        loss=next_token,
        batch=captions,
    ),
    hub(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        vision_config=CLIP,
        text_config=LLAMA,
        image_token_id=49,
        image_token_index=49,
        vision_feature_layer=-1,
        loss=next_token,
        batch=prompted,
    ),
    hub(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        vision_config=dict(
            model_type="siglip_vision_model",
            **TOWER,
            image_size=32,
            patch_size=8,
            projection_dim=16,
            vision_use_head=False,
        ),
        text_config=LLAMA | {"model_type": "gemma", "head_dim": 8},
        image_token_id=49,
        image_token_index=49,
        projection_dim=16,
        hidden_size=16,
        loss=next_token,
        batch=prompted,
        refuse="whether anyone is padded decides everyone's attention mask",
    ),
    hub(
        "patchtst",
        "PatchTSTForClassification",
        "PatchTSTConfig",
        **PATCHED,
        num_targets=3,
        norm_type="layernorm",
        loss=prediction_logits,
        batch=series_labelled,
        use_cls_token=True,
    ),
    hub(
        "patchtst-bn",
        "PatchTSTForClassification",
        "PatchTSTConfig",
        **PATCHED,
        num_targets=3,
        norm_type="batchnorm",
        loss=prediction_logits,
        batch=series_labelled,
        use_cls_token=True,
        batch_norm=True,
    ),
    hub(
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        "PatchTSMixerConfig",
        **PATCHED,
        d_model=8,
        num_layers=1,
        prediction_length=4,
        loss=forecast,
        batch=series,
        norm_mlp="LayerNorm",
    ),
    hub(
        "decision-transformer",
        "DecisionTransformerModel",
        "DecisionTransformerConfig",
        state_dim=5,
        act_dim=2,
        max_ep_len=10,
        loss=partial(reconstruction, "action_preds"),
        batch=decisions,
    ),
]
