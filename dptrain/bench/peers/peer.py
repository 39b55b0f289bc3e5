"""What is to be known of another library before it is imported, and the way to it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from dptrain.bench.contestant import Contestant, Unsupported

if TYPE_CHECKING:
    from dptrain.bench.torch_task import Task


@dataclass(frozen=True)
class Peer:
    """A library that takes part in measurements beside ours.

    Attributes:
        methods: every name that a method of it may be asked for by, and the library's mode that it means.
        packages: whose versions belong in a record.
        install: one sentence, of how to get it.
        adapter: the module beside this one that knows the library: it has ``contestant(task, mode)``,
            ``Training(task, mode, noise_multiplier)`` and ``refuses(error)``, which tells what the library
            documents as a refusal from anything else.
    """

    name: str
    methods: Mapping[str, str]
    packages: tuple[str, ...]
    framework: Literal["torch", "jax"]
    install: str
    adapter: str

    def mode(self, method: str) -> str:
        """The library's mode for a method, or for the mode itself. Raises ValueError if there is none."""
        mode = self.methods.get(method, method)
        if mode not in self.methods.values():
            raise ValueError(f"{self.name} has no method {method!r}; it has {', '.join(self.methods)}.")
        return mode

    def contestant(self, task: Task | Any, mode: str) -> Contestant:
        """The library, ready to train the task's model.

        Args:
            task: of ``dptrain.bench.torch_task``, or its like for JAX, as ``framework`` says.
            mode: the library's, or a method that means it.

        Raises:
            ValueError: no such method.
            Unsupported: the library is not installed, or refuses the model. The contestant's own functions
                raise it too where the library refuses only then. Any other error is let through.
        """
        mode = self.mode(mode)
        if self.framework == "torch" and task.case.compile:
            raise Unsupported(f"{self.name} is not run under torch.compile: its guide does not have it so.")
        adapter = self._adapter()
        contestant = self._asked(adapter.contestant, adapter.refuses)(task, mode)
        for call in ("step", "end", "clipped_sum"):
            if (function := getattr(contestant, call)) is not None:
                setattr(contestant, call, self._asked(function, adapter.refuses))
        return contestant

    def training(self, task: Task | Any, mode: str, noise_multiplier: float) -> Any:
        """The library's own training of the task's model, noise and all: ``Training`` of its adapter.

        Raises:
            ValueError: no such method.
            Unsupported: the library is not installed, or refuses the model.
        """
        adapter = self._adapter()
        return self._asked(adapter.Training, adapter.refuses)(task, self.mode(mode), noise_multiplier)

    def versions(self) -> dict[str, str]:
        """The versions of its packages, as far as they are installed or imported."""
        return {name: version for name in self.packages if (version := _version(name))}

    def _adapter(self) -> Any:
        try:
            return importlib.import_module(f"dptrain.bench.peers.{self.adapter}")
        except ImportError as error:
            if (error.name or "").startswith("dptrain"):
                raise
            reason = _first_line(error)
            raise Unsupported(f"{self.name} cannot be imported ({reason}); {self.install}") from error

    def _asked(self, function: Callable, refuses: Callable[[Exception], bool]) -> Callable:
        @functools.wraps(function)
        def asked(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                if refuses(error):
                    raise Unsupported(f"{self.name} refuses this model: {_first_line(error)}.") from error
                raise

        return asked


def _first_line(error: Any) -> str:
    """What it says, or the first of the errors that it lists."""
    while isinstance(error, Exception) and error.args and isinstance(error.args[0], list) and error.args[0]:
        error = error.args[0][0]
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(". ")


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return getattr(sys.modules.get(package), "__version__", None)
