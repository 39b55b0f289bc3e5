"""``dptrain.training.train`` on a folder of images, on either engine.

Releases are read off the weights: plain SGD takes each step.
"""

from __future__ import annotations

import tempfile
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from dptrain.training import Silent, TrainConfig, train

from .problems import Arrays, Problem, Softmax
from .subjects import Run, Task

SIZE, CLASSES, PIXELS = 24, 3, 5
LR = 0.1


class Watcher(Silent):
    """Weights before each step, and what the steps tell."""

    def __init__(self) -> None:
        self.run, self.model = Run(), None

    def prepared(self, run, folder) -> None:
        self.model = run.learner
        self._look()

    def stepped(self, step, epsilon, examples_per_s) -> None:
        self.run.told.append(step)

    def evaluated(self, step, score, epsilon) -> None:
        self._look()

    def _look(self) -> None:
        """The model holds the weights whenever it is scored, on both engines."""
        weights = {name: p.detach().numpy().copy() for name, p in self.model.named_parameters()}
        if self.run.weights:
            before = self.run.weights[-1]
            self.run.releases.append({n: (before[n].astype(np.float64) - w) / LR for n, w in weights.items()})
        self.run.weights.append(weights)


class Training:
    """A run from a configuration to its folder."""

    slack = 1.0  #: L is q N

    def __init__(self, engine: str, hardened: bool = False) -> None:
        self.engine, self.hardened = engine, hardened

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory:
        made = tempfile.TemporaryDirectory()
        images = np.random.default_rng(0).integers(0, 256, (SIZE, PIXELS, PIXELS, 3), dtype=np.uint8)
        for number, image in enumerate(images):
            for split in ("train", "test")[: 2 if number % (SIZE // CLASSES) == 0 else 1]:
                path = Path(made.name, "data", split, str(number * CLASSES // SIZE), f"{number:02}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
        return made

    def problem(self) -> Problem:
        paths = sorted(Path(self.folder.name, "data", "train").glob("*/*.png"))
        images = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
        labels = np.array([int(path.parent.name) for path in paths])
        return Softmax((images.reshape(SIZE, -1) / 127.5 - 1).astype(np.float32), labels, self._no_weights())

    @staticmethod
    def _no_weights() -> Arrays:
        return {}  # a run has its own

    def run(self, task: Task) -> Run:
        spec = task.mechanism.step(0)
        settings = {
            "data": str(Path(self.folder.name, "data")),
            "image_size": PIXELS,
            "normalization": "half",
            "workers": 0,
            "model": "linear",
            "noise_multiplier": spec.noise_multiplier,
            "delta": task.mechanism.delta or 1e-5,
            "accountant": "pld" if task.mechanism.delta else "rdp",
            "clip_norm": spec.clip_norm,
            "seed": task.seed,
            "hardened": self.hardened,
            "logical_batch_size": spec.expected_batch_size,
            "physical_batch_size": task.physical_batch_size,
            "steps": task.mechanism.steps,
            "evaluations": task.mechanism.steps,
            "optimizer": "sgd",
            "lr": LR,
            "weight_average": 0.0,
            "engine": self.engine,
            "device": "cpu",
            "out": str(Path(tempfile.mkdtemp(dir=self.folder.name), "run")),
        }
        watcher = Watcher()
        outcome = train(TrainConfig.from_dict(settings), watcher)
        watcher.run.weights.pop()
        watcher.run.epsilon = outcome.epsilon if task.mechanism.delta else None
        return watcher.run
