"""What a run goes on from: its ledger, its checkpoints, its key."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from benchmarks.fuzz import mutate, surroundings, trees
from benchmarks.fuzz.target import Target, Wrong
from benchmarks.fuzz.targets.files import Given, of_json
from dptrain.core.accounting import ADD_OR_REMOVE_ONE
from dptrain.core.key_file import kept
from dptrain.core.ledger import Ledger, LedgerError, _linked
from dptrain.core.spec import flat_step
from dptrain.training.checkpoint import CheckpointError, _digest, read
from dptrain.training.facts import Facts

STEP = flat_step(noise_multiplier=1.0, clip_norm=1.0, sample_rate=0.25, expected_batch_size=8)
HEAD = {"ledger": 2, "run": "0" * 32, "dataset": "digits", "neighbours": ADD_OR_REMOVE_ONE}
ENTRY = {"step": 3, "spec": STEP.to_dict(), "fingerprint": None}
FACTS = {
    "identity": {"data set": {"name": "digits", "size": 1438}},
    "ledger": {"length": 3, "link": "0" * 64},
    "learner": {"state": {}, "rates": [0.1], "schedule": {"last_epoch": 3}, "averaged": 3},
    "measured": {"routes.json": {"gram": 1e-4}},
    "metrics_bytes": 120,
    "physical_batch_size": 64,
    "training_s": 3.5,
    "step": 3,
}
TENSORS = {"weights/head.weight": torch.arange(6.0).reshape(2, 3), "optimizer/0/step": torch.tensor(3.0)}


def _ledger(chance: random.Random) -> Given:
    """Lines that continue each other, so that what they say is looked at; now and then such that do not."""
    lines, link = [], ""
    for number in range(chance.choice((0, 1, 2, 4, 20))):
        tree: Any = copy.deepcopy(ENTRY if number else HEAD)
        if chance.random() < 0.3:
            tree = trees.changed(chance, tree)
        try:
            line = _linked(link, tree)
            link = json.loads(line)["link"]
        except (TypeError, ValueError):
            line = trees.text(chance, tree).replace("\n", " ").encode("utf-8", "surrogatepass") + b"\n"
        lines.append(line)
    made = b"".join(lines)
    return surroundings.kind(chance), mutate.damaged(chance, [made]) if chance.random() < 0.3 else made


def _feed_ledger(given: Given, scratch: Path) -> None:
    path = scratch / "ledger.jsonl"
    surroundings.put(path, given[1], given[0])
    ledger = Ledger.read(path)
    if ledger.mark.length != len(ledger.releases):
        raise Wrong("a ledger has another length than it says.")


def _checkpoint(chance: random.Random) -> Given:
    """Files whose checksum holds, so that what they say is looked at; now and then such whose does not."""
    facts = trees.changed(chance, FACTS) if chance.random() < 0.7 else FACTS
    text = trees.text(chance, facts).encode("utf-8", "replace").decode("utf-8", "replace")
    digest = _digest(text, TENSORS) if chance.random() < 0.9 else "0" * 64
    made = save(TENSORS, {"dptrain": text, "sha256": digest})
    return surroundings.kind(chance), mutate.damaged(chance, [made]) if chance.random() < 0.3 else made


def _feed_checkpoint(given: Given, scratch: Path) -> None:
    path = scratch / "step-0000000003.safetensors"
    surroundings.put(path, given[1], given[0])
    tensors, facts = read(path)
    if any(not torch.equal(tensors[name], value) for name, value in TENSORS.items()):
        raise Wrong("a damaged checkpoint was accepted.")
    facts.pop("step", None)
    Facts.from_dict(facts)


def _read_key(path: Path) -> None:
    if path.is_file() and not path.is_symlink():
        path.chmod(0o600)
    try:
        kept(path)
    except FileNotFoundError as error:  # whoever asks for it knows what to say
        raise ValueError("there is no key.") from error


TARGETS = (
    Target("ledger", _ledger, _feed_ledger, (LedgerError,), 1500),
    Target("checkpoint", _checkpoint, _feed_checkpoint, (CheckpointError,), 1000),
    of_json("key", "key.json", ({"key": "00" * 32, "reproducible": False},), _read_key, (ValueError,), 4000),
)
