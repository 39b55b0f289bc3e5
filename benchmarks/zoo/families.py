"""The catalogue: every entry of the zoo."""

from __future__ import annotations

from . import (
    adapters,
    hub_audio,
    hub_multimodal,
    hub_text,
    hub_vision,
    plain,
    timm_convolutions,
    timm_transformers,
)
from .entry import Entry

HOMES = (
    timm_transformers,
    timm_convolutions,
    hub_text,
    hub_vision,
    hub_audio,
    hub_multimodal,
    adapters,
    plain,
)
CATALOGUE: list[Entry] = [entry for home in HOMES for entry in home.ENTRIES]
