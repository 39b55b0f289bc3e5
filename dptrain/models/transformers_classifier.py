"""Classifiers of transformers, by name on the hub or by folder: `hf:NAME_OR_PATH`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dptrain.core.files import Unreadable, read_json
from dptrain.core.printable import reason
from dptrain.models.errors import ModelError
from dptrain.models.weights import WeightReport

PREFIX = "hf:"


@dataclass(frozen=True)
class Text:
    """What a model of texts is to read."""

    example: dict[str, torch.Tensor]
    """Tokens of one text [1, T] int64, by the names of the model's arguments."""
    vocabulary: int
    """Number of different tokens."""
    pad_token: int


def is_huggingface(name: str) -> bool:
    """Whether a model name is `hf:...`."""
    return name.startswith(PREFIX)


def read_config(name: str, **changes: Any) -> Any:
    """The configuration behind `hf:NAME_OR_PATH`. Raises ModelError if there is none."""
    source = name.removeprefix(PREFIX)
    auto = _transformers().AutoConfig
    try:
        if os.path.exists(local := Path(source) / "config.json") and not isinstance(read_json(local), dict):
            raise Unreadable("its config.json holds no table of settings")
        # Not to be asked: code that lies beside a configuration is never run.
        return auto.from_pretrained(source, trust_remote_code=False, **changes)
    except Exception as error:  # a configuration's own checks raise what they like
        raise ModelError(
            f"There is no model {name!r} ({reason(error)}); give a name on the Hugging Face hub, or "
            "a folder with a config.json."
        ) from error


def build_huggingface(
    name: str, num_classes: int, input_shape: tuple[int, ...], pretrained: bool, text: Text | None
) -> tuple[nn.Module, WeightReport | None]:
    """A float32 classifier of texts, or of images [C, H, W] if `text` is None, and what was loaded.

    pretrained: load its weights; otherwise only the configuration is read. Only the head may
    be missing from them, or of another size.
    """
    config = read_config(name, num_labels=num_classes)
    transformers = _transformers()
    if text is not None:
        auto = transformers.AutoModelForSequenceClassification
        _fit_to_text(name, config, text)
    else:
        auto = transformers.AutoModelForImageClassification
        if len(input_shape) != 3:
            raise ModelError(f"{name} reads images [C, H, W], but one input has shape {list(input_shape)}.")
        _fit_to_images(config, input_shape)
    if type(config) not in auto._model_mapping:
        kind = "images" if text is None else "texts"
        raise ModelError(
            f"{name} is a {config.model_type}, of which transformers has no classifier of {kind}; choose "
            "another --model, or other --data."
        )
    if not pretrained:
        return auto.from_config(config, dtype=torch.float32, trust_remote_code=False), None
    try:
        model, loaded = auto.from_pretrained(
            name.removeprefix(PREFIX),
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,  # the other formats are pickles
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"The weights of {name} cannot be loaded ({reason(error)}); leave out --pretrained to "
            "start from random weights."
        ) from error
    return model, _report(name, model, loaded)


def _fit_to_text(name: str, config: Any, text: Text) -> None:
    if (known := getattr(config, "vocab_size", None)) is not None and text.vocabulary > known:
        raise ModelError(
            f"The tokenizer has {text.vocabulary:,} tokens and {name} knows {known:,}; give the one that "
            "belongs to it with --tokenizer."
        )
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = text.pad_token
    if hasattr(config, "use_cache"):
        config.use_cache = False  # for generating text, which nobody does here


def _fit_to_images(config: Any, input_shape: tuple[int, ...]) -> None:
    channels, height, _ = input_shape
    for name, value in (("num_channels", channels), ("image_size", height)):
        if hasattr(config, name):
            setattr(config, name, value)


def _report(name: str, model: nn.Module, loaded: dict[str, Any]) -> WeightReport:
    """What became of each tensor. Raises ModelError if any but the head's is not from the file."""
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in loaded["mismatched_keys"]}
    fresh = sorted({*loaded["missing_keys"], *mismatched})
    # A pooler belongs to the head: some models are published without theirs.
    base = f"{model.base_model_prefix}."
    wrong = [key for key in fresh if key.startswith(base) and "pooler" not in key]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ModelError(
            f"The weights of {name} do not fit: {wrong[0]}{more} would stay random; keep the --image-size "
            "that it was made for, or leave out --pretrained."
        )
    matched = tuple(key for key in model.state_dict() if key not in fresh)
    return WeightReport(matched, (), tuple(fresh), tuple(sorted(loaded["unexpected_keys"])))


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "Models named hf:... need the package transformers; install it with "
            "`pip install 'dptrain[transformers]'`."
        ) from error
    return transformers
