"""Processes that train one model together, as far as they tell each other what one of them decides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another process ended or failed, and this one cannot go on without it."""


class Team(ABC):
    """The processes of one training. The first of them leads: it has the key, the ledger and the files.

    Every method is called by all of them in the same order, or they wait for each other for ever.

    Attributes:
        leads: whether this process is the first.
    """

    leads: bool

    @abstractmethod
    def tell(self, value: Any = None) -> Any:
        """The first one's value, which JSON can express, on all.

        Raises:
            RankLost: it has ended.
        """

    def lead(self, action: Callable[[], T]) -> T:
        """What ``action`` returns on the first, which alone runs it, on all; JSON can express it.

        Raises:
            Exception: on the first, what ``action`` raises.
            RankLost: on the others then.
        """
        if not self.leads:
            answer = self.tell()
            if "failed" in answer:
                raise RankLost(f"rank 0 failed: {answer['failed']}")
            done: T = answer["done"]
            return done
        try:
            done = action()
        except BaseException as error:
            self.tell({"failed": str(error) or type(error).__name__})
            raise
        self.tell({"done": done})
        return done
