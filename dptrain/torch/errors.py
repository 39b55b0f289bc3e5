"""What the engine says when it will not go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .device_memory import ran_out_of_memory

WRITTEN = (
    "the forward pass writes to the model's parameters, which would be released without any "
    "protection: keep such state in buffers that do not depend on the data, or freeze the module."
)


CARRIED = (
    "the model carries data from one batch to the next, in an attribute or a buffer, so that examples "
    "mix over the steps: reset such state at the beginning of each forward pass."
)


class Refused(RuntimeError):
    """A model, a batch or a request for which an exact private gradient cannot be promised.

    Raised before anything is released: no privacy budget is spent, no parameter has changed.
    """


class Unforeseen(Refused):
    """A gradient came where the probe saw none but zeros."""


class Changed(Refused):
    """A step does other than what the probe saw."""


class Misfit(Refused):
    """The examples of a use are not where the probe had them; ``pattern`` tells its like."""

    def __init__(self, message: str, pattern: tuple):
        super().__init__(message)
        self.pattern = pattern


class Together(Refused):
    """Raised on all ranks at once, in the same place: at least one of them could not go on.

    Attributes:
        own: this rank's own reason, if it has one.
        unforeseen: whether all reasons are that some gradient came where the probe saw none.
    """

    def __init__(self, own: Refused | None, unforeseen: bool):
        super().__init__(str(own or "another rank could not clip its part of the batch, and says why."))
        self.own, self.unforeseen = own, unforeseen


@contextlib.contextmanager
def refusing(sentence: str) -> Iterator[None]:
    """Within, an error is a refusal: ``sentence``, with ``{}`` for what the error says.

    Raises:
        Refused: instead of any error that is not final.
    """
    try:
        yield
    except Exception as error:
        if is_final(error):
            raise
        raise Refused(sentence.format(error)) from error


def is_final(error: BaseException) -> bool:
    """Whether an error is no trait of the rows that were tried: a refusal, or lack of memory.

    A check that such an error cut short has not been passed.
    """
    return isinstance(error, Refused) or ran_out_of_memory(error)
