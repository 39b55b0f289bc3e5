"""Image, video and segmentation models and towers of transformers."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from .hub import (
    captions,
    classification,
    dense,
    features,
    hub,
    labelled,
    labelled_pictures,
    labelled_sentences,
    pictures,
    reconstruction,
)


def labelled_video(batch_size: int) -> dict:
    return labelled({"pixel_values": torch.randn(batch_size, 2, 3, 32, 32, dtype=torch.float64)})


def pooled(model, batch):
    """The embedding of a tower, taken as logits."""
    inputs = {name: value for name, value in batch.items() if name != "label"}
    outputs = model(**inputs)
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if getattr(outputs, name, None) is not None:
            return F.cross_entropy(getattr(outputs, name), batch["label"], reduction="none")
    raise ValueError("the outputs have no embedding")


def detection(model, batch):
    """Every query has the example's label and box: matching is left out."""
    outputs = model(pixel_values=batch["pixel_values"])
    target = batch["label"][:, None].expand(outputs.logits.shape[:2])
    losses = F.cross_entropy(outputs.logits.transpose(1, 2), target, reduction="none")
    return losses.mean(1) + (outputs.pred_boxes - 0.5).abs().flatten(1).mean(1)


def as_inputs(model, batch):
    """Perceiver calls its pictures ``inputs``."""
    return classification(model, {"inputs": batch["pixel_values"], "label": batch["label"]})


def contrastive(model, batch):
    """CLIP's loss: every other example of the batch is a negative one."""
    similarity = model(**batch).logits_per_image
    return F.cross_entropy(similarity, torch.arange(len(similarity)), reduction="none")


TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


TOWERS = {
    "text_config": dict(**TOWER, vocab_size=50, max_position_embeddings=40, eos_token_id=2),
    "vision_config": dict(**TOWER, image_size=32, patch_size=8),
    "projection_dim": 8,
}


