"""Features kept in a folder: the next run of the same backbone on the same images need not compute them."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dptrain.data.features import Features, cache_features, named_features
from dptrain.data.protocol import DataError, Dataset, Inputs
from dptrain.data.resident import ResidentImages


@dataclass(frozen=True)
class FeatureStore:
    """A folder with a file for each (images, preprocessing, backbone), named by a digest of all three.

    A file holds what was made of private examples: it is to be kept where they are. Nothing is kept if
    `folder` is None, nor of data sets that are not in memory: all they hold would have to be read for the
    digest.
    """

    folder: Path | None = None

    def features(
        self,
        dataset: Dataset,
        backbone: Callable[[Inputs], torch.Tensor],
        made_by: str,
        batch_size: int = 64,
    ) -> Features:
        """`cache_features(dataset, backbone, batch_size)`, or what it gave before.

        made_by: whatever the backbone depends on, its weights included; it is digested, not stored.
        Raises DataError if the folder cannot be written or a file in it cannot be read.
        """
        if self.folder is None or not isinstance(dataset, ResidentImages):
            return cache_features(dataset, backbone, batch_size)
        path = self.folder / f"{_digest(dataset, made_by)}.safetensors"
        try:
            if path.exists():
                rows = load_file(path, device=str(dataset.device))["features"]
                return named_features(dataset, rows, dataset.labels.to(dataset.device))
            made = cache_features(dataset, backbone, batch_size)
            self.folder.mkdir(parents=True, exist_ok=True)
            # Whole or not there: others may look for it meanwhile.
            partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
            save_file({"features": made.rows.contiguous()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"--keep-features: {path} cannot be used ({error}); remove it, or choose another folder."
            ) from error
        return made


def digest_of_weights(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(dataset: ResidentImages, made_by: str) -> str:
    digest = hashlib.sha256(f"{made_by}; {dataset.preprocess}; torch {torch.__version__};".encode())
    digest.update(digest_of_weights(dataset.stored).encode())
    return digest.hexdigest()
