"""From the command line to one command, and from its errors to one sentence."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from dptrain.cli.terminal import Terminal
from dptrain.core.printable import is_printable
from dptrain.core.processors import share_threads

COMMANDS = {
    "train": "Train a model with differential privacy.",
    "evaluate": "Score the model of a finished run.",
    "check": "Show how a model would be clipped, and whether that is exact.",
    "bench": "Measure speed, memory, accuracy: ours, ordinary training, other libraries.",
    "reproduce": "Measure and draw the figures and tables of the literature.",
    "report": "Tables, figures and one page from records.",
    "audit": "Attack a way of training, and bound epsilon from below by what that tells.",
    "privacy": "Answer epsilon, noise multiplier or steps from the others.",
}
"""Each is a module of this package with a function `run(arguments) -> exit code`."""

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 for bad input (one sentence on stderr), 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        _print_help()
        return 0 if given else BAD_INPUT
    name, *rest = given
    if name == "--version":
        from dptrain import __version__

        print(f"dptrain {__version__}")
        return 0
    errors = Terminal(stderr=True, soft_wrap=True)
    if hidden := [argument for argument in given if not is_printable(argument)]:
        return _refused(errors, f"the argument {hidden[0]!r} holds control characters; leave them out.")
    if name not in COMMANDS:
        return _refused(errors, f"there is no command {name!r}; choose from {', '.join(COMMANDS)}.")
    # A model may be named by an import path from here, which an installed script does not search.
    if "" not in sys.path:
        sys.path.insert(0, "")
    share_threads()
    # Imported late: the commands need PyTorch, which takes seconds to load.
    command = importlib.import_module(f"dptrain.cli.{name}")
    try:
        return command.run(rest)
    except KeyboardInterrupt as interruption:
        unspent = "Interrupted; no step was taken and nothing was spent."
        errors.print(str(interruption) or (unspent if name == "train" else "Interrupted."))
        return INTERRUPTED
    except command.BAD_INPUT_ERRORS as error:
        return _refused(errors, str(error))
    except OSError as error:  # a folder that cannot be written to, a full disk, a name that is too long
        place = f": {error.filename}" if error.filename else ""
        return _refused(errors, f"{error.strerror or error}{place}; mend that and try again.")


def _refused(errors: Console, sentence: str) -> int:
    errors.print("[bold red]error:[/]", escape(" ".join(sentence.split())), highlight=False)
    return BAD_INPUT


def _print_help() -> None:
    print("usage: dptrain COMMAND [OPTIONS]\n\nDifferentially private deep learning at non-private speed.\n")
    for name, summary in COMMANDS.items():
        print(f"  {name:<10} {summary}")
    print("\n`dptrain COMMAND --help` lists the options of a command.")
