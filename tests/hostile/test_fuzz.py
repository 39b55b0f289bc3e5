"""A part of `python -m benchmarks.fuzz`: damaged inputs are refused in one sentence, or taken and right."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("jax")
for library in ("pandas", "plotly", "jinja2", "transformers"):
    pytest.importorskip(library)

if sys.platform != "linux":
    pytest.skip("memory is limited by Linux's means", allow_module_level=True)

from benchmarks.fuzz import worker  # noqa: E402
from benchmarks.fuzz.target import Result, Target, Wrong, judge  # noqa: E402
from benchmarks.fuzz.targets import TARGETS  # noqa: E402

SECONDS = 0.5  # of a fast machine, for each target
MOST, LEAST = 1000, 8


def inputs(target: Target) -> int:
    return min(MOST, max(LEAST, round(SECONDS * target.speed)))


def fuzz(target: Target, numbers: range, folder: Path) -> Counter[str]:
    found: Counter[str] = Counter()
    with worker.limited_memory(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in numbers:
            given = target.input(1, number)
            result = worker.one(target, given, folder)
            found[result.verdict] += 1
            assert result.verdict != "bug", f"{target.name}:{number}: {result} of {given!r:.300}"
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_are_taken_or_refused(name, tmp_path):
    found = fuzz(TARGETS[name], range(inputs(TARGETS[name])), tmp_path)
    assert found["accepted"] or found["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_many_inputs_are_taken_or_refused(name, tmp_path):
    fuzz(TARGETS[name], range(MOST, MOST + 40 * inputs(TARGETS[name])), tmp_path)


def test_an_input_is_the_same_every_time():
    for name in ("image", "safetensors", "config-json", "command-line", "mechanism"):
        assert repr(TARGETS[name].input(3, 14)) == repr(TARGETS[name].input(3, 14))
        assert repr(TARGETS[name].input(3, 14)) != repr(TARGETS[name].input(3, 15))


def _raise(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("feed", "kind"),
    [
        (lambda *_: _raise(KeyError("x")), "KeyError"),
        (lambda *_: _raise(ValueError("invalid literal for int() with base 10")), "unclear"),
        (lambda *_: _raise(ValueError("")), "unclear"),
        (lambda *_: _raise(ValueError("One line.\nAnother line.")), "unclear"),
        (lambda *_: _raise(ValueError("The 'str' object has no attribute 'get'.")), "unclear"),
        (lambda *_: _raise(Wrong("two and two are five.")), "Wrong"),
        (lambda *_: _raise(MemoryError()), "memory"),
        (lambda *_: bytearray(1 << 40), "memory"),
        (lambda *_: [None for _ in iter(int, 1)], "hang"),
    ],
)
def test_bugs_are_seen(feed, kind, tmp_path):
    target = Target("bad", lambda chance: None, feed, (ValueError,))
    with worker.limited_memory(1 << 30):
        assert worker.one(target, None, tmp_path, limit_s=0.2).kind.startswith(kind)


def test_a_refusal_is_no_bug(tmp_path):
    sentence = f"{tmp_path}/x.png is not a readable image; repair or remove it."
    target = Target("good", lambda chance: None, lambda *_: _raise(ValueError(sentence)), (ValueError,))
    assert judge(target, None, tmp_path) == Result("refused", "ValueError", sentence)
