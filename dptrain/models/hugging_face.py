"""A model of transformers by type, class or configuration, with random weights and inputs.

Nothing is fetched, but for the configuration of `hf:NAME` where it is not at hand: others are the
library's own or local files.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dptrain.core.files import Unreadable, read_json
from dptrain.models.errors import ModelError
from dptrain.models.footprint import require_room
from dptrain.models.hugging_face_inputs import LOSSES, random_batch
from dptrain.models.transformers_classifier import PREFIX as HUB
from dptrain.models.transformers_classifier import read_config
from dptrain.models.weights import read_tensors

if TYPE_CHECKING:
    from dptrain.models.subjects import Choices

PREFIX = "transformers:"
#: by --task, the automatic class; vision models take the image one for classification
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
IMAGES = "AutoModelForImageClassification"
SHRINK = "shrink it, for example --config num_hidden_layers=2 hidden_size=256 intermediate_size=512"
#: by the ending of a class's name, what its loss is
ENDINGS = {
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
    "ForConditionalGeneration": "seq2seq",
    "ForMaskedLM": "tokens",
    "ForTokenClassification": "tokens",
}


def knows(name: str) -> bool:
    """Whether `name` is to be built here: a type, a class, a configuration, or anything prefixed."""
    if name.startswith((PREFIX, HUB)) or os.path.isfile(Path(name) / "config.json"):
        return True
    if name.endswith(".json"):
        return True
    return ":" not in name and (name in model_types() or _model_class(name) is not None)


def model_types() -> list[str]:
    """Of transformers; none where it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return []
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def build(name: str, choices: Choices) -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any, str]:
    """(model, loss_fn, batch, description). Raises ModelError."""
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{name} needs the library transformers: pip install 'dptrain[transformers]'."
        ) from error
    from transformers.utils import logging

    logging.set_verbosity_error()
    name = name.removeprefix(PREFIX)
    named = _model_class(name)
    config = _config(name, named, choices)
    if named is None:
        kind, factory = _factory(config, choices.task)
        make = functools.partial(getattr(transformers, factory).from_config, trust_remote_code=False)
    else:
        if choices.task is not None:
            raise ModelError(f"--task is for model types; {name} is a class, which says it itself.")
        kind, factory, make = _kind(name, config), name, named._from_config
    require_room(name, lambda: make(config), choices, SHRINK)
    torch.manual_seed(0)
    try:
        model = make(config).float().train()
    except Exception as error:
        raise ModelError(f"{name} cannot be built with this --config: {_first_line(error)}.") from error
    if choices.weights is not None:
        _load(model, choices.weights)
    batch, inputs = random_batch(model, config, kind, choices)
    description = f"{type(model).__name__} ({config.model_type}), {inputs}, {choices.origin}"
    return model, LOSSES[kind], batch, description


def _model_class(name: str) -> Any:
    """A class of transformers with this name, if it is that of a model."""
    if not name[:1].isupper() or importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model and found.config_class is not None else None


# ---------------------------------------------------------------------- configuration


def _config(name: str, named: Any, choices: Choices) -> Any:
    model_type, stored = _source(name, named)
    start = named.config_class if named is not None else functools.partial(_for_model, model_type)
    try:
        default = start(**stored)
        settings = {"num_labels": choices.num_classes, **_overrides(choices.config, default, model_type)}
        if choices.image_size is not None and hasattr(default, "image_size"):
            settings["image_size"] = choices.image_size
        config = start(**{**stored, **settings})
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name} has no such configuration: {_first_line(error)}.") from error
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    config._experts_implementation = "eager"  # grouped_mm, the default, has no float64
    if hasattr(config, "use_cache"):
        config.use_cache = False  # for generation: it would keep keys and values
    return config


def _source(name: str, named: Any) -> tuple[str, dict[str, Any]]:
    """(model type, settings that differ from its default)."""
    path = Path(name) / "config.json" if os.path.isdir(name) else Path(name)
    if named is not None:
        return named.config_class.model_type, {}
    if path.suffix == ".json" or name.startswith(HUB):
        stored = read_config(name).to_dict() if name.startswith(HUB) else _read(path)
        model_type = stored.pop("model_type", None)
        if model_type not in model_types():
            raise ModelError(f"{name} states no model_type that transformers knows ({model_type}).")
        return model_type, stored
    if name in model_types():
        return name, {}
    near = difflib.get_close_matches(name, model_types(), n=3)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    raise ModelError(f"transformers has no model type, class or local configuration {name!r}{hint}")


def _for_model(model_type: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise Unreadable("does not hold a table of settings")
    except Unreadable as error:
        raise ModelError(f"{path} {error}; name a configuration of transformers.") from error
    return found


def _overrides(texts: tuple[str, ...], default: Any, model_type: str) -> dict[str, Any]:
    out = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ModelError(f"--config takes key=value, and {text!r} is none.")
        if not hasattr(default, key):
            near = difflib.get_close_matches(key, default.to_dict(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else "."
            raise ModelError(f"the configuration of {model_type} has no {key!r}{hint}")
        try:
            out[key] = json.loads(value)
        except ValueError:
            out[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return out


def _factory(config: Any, task: str | None) -> tuple[str, str]:
    """(kind of loss, automatic class): as asked for, or what the type is mostly used for."""
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    images = auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    tables = {
        "classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    if task is None:
        if config.is_encoder_decoder:
            task = "seq2seq" if kind in tables["seq2seq"] else None
        elif kind in images or (kind in masked and kind in tables["classification"]):
            task = "classification"
        elif kind in tables["lm"]:
            task = "lm"
        elif kind in tables["classification"]:
            task = "classification"
    if task is None:
        return "features", "AutoModel"
    if task not in tables:
        raise ModelError(f"--task {task!r} is none of {', '.join(tables)}.")
    if kind in tables[task]:
        return task, AUTO[task]
    if task == "classification" and kind in images:
        return task, IMAGES
    offered = [t for t, table in tables.items() if kind in table]
    raise ModelError(
        f"transformers has no {task} model of type {kind}; choose --task {' or '.join(offered)}."
    )


def _kind(name: str, config: Any) -> str:
    kind = next((kind for ending, kind in ENDINGS.items() if name.endswith(ending)), "features")
    return "features" if kind == "seq2seq" and not config.is_encoder_decoder else kind


def _load(model: nn.Module, path: Path) -> None:
    stored = read_tensors(path, model)
    try:
        missing = model.load_state_dict(stored, strict=False).missing_keys
    except Exception as error:
        raise ModelError(f"{path} does not fit this model: {_first_line(error)}.") from error
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    missing = [key for key in missing if key not in tied]
    if missing:
        raise ModelError(f"{path} does not fit this model: {missing[0]} is missing in it.")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
