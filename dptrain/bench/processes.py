"""A function in a process of its own, forked from a server that has only imported the libraries."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dptrain.bench.outcome import Outcome, failure

#: the server imports this, so that its children need not
PRELOADED = "dptrain.bench.preloaded"
TAIL = 4000  # characters of what a process said before it died


class Ended(RuntimeError):
    """One of the processes of a case ended otherwise than well: so does the case."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.sentence)
        self.outcome = outcome


def run(function: Callable[..., Any], *arguments: Any, timeout_s: float = 3600.0) -> Outcome:
    """``function(*arguments)`` elsewhere: what it does to memory, threads and globals ends with it.

    Args:
        function: of a module, as pickle wants it; so are its arguments and what it returns.
        timeout_s: after which the process is ended; that is an error.
    """
    with _Elsewhere(function, arguments) as process:
        return process.outcome(timeout_s)


def run_together(
    function: Callable[..., Any], arguments: Sequence[tuple], timeout_s: float = 3600.0
) -> list[Any]:
    """What the function returns for each of the arguments, in as many processes at once.

    Raises:
        Ended: one of them ended otherwise than well; the others are ended then.
    """
    with contextlib.ExitStack() as all_:
        running = [all_.enter_context(_Elsewhere(function, each)) for each in arguments]
        waiting = {process.answers: process for process in running}
        found: dict[_Elsewhere, Any] = {}
        while waiting:
            for ready in connection.wait(list(waiting), timeout_s) or list(waiting):
                process = waiting.pop(ready)
                outcome = process.outcome(0)
                if outcome.status != "ok":
                    raise Ended(outcome)
                found[process] = outcome.value
        return [found[process] for process in running]


class _Elsewhere:
    """A process that is started on entering, and ended on leaving if it has not answered."""

    def __init__(self, function: Callable[..., Any], arguments: tuple):
        self._function, self._arguments = function, arguments

    def __enter__(self) -> _Elsewhere:
        context = _context()
        self._log = tempfile.NamedTemporaryFile(prefix="dptrain-", suffix=".log")
        self.answers, theirs = context.Pipe(duplex=False)
        self._killed_before = _killed_for_memory()
        what = theirs, self._log.name, not _is_a_case(), self._function, self._arguments
        self._process = context.Process(target=_child, args=what)
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._process.is_alive():  # Ctrl-C, of which it does not hear, or it took too long
            _end(self._process)
        self.answers.close()
        self._log.close()

    def outcome(self, timeout_s: float) -> Outcome:
        """What it answers within so many seconds, or how it died."""
        try:
            outcome = self.answers.recv() if self.answers.poll(timeout_s) else None
        except EOFError:  # it died
            self._process.join()
            for_memory = _killed_for_memory() > self._killed_before
            return _died(self._process.exitcode, Path(self._log.name), for_memory)
        if outcome is None:
            _end(self._process)
            return Outcome("error", sentence=f"it took more than {timeout_s:g} s and was ended.")
        self._process.join()
        return outcome


def attempt(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """What came of a call in this process."""
    try:
        return Outcome("ok", function(*arguments))
    except Ended as error:
        return error.outcome
    except Exception as error:
        return failure(error)


def _is_a_case() -> bool:
    """Whether this process was itself started by `run`."""
    return multiprocessing.parent_process() is not None


def _end(process: Any) -> None:
    """Kill a process and those that it has started: they are a group of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _context() -> Any:
    """Forked from a server where the system can; a new interpreter each time where it cannot."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    if _is_a_case():  # that tries things: it has only imported, too
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", PRELOADED])
    return context


def _child(asker: Connection, log: str, leads: bool, function: Callable[..., Any], arguments: tuple) -> None:
    """Call the function and send what came of it.

    leads: whether this process begins a group, of those that it starts; they join it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    if leads:
        os.setpgid(0, 0)
    with open(log, "w") as file:
        sys.stdout.flush()
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    asker.send(attempt(function, *arguments))
    asker.close()
    # Libraries that wait for threads of theirs at the end have been seen to wait for ever.
    os._exit(0)


def _died(code: int | None, log: Path, for_memory: bool) -> Outcome:
    """A process that ended without a word; what it wrote tells why."""
    said = log.read_text(errors="replace")[-TAIL:]
    if (for_memory and code == -signal.SIGKILL) or "std::bad_alloc" in said:
        return Outcome("out-of-memory", sentence="the process was ended for lack of memory.")
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return Outcome("error", sentence=f"the process ended {how} without an answer.", traceback=said)


def _killed_for_memory() -> int:
    """How many processes the kernel has killed for lack of memory so far, of our control group or of all."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError):
            lines = Path(path).read_text().splitlines()
            return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0
