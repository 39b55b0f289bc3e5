"""Runs a script in several processes of one group, on the loopback interface and without a port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


TIMEOUT_S = 240


def launch(script: Path, ranks: int, folder: Path, *arguments: str) -> None:
    """``script RANK RANKS FOLDER ARGUMENTS`` for each rank; what they find out, they leave in the folder.

    Raises:
        AssertionError: one failed; with what it said.
    """
    command = ["-W", "error", str(script)]
    given = [str(folder), *arguments]
    succeed([start([*command, str(rank), str(ranks), *given]) for rank in range(ranks)])


def dptrain(ranks: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The command in as many processes, as torchrun would start them."""
    return together([["-m", "dptrain", *arguments]] * ranks)


def together(commands: list[list[str]]) -> list[subprocess.Popen[str]]:
    """Python as the ranks of one group, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    meeting["WORLD_SIZE"] = str(len(commands))
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(commands))]
    return [start(command, **meeting, **each) for command, each in zip(commands, own)]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Python in a process of its own."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DPTRAIN_CACHE": "",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeed(running: list[subprocess.Popen[str]]) -> None:
    """Wait until all have ended well."""
    said = []
    try:
        for process in running:
            said.append(process.communicate(timeout=TIMEOUT_S)[0])
    finally:
        for process in running:
            process.kill()
    for rank, process in enumerate(running):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{said[rank]}"
