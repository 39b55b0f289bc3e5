"""The same private run on both engines, over seeds: does the framework change the accuracy?

python -m benchmarks.engines --data-dir DATA --weights vit_tiny_patch16_224.safetensors --out results/...
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.record import save
from dptrain.bench.environment import environment
from dptrain.training import TrainConfig, train

CONFIG = {
    "data": "cifar100",
    "model": "vit-tiny",
    "image_size": 64,
    "epsilon": 8.0,
    "delta": 1e-5,
    "clip_norm": 4.63,
    "method": "auto",
    "logical_batch_size": 1000.0,
    "physical_batch_size": 40,
    "steps": 16,
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_average": 0.0,
    "evaluations": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    config = TrainConfig.from_dict(CONFIG | {"data_dir": given.data_dir, "weights": given.weights})
    accuracy: dict[str, list[float]] = {"torch": [], "jax": []}
    for seed in range(given.seeds):
        for engine, found in accuracy.items():
            with tempfile.TemporaryDirectory() as folder:
                run = replace(config, engine=engine, seed=seed, out=Path(folder) / "run")  # type: ignore
                outcome = train(run)
            found.append(outcome.score.accuracy)
            print(f"seed {seed}, {engine}: {outcome.score.accuracy:.4f} in {outcome.training_s:.0f} s")
    record = {
        "kind": "engines",
        "what": "ViT-Tiny, all parameters, 64 pixels, 8,000 images of CIFAR-100, 2 epochs, ε = 8",
        "config": json.loads(json.dumps(CONFIG)),
        "environment": environment(),
        "accuracy": accuracy,
    }
    record["environment"]["command"] = "python -m benchmarks.engines"
    save(record, given.out)


if __name__ == "__main__":
    main()
