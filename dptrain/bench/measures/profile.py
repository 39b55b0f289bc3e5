"""Time by section of a step, beside that of ordinary training, and traces."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dptrain.bench import race
from dptrain.bench.case import Case
from dptrain.bench.contestant import Contestant, Unsupported
from dptrain.bench.engines import framework
from dptrain.bench.measures.one_way import alone
from dptrain.bench.timeline import medians, profiled, seconds_by_section
from dptrain.data import Preprocess
from dptrain.data.resident import ResidentImages
from dptrain.training.device import matmul_precision

#: as many steps are profiled
STEPS = 5
#: physical batches that the images to draw from would fill
POOL = 8


def profile(case: Case, folder: Path | None = None) -> dict[str, Any]:
    """Medians over steps of one physical batch and an end.

    folder: where the traces of the last step go.

    Raises:
        Unsupported: the engine is JAX, which XLA compiles to one piece.
    """
    if framework(case) == "jax":
        raise Unsupported("a step in JAX is one compiled piece: its sections cannot be told apart.")
    if case.device.startswith("cuda"):  # before CUDA begins: each section then ends with its kernels
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    ordinary = replace(case, engine="torch", method="non-private", budget_mib=None)
    with matmul_precision(case.precision):
        samples = {}
        for name, one in (("", case), ("baseline_", ordinary)):
            contestant = alone(one)
            race.warm_up(contestant)
            trace = None if folder is None else folder / f"{name}{case.id}.json"
            samples[name] = _sections(contestant, case.device, trace, fetching(case))
    return {
        "sections_s": medians(samples[""]),
        "baseline_sections_s": medians(samples["baseline_"]),
        "raw_sections_s": samples[""],
        "traces": [] if folder is None else [f"{name}{case.id}.json" for name in samples],
    }


def fetching(case: Case) -> Callable[[], object]:
    """Gets a physical batch as a training run does: a gather from images on the device, normalised there.

    Token sequences take next to nothing; nothing is fetched of them.
    """
    if case.model == "gpt2-like":
        return lambda: None
    count, side = POOL * case.batch_size, case.image_size
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(case.num_classes, (count,))
    data = ResidentImages("random", images, labels, case.num_classes, Preprocess(), case.device)
    return lambda: data.gather(torch.randint(count, (case.batch_size,)))


def _sections(
    contestant: Contestant, device: str, trace: Path | None, fetch: Callable[[], object]
) -> dict[str, list[float]]:
    steps = [profiled(contestant, device, fetch=fetch) for _ in range(STEPS - 1)]
    return seconds_by_section([*steps, profiled(contestant, device, trace, fetch)])
