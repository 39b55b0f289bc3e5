"""safetensors files and configurations of models."""

from __future__ import annotations

import copy
import functools
import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from benchmarks.fuzz import mutate, surroundings, trees
from benchmarks.fuzz.target import Target, Wrong
from benchmarks.fuzz.targets.files import Given
from dptrain.models import ModelError, build, load_weights

TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "U16",
    "U32",
    "U64",
    "F4",
    "C64",
    "F8_E8M0",
    "Q4",
)


@functools.cache
def models() -> dict[str, nn.Module]:
    """Small models of each kind whose files are adapted in a way of its own."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=3)
    bit = ResNetV2(layers=(1,), channels=(128,), num_classes=3, stem_chs=32)
    return {"convnet": build("mlp", 3, (1, 4, 4)), "vit": vit, "bit": bit}


@functools.cache
def seeds() -> dict[str, bytes]:
    found = {name: save(dict(model.state_dict())) for name, model in models().items()}
    large = VisionTransformer(img_size=24, patch_size=8, embed_dim=8, depth=1, num_heads=2, num_classes=5)
    return found | {"vit-of-another-size": save(dict(large.state_dict()), {"author": "\x1b[31m[/x]"})}


def unpacked(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(chance: random.Random, header: Any, data: bytes) -> bytes:
    """A file of a header, honest or not about its length."""
    text = trees.encoded(chance, header)
    length = len(text) if chance.random() < 0.9 else chance.choice(mutate.WIDE_EXTREMES)
    return struct.pack("<Q", length) + text + data


def _make(chance: random.Random) -> tuple[str, Given]:
    name = chance.choice(sorted(seeds()))
    content = seeds()[name]
    if chance.random() < 0.4:
        content = mutate.damaged(chance, [content])
    else:
        header, data = unpacked(content)
        header = copy.deepcopy(header)
        for _ in range(chance.choice((1, 1, 2))):
            entry = header[chance.choice(sorted(header))]
            match chance.randrange(5):
                case 0 if "dtype" in entry:
                    entry["dtype"] = chance.choice(TYPES)
                case 1 if "shape" in entry:
                    entry["shape"] = chance.choice(
                        (entry["shape"][::-1], [1, *entry["shape"]], [0], [], [2**40, 2**40])
                    )
                case 2 if "data_offsets" in entry:
                    offsets = entry["data_offsets"]
                    entry["data_offsets"] = chance.choice(
                        ([0, 2**63], [offsets[1], offsets[0]], [-1, 4], [0, 0])
                    )
                case 3:
                    header["__metadata__"] = {chance.choice(trees.TEXTS): trees.value(chance)}
                case _:
                    header = trees.changed(chance, header)
                    break
        if chance.random() < 0.2:
            data = struct.pack("<f", float("nan")) * (len(data) // 4)
        content = packed(chance, header, data)
    return name.split("-")[0], (surroundings.kind(chance), content)


def _feed(given: tuple[str, Given], scratch: Path) -> None:
    name, (kind, content) = given
    path = scratch / "weights.safetensors"
    surroundings.put(path, content, kind)
    model = models()[name]
    load_weights(model, path)
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Wrong("weights that are not finite were loaded.")


CONFIGS = (
    {
        "model_type": "bert",
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "architectures": ["BertModel"],
        "intermediate_size": 8,
        "id2label": {"0": "a", "1": "b"},
    },
    {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
        "intermediate_size": 8,
        "num_channels": 3,
    },
    {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 9,
        "n_positions": 8,
        "auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"},
    },
    {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}},
)
EVIL = b"open('escaped', 'w').write('this must not run')\nraise SystemExit\n"


def _make_config(chance: random.Random) -> Given:
    content = trees.mixed(chance, CONFIGS)
    return surroundings.kind(chance), mutate.damaged(chance, [content]) if chance.random() < 0.1 else content


def _feed_config(given: Given, scratch: Path) -> None:
    from dptrain.models import preferences
    from dptrain.models.transformers_classifier import read_config

    folder = scratch / "model"
    surroundings.remove(folder)
    folder.mkdir()
    (folder / "configuration_evil.py").write_bytes(EVIL)
    surroundings.put(folder / "config.json", given[1], given[0])
    preferences(f"hf:{folder}")
    read_config(f"hf:{folder}", num_labels=3)


TARGETS = (
    Target("safetensors", _make, _feed, (ModelError,), 1200),
    Target("model-config", _make_config, _feed_config, (ModelError,), 150),
)
