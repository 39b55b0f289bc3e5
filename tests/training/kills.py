"""Runs in processes of their own, which are killed: at any time, at each of their writes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

from dptrain.training import TrainConfig

FAILED = 3
"""Exit code of a run that stopped with one clear sentence."""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["dptrain.training", "matplotlib"])


def start(config: TrainConfig, *, dies_at: int | None = None, largest_file: int | None = None):
    """Begin the run of `config`, or go on with it, in a process of its own.

    dies_at: kill it at this one of its writes. largest_file: bytes; writing beyond them fails.
    """
    process = context.Process(target=_run, args=(config, dies_at, largest_file))
    process.start()
    return process


def ends(process) -> int:
    """Its exit code."""
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def killed_within(process, seconds: float) -> bool:
    """Whether it was killed, after so long, before it had ended."""
    process.join(seconds)
    if process.exitcode is not None:
        assert process.exitcode == 0
        return False
    process.kill()
    process.join()
    return True


def seconds_of(config: TrainConfig) -> float:
    """What the run takes."""
    began = time.perf_counter()
    assert ends(start(config)) == 0
    return time.perf_counter() - began


def _run(config: TrainConfig, dies_at: int | None, largest_file: int | None) -> None:
    import torch

    from dptrain.training import ConfigError, StorageError, resume, train

    torch.set_num_threads(1)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if dies_at is not None:
        _make_writes_deadly(dies_at)
    try:
        resume(config.out, config) if (config.out / "config.json").exists() else train(config)
    except StorageError:
        os._exit(FAILED)
    except ConfigError as error:  # it was killed when all was done
        if "is finished" not in str(error):
            raise


def _make_writes_deadly(at: int) -> None:
    """Kill this process at its so-maniest write: before it, half-way through, or after it."""
    from dptrain.core.ledger import Ledger
    from dptrain.training import checkpoint, run_folder

    left = [at]

    def die_if_due() -> bool:
        left[0] -= 1
        return left[0] == 0

    def deadly(write: Callable, tear: Callable[..., None] | None = None) -> Callable:
        @functools.wraps(write)
        def writes(*arguments, **options):
            if die_if_due():
                _die()
            if tear is not None and die_if_due():
                tear(write, *arguments, **options)
                _die()
            result = write(*arguments, **options)
            if die_if_due():
                _die()
            return result

        return writes

    os.fsync = deadly(os.fsync)
    Path.replace = deadly(Path.replace)
    Path.write_bytes = deadly(Path.write_bytes, _half_a_content)
    Ledger._write = deadly(Ledger._write, _half_a_line)
    for module in (checkpoint, run_folder):
        module.save_file = deadly(module.save_file, _half_a_file)
    run_folder.RunFolder.append_metrics = deadly(run_folder.RunFolder.append_metrics)


def _half_a_content(write, path, content):
    write(path, content[: len(content) // 2])


def _half_a_line(write, ledger, line):
    ledger._file.write(line[: random.randrange(len(line))])


def _half_a_file(write, tensors, path, *rest):
    write(tensors, path, *rest)
    os.truncate(path, os.path.getsize(path) // 2)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
