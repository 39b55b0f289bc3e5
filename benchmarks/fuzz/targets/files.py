"""Targets that read one file."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fuzz import mutate, surroundings, trees
from benchmarks.fuzz.target import Target

Given = tuple[str, bytes]
"""What stands there, and its content."""
Refusals = tuple[type[BaseException], ...]


def of_bytes(
    name: str,
    file: str,
    seeds: Sequence[bytes],
    parse: Callable[[Path], Any],
    refusals: Refusals,
    speed: float = 2000.0,
) -> Target:
    """A reader of binary files."""
    return _target(name, file, lambda chance: mutate.damaged(chance, seeds), parse, refusals, speed)


def of_json(
    name: str,
    file: str,
    seeds: Sequence[Any],
    parse: Callable[[Path], Any],
    refusals: Refusals,
    speed: float = 2000.0,
) -> Target:
    """A reader of JSON: changed as a tree for the most part, and now and then as bytes."""

    def content(chance: random.Random) -> bytes:
        made = trees.mixed(chance, seeds)
        return mutate.damaged(chance, [made]) if chance.random() < 0.2 else made

    return _target(name, file, content, parse, refusals, speed)


def of_json_lines(
    name: str,
    file: str,
    seeds: Sequence[Any],
    parse: Callable[[Path], Any],
    refusals: Refusals,
    speed: float = 2000.0,
) -> Target:
    """A reader of one JSON object a line."""

    def content(chance: random.Random) -> bytes:
        lines = []
        for _ in range(chance.choice((0, 1, 2, 3, 20))):
            tree = chance.choice(seeds)
            tree = trees.changed(chance, tree) if chance.random() < 0.3 else tree
            lines.append(trees.text(chance, tree).replace("\n", " ").encode("utf-8", "surrogatepass") + b"\n")
        made = b"".join(lines)
        return mutate.damaged(chance, [made]) if chance.random() < 0.3 else made

    return _target(name, file, content, parse, refusals, speed)


def _target(
    name: str,
    file: str,
    content: Callable[[random.Random], bytes],
    parse: Callable[[Path], Any],
    refusals: Refusals,
    speed: float,
) -> Target:
    def make(chance: random.Random) -> Given:
        return surroundings.kind(chance), content(chance)

    def feed(given: Given, scratch: Path) -> None:
        path = scratch / file
        surroundings.put(path, given[1], given[0])
        parse(path)

    return Target(name, make, feed, refusals, speed)
