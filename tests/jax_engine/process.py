"""A training on a mesh, and one of several processes with two devices each that share it:

    python process.py NUMBER OF PORT FOLDER TASK...

Each task leaves what it has in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))

import dptrain.jax as dpj
from dptrain import Mechanism
from dptrain.core.clip_rules import Quantile
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger
from dptrain.core.spec import Sampling, StepSpec
from dptrain.jax import hosts, planner, stopwatch

SIZE = 24
MECHANISM = Mechanism.constant(
    noise_multiplier=1.0, clip_norm=0.5, sample_rate=0.5, steps=4, expected_batch_size=SIZE / 2
)
KEY = Key.from_seed(3)


class Examples:
    """Of which it is known who has read them."""

    def __init__(self):
        self.x = np.random.default_rng(0).standard_normal((SIZE, 6), np.float32)
        self.read: list[int] = []

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        self.read.append(index)
        return {"x": self.x[index]}


def loss(p, e):
    return jnp.sum((jnp.tanh(e["x"] @ p["w"]) @ p["v"] - p["c"]) ** 2)


def parameters():
    rng = np.random.default_rng(1)
    shapes = {"w": (6, 8), "v": (8, 3), "c": (3,)}
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


QUANTILE = Mechanism(
    ((StepSpec(Quantile(2.0, count_noise=1.0), 1.0, Sampling("poisson", 0.5), SIZE / 2), 4),)
)


def begin(params, mechanism=MECHANISM, **options):
    mesh = jax.make_mesh((4,), ("devices",), devices=jax.devices()[:4])
    data = Examples()
    given = {"physical_batch_size": 2, "mesh": mesh, "method": "bk-mix-opt"}
    task = dpj.make_private(loss, params, optax.sgd(0.1), data, mechanism, **(given | options))
    return task, data


class Process:
    """What one of the processes does; the first has key and ledger."""

    def __init__(self, number: int, folder: Path):
        self.number, self.folder = number, folder
        self.key = KEY if number == 0 else None

    def train(self, shard_params: bool):
        task, data = begin(parameters(), key=self.key, shard_params=shard_params)
        assert len(list(task.steps())) == MECHANISM.steps
        self.leave(f"train-{shard_params}", task.params, read=data.read)
        assert task.accumulator.compilations == 1

    def follow(self, shard_params: bool):
        """A quantile, which each begins to follow elsewhere: the first one's counts."""
        task, _ = begin(
            parameters(), QUANTILE, key=self.key, shard_params=shard_params, clip_norm=2.0 + self.number
        )
        norms = [task.clip_norm for _ in task.steps()]
        self.leave(f"follow-{shard_params}", task.params, norms=norms)

    def resume(self, shard_params: bool):
        """From the second step, when there were three."""
        path = self.folder / f"ledger-{shard_params}"
        ledger = Ledger.create(path, dataset="made up") if self.key else None
        task, _ = begin(parameters(), key=self.key, ledger=ledger, shard_params=shard_params)
        taking = task.steps()
        next(taking), next(taking)
        saved = whole(task.params)
        next(taking)
        if ledger is not None:
            ledger.close()
            ledger = Ledger.open(path)
        task, _ = begin(saved, key=self.key, ledger=ledger, taken=2, shard_params=shard_params)
        assert len(list(task.steps())) == 2
        if ledger is not None:
            assert len(ledger.releases) == 4, len(ledger.releases)  # the third was repeated bit for bit
            ledger.close()
        self.leave(f"resume-{shard_params}", task.params)

    def disagree(self):
        """What is not the same for all, and what only the first can know, ends all processes alike."""
        for options in ({"physical_batch_size": 1 + self.number}, {"taken": 1}):
            try:
                begin(parameters(), **options)
            except (ValueError, RuntimeError) as error:
                print(type(error).__name__, error, flush=True)
            else:
                raise AssertionError(options)
        different = {name: x + self.number for name, x in parameters().items()}
        try:
            begin(different)
        except AssertionError as error:
            print(str(error)[:80], flush=True)
        else:
            raise RuntimeError("parameters that differ were accepted")

    def clip_alike(self):
        """Each finds another way to be the fastest, but all take the one of the first."""
        planner.WORTH_MEASURING, stopwatch.fastest = 0, lambda *_: ("loop", "whole")[self.number]
        mesh = jax.make_mesh((4,), ("devices",))
        clipped = dpj.clipped_grad(loss, clip_norm=0.5, mesh=mesh, shard_params=True)
        own = slice(8 * self.number, 8 * self.number + 8)
        out = clipped(parameters(), {"x": Examples().x[:16][own]})
        assert set(clipped.on_mesh._agreed.values()) == {"loop"}
        assert out.norms.shape == (16,)
        self.leave("clip_alike", out.grads)

    def leave(self, name: str, tree, **more):
        np.savez(self.folder / f"{name}-{self.number}.npz", **more, **whole(tree))


def whole(tree):
    return {name: hosts.gathered(x) for name, x in tree.items()}


def main(number: str, of: str, port: str, folder: str, *tasks: str) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=int(of), process_id=int(number))
    process = Process(int(number), Path(folder))
    for task in tasks:
        name, _, option = task.partition("=")
        getattr(process, name)(*[option == "sharded"] if option else [])
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
