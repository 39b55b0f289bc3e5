"""How a case ended. Lack of memory, what is not supported and bugs are never taken for each other."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from dptrain.bench.contestant import Unsupported
from dptrain.bench.environment import without_places
from dptrain.bench.record import Status
from dptrain.torch import Refused
from dptrain.torch.device_memory import ran_out_of_memory
from dptrain.training.config import ConfigError

LONGEST_SENTENCE = 300


@dataclass(frozen=True)
class Outcome:
    """What a function in a process of its own returned, or why it did not.

    Attributes:
        value: what it returned, where the status is ok.
        sentence, traceback: why it did not; a traceback for errors alone.
    """

    status: Status
    value: Any = None
    sentence: str | None = None
    traceback: str | None = None


def failure(error: BaseException) -> Outcome:
    """What an exception means."""
    sentence = str(error).strip().split("\n")[0][:LONGEST_SENTENCE] or type(error).__name__
    if isinstance(error, (Unsupported, Refused, ConfigError)) or _refused_by_jax(error):
        return Outcome("unsupported", sentence=sentence)
    if ran_out_of_memory(error) or _jax_ran_out_of_memory(error):
        return Outcome("out-of-memory", sentence=sentence)
    lines = "".join(traceback.format_exception(error))
    return Outcome("error", sentence=f"{type(error).__name__}: {sentence}", traceback=without_places(lines))


def _refused_by_jax(error: BaseException) -> bool:
    return type(error).__module__ == "dptrain.jax.errors" and type(error).__name__ == "Refused"


def _jax_ran_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
