"""The score of a finished run's model, from its files alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dptrain.models import build, preferences
from dptrain.training.device import matmul_precision, resolve_device
from dptrain.training.evaluation import Score, evaluate
from dptrain.training.prepare import held_out_name, load_splits
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
    model = build(config.model, splits.num_classes, splits.input_shape, weights=folder.weights).to(device)
    with matmul_precision(config.precision):
        score = evaluate(model, splits.test, config.precision, device)
    return folder, held_out_name(config), score
