"""Work that threads do before it is asked for, a bounded number of items ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, depth: int
) -> Iterator[Result]:
    """`function` of each item, in order; at most `depth` results are under way or wait to be taken.

    Items are taken by the thread that takes results. What `function` raises is raised in the place of its
    result, after those before it. When the iterator ends, is closed or is forgotten, nothing new is begun,
    and what was begun is waited for: no thread outlives it.

    threads: 0 calls the function when its result is asked for.
    """
    if threads == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="dptrain-read") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= max(1, depth):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
