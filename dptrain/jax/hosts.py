"""What several processes agree on: process 0 decides, and all hear of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from dptrain.core.printable import reason
from dptrain.core.team import RankLost, Team


class Processes(Team):
    """Those of jax.distributed; one if it is not initialised."""

    def __init__(self) -> None:
        self.leads = jax.process_index() == 0

    def tell(self, value: Any = None) -> Any:
        """As of ``Team``."""
        if jax.process_count() == 1:
            return value
        text = json.dumps(value).encode() if self.leads else b""
        with _lost_processes():
            size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
            message = np.zeros(size, np.uint8)
            message[: len(text)] = np.frombuffer(text, np.uint8)
            heard = multihost_utils.broadcast_one_to_all(message)
        return json.loads(bytes(np.asarray(heard)))

    def total(self, number: int) -> int:
        """The sum of all processes' numbers. Called by all."""
        if jax.process_count() == 1:
            return number
        with _lost_processes():
            return int(multihost_utils.process_allgather(np.int32(number)).sum())


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        raise RankLost(f"another process has ended, and this one stops ({reason(error)}).") from error


def check_the_same(what: str, numbers: Sequence[int]) -> None:
    """Raises ValueError, on all processes: they differ in these numbers."""
    heard = multihost_utils.process_allgather(np.array(numbers, np.int64))
    if (heard != heard[0]).any():
        raise ValueError(f"{what} must be the same on all processes, and they have {heard.tolist()}.")


def own_rows(x: Array) -> np.ndarray:
    """Of an array whose rows are divided among all devices, those of this process's, in their order."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def gathered(x: Array) -> np.ndarray:
    """An array on the host, whole: all processes that have shards of it take part."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
