"""Where public test weights may lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vit_tiny_weights() -> Path:
    roots = [os.environ.get("DPTRAIN_DATA"), Path(__file__).parents[3] / "shared" / "data"]
    for root in filter(None, roots):
        path = Path(root) / "vit_tiny_patch16_224.safetensors"
        if path.is_file():
            return path
    pytest.skip("needs vit_tiny_patch16_224.safetensors in $DPTRAIN_DATA")
