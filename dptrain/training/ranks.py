"""The processes of a run: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from dptrain.torch.ranks import ALONE, Ranks, all_ranks
from dptrain.training.config import ConfigError

PATIENCE = timedelta(hours=1)
"""How long ranks wait for one that hangs, or for rank 0 while it evaluates. A dead one is noticed at once."""


def started_by_torchrun() -> bool:
    """Whether the environment says that this is one of several processes, as torchrun has it."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within, all processes that torchrun started are one group: NCCL where there are GPUs, else gloo.

    Raises:
        ConfigError: there are fewer GPUs here than processes.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has none of its {torch.cuda.device_count()} GPUs to "
                "itself: start as many as there are (torchrun --nproc-per-node gpu)."
            )
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield all_ranks()
    finally:
        with suppress(Exception):  # of ranks that have ended already
            dist.destroy_process_group()
