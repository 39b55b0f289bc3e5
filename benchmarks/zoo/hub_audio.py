"""Speech and sound models of transformers."""

from __future__ import annotations

import torch

from .entry import Entry
from .hub import (
    classification,
    hub,
    labelled,
    sentences,
    translation,
)


def labelled_waves(batch_size: int) -> dict:
    """Sound of different lengths, padded with silence."""
    length = torch.randint(200, 401, (batch_size, 1))
    real = torch.arange(400) < length
    values = torch.randn(batch_size, 400, dtype=torch.float64) * real
    return labelled({"input_values": values, "attention_mask": real.long()})


def transcribed(name: str, *shape: int):
    """Batches of sound under that name and shape, and the words that are said."""

    def make_batch(batch_size: int) -> dict:
        words = sentences(batch_size, 6)
        sound = {name: torch.randn(batch_size, *shape, dtype=torch.float64)}
        return sound | {"target": words["input_ids"], "target_mask": words["attention_mask"]}

    return make_batch


def classified(name: str, *shape: int):
    return lambda batch_size: labelled({name: torch.randn(batch_size, *shape, dtype=torch.float64)})


WAVES = {
    "conv_dim": [8, 8],
    "conv_kernel": [8, 4],
    "conv_stride": [8, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}


def sound(family: str, model: str, **sizes) -> Entry:
    config = model.removesuffix("ForSequenceClassification") + "Config"
    return hub(family, model, config, loss=classification, batch=labelled_waves, **WAVES | sizes)


ENTRIES = [
    sound("wav2vec2", "Wav2Vec2ForSequenceClassification"),
    sound(
        "wav2vec2-layer-norm",
        "Wav2Vec2ForSequenceClassification",
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
    ),
    sound("hubert", "HubertForSequenceClassification"),
    sound("wavlm", "WavLMForSequenceClassification"),
    sound("unispeech", "UniSpeechForSequenceClassification"),
    sound("unispeech-sat", "UniSpeechSatForSequenceClassification"),
    sound(
        "data2vec-audio",
        "Data2VecAudioForSequenceClassification",
        conv_pos_kernel_size=3,
        num_conv_pos_embeddings=2,
    ),
    sound("sew", "SEWForSequenceClassification", squeeze_factor=2),
    sound("sew-d", "SEWDForSequenceClassification", squeeze_factor=2, position_buckets=4),
    sound("wav2vec2-conformer", "Wav2Vec2ConformerForSequenceClassification", batch_norm=True),
    hub(
        "wav2vec2-bert",
        "Wav2Vec2BertForSequenceClassification",
        feature_projection_input_dim=8,
        apply_spec_augment=False,
        classifier_proj_size=8,
        conv_depthwise_kernel_size=3,
        left_max_position_embeddings=4,
        right_max_position_embeddings=2,
        batch=classified("input_features", 12, 8),
        loss=classification,
    ),
    hub(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        "ASTConfig",
        max_length=32,
        num_mel_bins=16,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
        loss=classification,
        batch=classified("input_values", 32, 16),
    ),
    hub(
        "whisper",
        "WhisperForConditionalGeneration",
        num_mel_bins=8,
        loss=translation,
        batch=transcribed("input_features", 8, 80),
    ),
    hub(
        "speech-to-text",
        "Speech2TextForConditionalGeneration",
        "Speech2TextConfig",
        input_feat_per_channel=8,
        conv_channels=16,
        num_conv_layers=1,
        conv_kernel_sizes=[3],
        max_source_positions=80,
        loss=translation,
        batch=transcribed("input_features", 80, 8),
    ),
    hub(
        "moonshine",
        "MoonshineForConditionalGeneration",
        loss=translation,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=2,
        partial_rotary_factor=0.5,
        batch=transcribed("input_values", 2000),
    ),
]
