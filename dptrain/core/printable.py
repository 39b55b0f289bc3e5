"""Text that can be shown to people: names and paths come from files that anybody may have written.

A terminal obeys escape sequences, and bidirectional overrides make a name read as another.
"""

import unicodedata

_LONGEST = 200  # characters of a library's own words
_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def is_printable(text: str) -> bool:
    """Whether a text is free of control characters, halves of characters and overrides of direction."""
    return (text.isascii() and text.isprintable()) or not any(map(_is_hidden, text))


def printable(text: str, keep: str = "\n\t") -> str:
    r"""`text` with such characters spelt out (``\x1b``), but for those in `keep`."""
    if is_printable(text):
        return text
    return "".join(_spelt(c) if c not in keep and _is_hidden(c) else c for c in text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs") or character in _OVERRIDES


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode()


def reason(error: BaseException) -> str:
    """What a library's error says, as a part of a sentence: its first line, short and without a full stop.

    Errors that speak of the library's inside are told by what brings them about.
    """
    if isinstance(error, (AttributeError, TypeError, LookupError, AssertionError)):
        return "it holds values of another kind than is expected"
    if isinstance(error, RecursionError):
        return "it nests too deep"
    lines = str(error).strip().splitlines()
    line = lines[0].strip().rstrip(".:") if lines else ""
    return line[:_LONGEST] + " ..." * (len(line) > _LONGEST) if line else type(error).__name__
