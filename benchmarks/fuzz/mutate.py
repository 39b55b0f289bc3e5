"""Damage to bytes: what bad disks, cut downloads and attackers do."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

EXTREMES = (0, 1, 2, 3, 4, 7, 8, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1)
WIDE_EXTREMES = (*EXTREMES, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
MOST = 1 << 16  # bytes that an input grows to


def damaged(chance: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds after one to six injuries; now and then whole, or nothing but noise."""
    content = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        chance.choice(INJURIES)(chance, content, seeds)
        del content[MOST:]
    return bytes(content)


def _flip_bits(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    for _ in range(chance.choice((1, 1, 2, 8))):
        if content:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def _set_bytes(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    if content:
        content[_near_start(chance, len(content))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x1B, 0x22))


def _cut(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    del content[chance.choice((_near_start, _anywhere))(chance, len(content) + 1) :]


def _remove(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    start = _anywhere(chance, len(content) + 1)
    del content[start : start + chance.choice((1, 2, 4, 16, 100))]


def _repeat(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    start = _anywhere(chance, len(content) + 1)
    piece = content[start : start + chance.choice((1, 4, 16, 100, 1000))]
    content[start:start] = piece * chance.choice((1, 2, 50))


def _insert_noise(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    content[(at := _anywhere(chance, len(content) + 1)) : at] = chance.randbytes(chance.choice((1, 4, 64)))


def _splice(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    other = chance.choice(seeds)
    content[_anywhere(chance, len(content) + 1) :] = other[_anywhere(chance, len(other) + 1) :]


def _extreme_length(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    """A field of 2, 4 or 8 bytes, mostly in a header, says something very small or very large."""
    width = chance.choice((2, 4, 4, 4, 8))
    if len(content) < width:
        return
    at = _near_start(chance, len(content) - width + 1)
    order = chance.choice(("big", "little"))
    value = chance.choice(WIDE_EXTREMES) % (1 << 8 * width)
    content[at : at + width] = value.to_bytes(width, order)


def _noise(chance: random.Random, content: bytearray, seeds: Sequence[bytes]) -> None:
    if chance.random() < 0.1:
        content[:] = chance.randbytes(chance.choice((1, 16, 300)))


def _anywhere(chance: random.Random, end: int) -> int:
    return chance.randrange(max(1, end))


def _near_start(chance: random.Random, end: int) -> int:
    """Headers are short and say the most."""
    return min(int(chance.expovariate(1 / 16)), max(0, end - 1))


INJURIES: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip_bits,
    _flip_bits,
    _set_bytes,
    _cut,
    _remove,
    _repeat,
    _insert_noise,
    _splice,
    _extreme_length,
    _extreme_length,
    _noise,
)
