"""Damage to JSON: values of other types, huge and undefined numbers, deep nests, keys twice, bad texts."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

NESTED = "\0nested"
"""Stands for a value nested deeper than Python's stack, which no parser may fall over."""

TEXTS = (
    "",
    " ",
    ".",
    "..",
    "../../../tmp/escape",
    "/etc/passwd",
    "/dev/zero",
    "a" * 300,
    "a/b",
    "a\\b",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x00",
    "a\x00b",
    "\x1b[2J\x1b[31mred",
    "\x9b31m",
    "\x07",
    "[bold red]x[/]",
    "[/nothing]",
    "[link=http://x]y[/link]",
    "\\",
    "x\\",
    "\u202egnp.exe",
    "\ud800",
    "\uffff",
    "é",
    "𝒳",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "0x10",
    "true",
    "null",
    "auto",
    "os:system",
    "builtins:exec",
    "posix:fork",
    "hf:..",
    "hf:",
    "file:///etc/passwd",
    "{{7*7}}",
    "<script>alert(1)</script>",
    "$(id)",
    "%s%n",
    "(?P<x>a+)+$",
    "*",
    "?",
    "**/*",
    "~",
    "NUL",
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    10,
    255,
    256,
    1000,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1.5,
    1e-5,
    1e-300,
    5e-324,
    1e300,
    1.7e308,
    -1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": {}}}, [1, 2, 3], ["x"], NESTED)


def value(chance: random.Random) -> Any:
    """Something that is probably not what was expected."""
    return copy.deepcopy(chance.choice(chance.choice((TEXTS, NUMBERS, OTHERS))))


def changed(chance: random.Random, tree: Any) -> Any:
    """A copy of a JSON tree with one to four changes."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        tree = _change(chance, tree)
    return tree


def _change(chance: random.Random, tree: Any) -> Any:
    places = list(_places(tree))
    if not places or chance.random() < 0.03:
        return value(chance)
    holder, key = chance.choice(places)
    match chance.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice((key, *TEXTS[:20]))] = value(chance)
        case 2 if isinstance(holder, dict):
            holder[chance.choice(TEXTS)] = holder.pop(key)
        case 3 if isinstance(holder, list):
            holder.extend([holder[key]] * chance.choice((1, 3, 300)))
        case 4:
            other_holder, other_key = chance.choice(places)
            if holder is not other_holder:
                holder[key] = json.loads(json.dumps(other_holder[other_key]))
        case 5 if isinstance(holder[key], str):
            text = holder[key]
            at = chance.randrange(len(text) + 1)
            holder[key] = text[:at] + chance.choice(TEXTS) + text[at:]
        case 6 if isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = chance.choice((-holder[key], str(holder[key]), [holder[key]], holder[key] + 1))
        case _:
            holder[key] = value(chance)
    return tree


def _places(tree: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    if depth > 12:
        return []
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    found = [(tree, key) for key in keys]
    for key in keys:
        found += _places(tree[key], depth + 1)
    return found


def text(chance: random.Random, tree: Any) -> str:
    """JSON of a tree as a hostile hand writes it: NaN, keys twice, nests of a hundred thousand brackets."""
    written = json.dumps(tree, ensure_ascii=chance.random() < 0.5, indent=chance.choice((None, 1)))
    deep = chance.choice((50, 990, 5000, 100_000))
    bracket = chance.choice(("[]", '{"a":}'))
    start, end = bracket[:-1], bracket[-1]
    written = written.replace(json.dumps(NESTED), start * deep + "1" + end * deep)
    if chance.random() < 0.1 and written.startswith("{") and (first := json.dumps(tree)[1:].split(",")[0]):
        written = "{" + first.rstrip("}") + "," + written[1:]  # a key twice
    return written


def encoded(chance: random.Random, tree: Any) -> bytes:
    """Bytes of `text`, mostly UTF-8, now and then of another encoding."""
    written = text(chance, tree)
    encoding = chance.choice(("utf-8",) * 12 + ("utf-16", "utf-8-sig", "latin-1", "utf-32"))
    return written.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def mixed(chance: random.Random, trees: Sequence[Any]) -> bytes:
    """One of the trees, changed, as bytes."""
    return encoded(chance, changed(chance, chance.choice(trees)))