ENTRIES = [
    hub("vit-hf", "ViTForImageClassification"),
    hub("deit-hf", "DeiTForImageClassification"),
    hub("beit-hf", "BeitForImageClassification", use_relative_position_bias=True, use_mean_pooling=True),
    hub("data2vec-vision", "Data2VecVisionForImageClassification", use_relative_position_bias=True),
    hub(
        "swin-hf",
        "SwinForImageClassification",
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=2,
        patch_size=4,
    ),
    hub(
        "swinv2-hf",
        "Swinv2ForImageClassification",
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=4,
        patch_size=4,
    ),
    hub(
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        "Swin2SRConfig",
        embed_dim=8,
        depths=[1],
        num_heads=[2],
        window_size=4,
        patch_size=1,
        loss=partial(reconstruction, "reconstruction"),
        batch=pictures,
        image_size=16,
    ),
    hub("convnext-hf", "ConvNextForImageClassification", depths=[1, 1], hidden_sizes=[8, 16], num_stages=2),
    hub(
        "convnextv2-hf", "ConvNextV2ForImageClassification", depths=[1, 1], hidden_sizes=[8, 16], num_stages=2
    ),
    hub("dinov2", "Dinov2ForImageClassification"),
    hub("dinov2-registers", "Dinov2WithRegistersForImageClassification", num_register_tokens=2),
    hub(
        "dinov3-vit",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        loss=features,
        batch=labelled_pictures,
        pos_embed_rescale=None,
        wide=True,
    ),
    hub("ijepa", "IJepaForImageClassification"),
    hub(
        "segformer",
        "SegformerForSemanticSegmentation",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        sr_ratios=[4, 2, 1, 1],
        decoder_hidden_size=8,
        batch_norm=True,
    ),
    hub(
        "segformer-cls",
        "SegformerForImageClassification",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        sr_ratios=[4, 2, 1, 1],
    ),
    hub(
        "pvt",
        "PvtForImageClassification",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        image_size=64,
        batch=partial(labelled_pictures, size=64),
    ),
    hub(
        "focalnet-hf",
        "FocalNetForImageClassification",
        embed_dim=8,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        patch_size=4,
    ),
    hub(
        "poolformer-hf", "PoolFormerForImageClassification", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16]
    ),
    hub(
        "hiera-hf",
        "HieraForImageClassification",
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        image_size=[64, 64],
        patch_size=[7, 7],
        batch=partial(labelled_pictures, size=64),
    ),
    hub(
        "vit-mae",
        "ViTMAEForPreTraining",
        "ViTMAEConfig",
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=24,
        mask_ratio=0.0,
        loss=partial(reconstruction, "logits"),
        batch=pictures,
    ),
    hub("vit-msn", "ViTMSNForImageClassification"),
    hub("bit-hf", "BitForImageClassification", embedding_size=32, hidden_sizes=[128, 128], depths=[1, 1]),
    hub(
        "resnet-hf",
        "ResNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        batch_norm=True,
    ),
    hub(
        "regnet-hf",
        "RegNetForImageClassification",
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        groups_width=4,
        batch_norm=True,
    ),
    hub("mobilenet-v1", "MobileNetV1ForImageClassification", depth_multiplier=0.25, batch_norm=True),
    hub(
        "mobilevit-hf",
        "MobileViTForImageClassification",
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        batch_norm=True,
    ),
    hub(
        "glpn",
        "GLPNForDepthEstimation",
        "GLPNConfig",
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 8, 16, 16],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=8,
        loss=partial(reconstruction, "predicted_depth"),
        batch=partial(pictures, size=64),
        batch_norm=True,
    ),
    hub(
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        image_size=[32, 32],
        num_detection_tokens=3,
        loss=detection,
        batch=labelled_pictures,
    ),
    hub(
        "timesformer",
        "TimesformerForVideoClassification",
        "TimesformerConfig",
        num_frames=2,
        loss=classification,
        batch=labelled_video,
    ),
    hub(
        "vivit",
        "VivitForVideoClassification",
        "VivitConfig",
        num_frames=2,
        tubelet_size=[2, 8, 8],
        loss=classification,
        batch=labelled_video,
    ),
    hub(
        "videomae",
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        num_frames=2,
        tubelet_size=2,
        loss=classification,
        batch=labelled_video,
    ),
    hub(
        "clip-vision",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        loss=pooled,
        batch=labelled_pictures,
    ),
    hub(
        "clip-text",
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        eos_token_id=2,
        loss=pooled,
        batch=labelled_sentences,
    ),
    hub("siglip-vision", "SiglipVisionModel", "SiglipVisionConfig", loss=pooled, batch=labelled_pictures),
    hub(
        "siglip-text",
        "SiglipTextModel",
        "SiglipTextConfig",
        loss=pooled,
        batch=labelled_sentences,
    ),
    hub("altclip-vision", "AltCLIPVisionModel", "AltCLIPVisionConfig", loss=pooled, batch=labelled_pictures),
    hub(
        "clip",
        "CLIPModel",
        "CLIPConfig",
        **TOWERS,
        loss=contrastive,
        batch=captions,
        refuse="every other example is a negative one of the contrastive loss",
    ),
    hub(
        "aimv2-hf", "Aimv2VisionModel", "Aimv2VisionConfig", loss=features, batch=labelled_pictures, wide=True
    ),
    hub(
        "perceiver-vision",
        "PerceiverForImageClassificationLearned",
        "PerceiverConfig",
        num_latents=4,
        d_latents=8,
        num_blocks=1,
        num_self_attends_per_block=1,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        image_size=16,
        loss=as_inputs,
        batch=partial(labelled_pictures, size=16),
    ),
    hub(
        "sam-vision",
        "SamVisionModel",
        "SamVisionConfig",
        output_channels=8,
        window_size=2,
        mlp_dim=24,
        global_attn_indexes=[1],
        num_pos_feats=8,
        loss=features,
        batch=labelled_pictures,
    ),
    hub(
        "vitdet",
        "VitDetModel",
        "VitDetConfig",
        window_block_indices=[0],
        window_size=2,
        use_relative_position_embeddings=True,
        residual_block_indices=[1],
        loss=features,
        batch=labelled_pictures,
    ),
    hub(
        "upernet",
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        batch_norm=True,
        backbone_config={
            "model_type": "convnext",
            "depths": [1, 1, 1, 1],
            "hidden_sizes": [8, 8, 8, 8],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        hidden_size=8,
        use_auxiliary_head=False,
        loss=dense,
        batch=partial(labelled_pictures, size=64),
        slow=True,
    ),
]
