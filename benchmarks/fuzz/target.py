"""What is fuzzed, and what may come of an input."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["accepted", "refused", "bug"]
LONGEST_SENTENCE = 700  # characters; paths of temporary folders are among them


@dataclass(frozen=True)
class Target:
    """One thing that reads inputs.

    Attributes:
        make: an input from random numbers: the same ones give the same input.
        feed: read an input, in a scratch folder; raises what the reader raises, or `Unclear`.
        refusals: the exceptions that are a proper answer to a bad input.
        speed: inputs per second on one core, roughly: slow targets get fewer.
    """

    name: str
    make: Callable[[random.Random], Any]
    feed: Callable[[Any, Path], None]
    refusals: tuple[type[BaseException], ...]
    speed: float = 2000.0

    def input(self, seed: int, number: int) -> Any:
        """Input `number` of a seed."""
        return self.make(random.Random(f"{seed}:{self.name}:{number}"))


class Wrong(Exception):
    """A reader took an input and gave something that cannot be, or refused it with poor words."""


@dataclass(frozen=True)
class Result:
    """What came of one input.

    Attributes:
        kind: of a bug: its exception, or ``unclear``, ``hang``, ``memory``, ``crash``.
        told: the message.
        place: of a bug, where in dptrain, so that alike ones are counted together.
    """

    verdict: Verdict
    kind: str = ""
    told: str = ""
    place: str = ""


def judge(target: Target, given: Any, scratch: Path) -> Result:
    """Feed one input and say what came of it."""
    try:
        target.feed(given, scratch)
    except MemoryError as error:
        return Result("bug", "memory", str(error), place(error))
    except target.refusals as error:
        fault = unclear(str(error), scratch)
        if not fault:
            return Result("refused", type(error).__name__, str(error))
        return Result("bug", f"unclear: {fault}", str(error), place(error))
    except Exception as error:
        return Result("bug", type(error).__name__, str(error), place(error))
    return Result("accepted")


def unclear(message: str, scratch: Path) -> str:
    """Why a message is not one clear sentence; empty if it is.

    Paths are taken out first: their names are the input's.
    """
    message = re.sub(re.escape(str(scratch)) + r"[^\s(;:,]*", "FILE", message)
    if not message.strip():
        return "it is empty"
    if not message.rstrip().endswith((".", ")", "?", "!")):
        return "it has no end"
    if len(message) > LONGEST_SENTENCE:
        return "it is too long"
    if "Traceback" in message or "\n" in message:
        return "it has several lines"
    if re.search(r"object has no attribute|takes \d+ positional|unexpected keyword", message):
        return "it speaks of the inside"
    if len(message.split()) < 4:
        return "it says too little"
    return ""


def place(error: BaseException) -> str:
    """The innermost line of dptrain in a traceback, else the innermost of all."""
    trace, found, last = error.__traceback__, "", ""
    while trace is not None:
        code = trace.tb_frame.f_code
        last = f"{Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}"
        if "/dptrain/" in code.co_filename:
            found = last
        trace = trace.tb_next
    return found or last
