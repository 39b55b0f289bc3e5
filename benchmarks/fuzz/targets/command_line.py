"""The command line, up to where a command would begin to work."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from unittest import mock

from benchmarks.fuzz import trees
from benchmarks.fuzz.target import Target, Wrong
from dptrain import cli
from dptrain.training import TrainConfig

GOOD = (
    "1",
    "0",
    "-1",
    "0.5",
    "3",
    "8",
    "1e-5",
    "1e5",
    "auto",
    "all",
    "head",
    "fp32",
    "bf16",
    "cpu",
    "torch",
    "jax",
    "digits",
    "linear",
    "vit-tiny",
    "adam",
    "True",
    "throughput",
    "memory",
    "accuracy",
    "fig1",
    "md",
    "rdp",
    "pld",
    "steps=3",
    "lr=nan",
    "=",
    "a=b=c",
    "16GB",
    "1e400GB",
    "auto jax:auto",
)
FLAGS: dict[str, tuple[str, ...]] = {
    "train": (
        *("--" + name.replace("_", "-") for name in TrainConfig().to_dict()),
        "--config",
        "--recipe",
    ),
    "evaluate": ("--data-dir", "--device"),
    "check": (
        "--method",
        "--trainable",
        "--batch-size",
        "--image-size",
        "--length",
        "--num-classes",
        "--task",
        "--config",
        "--weights",
        "--convert",
        "--allow-unused",
        "--memory",
        "--device",
        "--all",
        "--json",
    ),
    "bench": (
        "--method",
        "--engine",
        "--model",
        "--image-size",
        "--batch-size",
        "--precision",
        "--compile",
        "--channels-last",
        "--device",
        "--devices",
        "--accumulate",
        "--memory-gib",
        "--budget-mib",
        "--seconds",
        "--seeds",
        "--set",
        "--num-classes",
        "--out",
        "--list",
        "compare",
    ),
    "reproduce": ("--scale", "--out", "--list", "all", "fig1", "table2"),
    "report": ("--formats",),
    "privacy": (
        "--delta",
        "--epsilon",
        "--noise-multiplier",
        "--steps",
        "--epochs",
        "--sample-rate",
        "--logical-batch-size",
        "--dataset-size",
        "--accountant",
        "--as-json",
    ),
}
PRIVACY = (
    ["--delta", "1e-5", "--noise-multiplier", "8", "--steps", "20", "--sample-rate", "0.5"],
    [
        "--delta",
        "1e-5",
        "--epsilon",
        "3",
        "--steps",
        "20",
        "--logical-batch-size",
        "8",
        "--dataset-size",
        "64",
    ],
    [
        "--delta",
        "1e-5",
        "--epsilon",
        "3",
        "--noise-multiplier",
        "2",
        "--sample-rate",
        "0.25",
        "--accountant",
        "rdp",
    ],
)


def _word(chance: random.Random) -> str:
    """What a shell can hand over: anything but a zero byte."""
    text = chance.choice(GOOD) if chance.random() < 0.6 else str(trees.value(chance))
    text = text.replace("\0", "")[:400]
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


def _arguments(command: str, chance: random.Random) -> list[str]:
    words = []
    for _ in range(chance.choice((0, 1, 1, 2, 3, 6))):
        flag = chance.choice(FLAGS[command])
        if chance.random() < 0.05:
            flag = chance.choice((flag[:-1], flag.upper(), "--" + _word(chance), "-" + flag))
        match chance.randrange(6):
            case 0:
                words.append(f"{flag}={_word(chance)}")
            case 1:
                words.append(flag)
            case 2:
                words.append(_word(chance))
            case _:
                words += [flag, _word(chance)]
    return [command, *words]


def _anything(chance: random.Random) -> list[str]:
    if chance.random() < 0.02:
        return [_word(chance) for _ in range(chance.choice((0, 1, 2)))]
    return _arguments(
        chance.choice(("train", "train", "evaluate", "check", "bench", "reproduce", "report")), chance
    )


def _privacy(chance: random.Random) -> list[str]:
    words = list(chance.choice(PRIVACY))
    for _ in range(chance.choice((0, 1, 1, 2))):
        at = chance.randrange(len(words))
        words[at] = _word(chance) if at % 2 else chance.choice(FLAGS["privacy"])
    return ["privacy", *words]


class Begun(Exception):
    """The command has understood its arguments and would now work."""


def _begin(*_: object, **__: object) -> None:
    raise Begun


def _checked(config: TrainConfig, *_: object) -> None:
    config.check()
    raise Begun


WORK = {
    "dptrain.cli.train.train": _checked,
    "dptrain.cli.check.subject": _begin,
    "dptrain.cli.evaluate.rescore": _begin,
    "dptrain.bench.run.measure": _begin,
    "dptrain.cli.reproduce._write_manifest": _begin,
}


def _feed(arguments: list[str], scratch: Path) -> None:
    said, complained = _Terminal(), _Terminal()
    with contextlib.ExitStack() as stack:
        for name, replacement in WORK.items():
            stack.enter_context(mock.patch(name, replacement))
        stack.enter_context(contextlib.redirect_stdout(said))
        stack.enter_context(contextlib.redirect_stderr(complained))
        stack.enter_context(contextlib.chdir(scratch))
        try:
            code = cli.main(arguments)
        except Begun:
            code = 0
        except SystemExit as leave:
            code = leave.code
    words = complained.getvalue() + said.getvalue()
    if code not in (0, 2):
        raise Wrong(f"exit code {code}: {words[:200]}")
    if "Traceback" in words:
        raise Wrong(f"a traceback: {words[:200]}")
    if raw := {c for c in words if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160}:
        raise Wrong(f"control characters {raw!r} reach the terminal.")
    if code == 2:
        if not words.strip():
            raise Wrong("exit code 2 without a word.")
        ours = words.startswith("error:")
        raise ValueError(words.removeprefix("error:").strip() if ours else "The parser says how it is used.")


class _Terminal(io.TextIOWrapper):
    """Strict about what can be written, as a terminal in UTF-8 is."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", newline="\n", write_through=True)

    def getvalue(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined]


TARGETS = (
    Target("command-line", _anything, _feed, (ValueError,), 25),
    Target("command-line-privacy", _privacy, _feed, (ValueError,), 4),
)
