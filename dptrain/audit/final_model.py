"""Many short trainings with and without one canary, of which the adversary sees the last weights alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dptrain.audit.bounds import Evidence
from dptrain.audit.scenes import PHYSICAL_BATCH_SIZE, Scene
from dptrain.audit.subjects import Subject, Training, for_batches_of
from dptrain.core.entropy import Key
from dptrain.core.mechanism import Mechanism


def watch(
    subject: Subject,
    scene: Scene,
    name: str,
    runs: int,
    mechanism: Mechanism,
    key: Key,
    progress: Callable[[int, int], None],
    device: str = "cpu",
) -> list[Evidence]:
    """Train `runs` times, on a coin's word with the canary or without.

    Args:
        name: of the scene.
        mechanism: its L becomes that of the larger data set: it is public, and the same for both.
        key: of coins and data.
        progress: hears of ``(runs done, runs)``.

    Raises:
        Unsupported: the subject is not here, or refuses the model.
    """
    subject = subject.for_many_trainings()
    present = key.child("coins").numpy_generator().random(runs) < 0.5
    problems = [scene.make(there, mechanism.clip_norm, key.child("data")) for there in (False, True)]
    mechanism = for_batches_of(mechanism, mechanism.sample_rate * problems[True].size)
    how = Training(mechanism, scene.learning_rate, PHYSICAL_BATCH_SIZE, device)
    unit = scene.learning_rate * mechanism.clip_norm / mechanism.expected_batch_size
    scores: dict[str, list[float]] = {}
    for run, there in enumerate(present):
        problem = problems[int(there)]
        trajectory = subject.train(problem, how)
        first = next(trajectory)
        *_, last = trajectory
        moved = {weight: last[weight] - first[weight] for weight in last}
        for adversary, score in problem.scores(moved, unit).items():
            scores.setdefault(adversary, []).append(score)
        progress(run + 1, runs)
    return [Evidence(f"{name}: {adversary}", np.array(s), present) for adversary, s in scores.items()]
