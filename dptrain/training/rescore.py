"""The score of a finished run's model, from its files alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dptrain.models import preferences
from dptrain.training.device import matmul_precision, resolve_device
from dptrain.training.evaluation import Score, evaluate
from dptrain.training.make_model import make_model
from dptrain.training.prepare import load_splits
from dptrain.training.run_folder import RunFolder


def rescore(
    path: Path, data_dir: Path | None = None, device_name: str = "auto"
) -> tuple[RunFolder, str, Score]:
    """Evaluate the saved weights on what the run held out: (folder, their name, score)."""
    folder = RunFolder.open(path)
    config = folder.config
    if data_dir is not None:
        config = replace(config, data_dir=data_dir)
    device = resolve_device(device_name)
    splits = load_splits(config, preferences(config.model), device)
    # The weights that the run began with are not needed again.
    model = make_model(replace(config, pretrained=False, weights=None), splits).model
    folder.load_model(model)
    with matmul_precision(config.precision):
        score = evaluate(model.to(device), splits.test, config.precision, device)
    return folder, splits.test_name, score
