"""Files that anybody may have written: read whole within a limit, or refused.

Only regular files are opened, so that a pipe or a device cannot keep a reader waiting for ever, and the size
is looked at before any memory is taken.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

MIB = 2**20
TEXT_LIMIT = 16 * MIB
"""Bytes that a file of settings or of numbers may have: a thousand times what any has."""


class Unreadable(ValueError):
    """Why a file cannot be used, as the end of a sentence that begins with its name: "is a folder"."""


def size_of(path: str | os.PathLike[str], limit: int) -> int:
    """The size in bytes of a regular file of at most `limit` bytes.

    Raises:
        Unreadable: there is none, it is something else, or it is larger.
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:
        raise Unreadable(_reason(error)) from error
    if stat.S_ISDIR(found.st_mode):
        raise Unreadable("is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise Unreadable("is not a regular file")
    if found.st_size > limit:
        raise Unreadable(f"has {found.st_size:,} bytes, more than the {limit:,} that are ever read")
    return found.st_size


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises Unreadable."""
    size_of(path, limit)
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise Unreadable(_reason(error)) from error
    if len(content) > limit:
        raise Unreadable(f"grew beyond the {limit:,} bytes that are ever read")
    return content


def read_text(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> str:
    """As `read_bytes`, of UTF-8."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 (at byte {error.start})") from error


def read_json(path: str | os.PathLike[str], limit: int = TEXT_LIMIT) -> Any:
    """The value in a JSON file. Raises Unreadable, also where a key is given twice."""
    return parse_json(read_text(path, limit))


def parse_json(text: str) -> Any:
    """The value that JSON text describes. Raises Unreadable, also where a key is given twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"is not valid JSON ({error})") from error
    except RecursionError as error:
        raise Unreadable("is JSON that nests too deep") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise Unreadable(f"gives {twice[:60]!r} twice")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"
