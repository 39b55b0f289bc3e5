"""Tensors and facts in one file that is either whole or not accepted.

A safetensors file whose metadata hold the facts as JSON and one SHA-256 of everything. It is written beside
its place and moved there once it is on disk: a process that dies at any instant leaves the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dptrain.core import durable
from dptrain.core.files import Unreadable, parse_json, size_of
from dptrain.core.printable import reason

KEPT = 2
"""Checkpoints of a run: the newest, and the one before in case the disk damages that."""

FIXED = "fixed.safetensors"
"""Beside them: what the run has and does not train."""

_MOST_BYTES = 2**42
_NAME, _FACTS, _DIGEST = "step-{:010d}.safetensors", "dptrain", "sha256"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message says which, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: how many steps of the run have been taken.
        facts: JSON-able.
        tensors: by name, on any device.
    """

    step: int
    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(repr=False)


class Checkpoints:
    """Those of one run, in a folder that the first one makes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> None:
        """Write it, and remove all but the newest `KEPT`.

        Raises:
            OSError: it could not be written; those before are as they were.
        """
        self.folder.mkdir(exist_ok=True)
        path = self.folder / _NAME.format(checkpoint.step)
        write(path, checkpoint.tensors, checkpoint.facts | {"step": checkpoint.step})
        for old in self._paths()[KEPT:]:
            old.unlink(missing_ok=True)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest that is whole, and why newer ones were not accepted."""
        refused = []
        for path in self._paths():
            try:
                tensors, facts = read(path)
                step = facts.pop("step", None)
                if path.name != _NAME.format(step if isinstance(step, int) else -1):
                    raise CheckpointError(f"{path} holds the checkpoint of another step.")
                return Checkpoint(step, facts, tensors), refused
            except CheckpointError as error:
                refused.append(str(error))
        return None, refused

    def remove(self) -> None:
        """All of them, and what was being written when a process died; nothing else that lies there."""
        if self.folder.is_dir():
            durable.remove_unfinished(self.folder)
            for path in (*self._paths(), self.folder / FIXED):
                path.unlink(missing_ok=True)
            with suppress(OSError):
                self.folder.rmdir()

    def _paths(self) -> list[Path]:
        """Newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)


def write(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Put tensors and facts in place of what `path` holds; on disk when this returns.

    Raises:
        OSError: it could not be written.
    """
    on_host = {name: _own(tensor) for name, tensor in tensors.items()}
    text = json.dumps(facts, allow_nan=False, sort_keys=True)
    metadata = {_FACTS: text, _DIGEST: _digest(text, on_host)}
    with durable.replacing(path) as scratch:
        try:
            save_file(on_host, scratch, metadata)
        except SafetensorError as error:  # what its library makes of a full disk
            raise OSError(None, str(error), str(path)) from error


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What `write` wrote, on the CPU.

    Raises:
        CheckpointError: it is not whole.
    """
    try:
        size_of(path, _MOST_BYTES)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Unreadable as error:
        raise CheckpointError(f"{path} {error}.") from error
    except Exception as error:  # of safetensors, and of torch for types that it does not know
        raise CheckpointError(f"{path} cannot be read ({reason(error)}).") from error
    text = metadata.get(_FACTS, "")
    if metadata.get(_DIGEST) != _digest(text, tensors):
        raise CheckpointError(f"{path} is damaged: its content has another checksum than it says.")
    facts: Any = None
    with suppress(Unreadable):
        facts = parse_json(text)
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} is no checkpoint: it does not say what it holds.")
    return tensors, facts


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, in memory that no other tensor has a part in."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for part in _described(tensors):
        digest.update(part)
    return digest.hexdigest()


def _described(tensors: dict[str, torch.Tensor]) -> Iterator[Any]:
    """Names, types, shapes and bytes: no two sets of tensors give the same sequence."""
    for name in sorted(tensors):
        tensor = tensors[name]
        yield json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data
