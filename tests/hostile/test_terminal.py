"""What files say is shown as text: it cannot move the cursor, colour the screen or set a link."""

import io
import json

import pytest
from rich.progress import Progress
from rich.table import Table

from dptrain.cli import main
from dptrain.cli.terminal import Terminal
from dptrain.core.printable import is_printable, printable, reason

EVIL = "\x1b[2J\x1b]8;;http://x\x07click\x9b31m\r\x00\u202egnp\ud800"


def shown(print_it) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n", write_through=True)
    print_it(Terminal(file=file, force_terminal=True, color_system="truecolor", width=200))
    return file.buffer.getvalue().decode()


def table(console: Terminal) -> None:
    found = Table(title=EVIL)
    found.add_column(EVIL)
    found.add_row(EVIL)
    console.print(found)


def progress(console: Terminal) -> None:
    with Progress(console=console) as bar:
        bar.add_task(EVIL, total=2)


@pytest.mark.parametrize(
    "print_it",
    [
        lambda console: console.print(EVIL),
        lambda console: console.print(EVIL, markup=False, highlight=False, soft_wrap=True),
        lambda console: console.print(f"[bold]{EVIL}[/]"),
        lambda console: console.rule(EVIL),
        table,
        progress,
    ],
)
def test_control_characters_are_spelt_out(print_it):
    text = shown(print_it)
    assert "\\x1b" in text  # what comes later may be cut off
    assert (
        "\x1b[2J" not in text and "\x1b]" not in text and not {"\x9b", "\x07", "\x00", "\u202e"} & set(text)
    )


def test_colours_and_progress_still_work():
    assert "\x1b[31mred" in shown(lambda console: console.print("[red]red[/]"))
    assert "\x1b[2K" in shown(progress)


@pytest.mark.parametrize(
    ("text", "clean"),
    [("a b.c", True), ("é 日本\u3000語", True), ("a\tb", False), ("\x7f", False), ("\ud800", False)],
)
def test_what_is_printable(text, clean):
    assert is_printable(text) is clean
    assert is_printable(printable(text, keep=""))


def test_a_reason_is_one_short_line():
    assert reason(ValueError("first.\nsecond")) == "first"
    assert reason(OSError()) == "OSError"
    assert len(reason(ValueError("x" * 5000))) < 250
    assert "object" not in reason(AttributeError("'str' object has no attribute 'x'"))


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "check", "bench", "reproduce", "report", "tr\x1bain"]
)
def test_arguments_with_control_characters_are_refused(command, capsys):
    assert main([command, "--out", "a\x1b[31mb"]) == 2
    error = capsys.readouterr().err
    assert "control characters" in error and "\x1b" not in error


@pytest.mark.parametrize("name", ["[/x]", "[bold]", "[link=x]y[/nothing]", "x\\", "a" * 400])
@pytest.mark.parametrize(
    "command", [["evaluate"], ["report"], ["train", "--data"], ["train", "--config"], ["check"]]
)
def test_markup_in_names_is_text(command, name, capsys):
    assert main([*command, name]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["data", "model", "out", "weights", "device", "trainable"])
def test_a_configuration_holds_no_control_characters(tmp_path, name, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({name: "a\x1b[2Jb"}))
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"--{name}" in error and "\x1b" not in error
