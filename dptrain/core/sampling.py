"""From the sampler's description to logical batches, and on to fixed-shape pieces.

A *logical batch* is what the mechanism samples: a private set of indices of random
size. A *physical batch* is what the device computes at once: a fixed number of rows and
a mask that says which of them are real.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dptrain.core import checks
from dptrain.core.entropy import Key
from dptrain.core.spec import Sampling

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_MARKED = 32
"""Up to how many of a population, for each that is wanted, a subset is drawn by marking."""


@dataclass(frozen=True, eq=False)
class PhysicalBatch:
    """A fixed number of rows, some of them padding.

    Attributes:
        indices: int64 [P]; padding repeats index 0, which always exists.
        mask: bool [P]; False marks padding, which must contribute exactly zero.
    """

    indices: Indices
    mask: Mask


@dataclass(frozen=True)
class LogicalSampler:
    """Draws the logical batch of each step of a run.

    The batch is a function of (key, step) alone, so a resumed run goes on as if it had
    never stopped. The realised batches, and their sizes, are private.

    Attributes:
        dataset_size: N, in examples, at least 1.
        sampling: how batches are drawn.
        key: the secret that they are drawn from; used for nothing else.

    Raises:
        ValueError: N differs from the one that the sampling is accounted for.
    """

    dataset_size: int
    sampling: Sampling
    key: Key

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_size", checks.whole("dataset_size", self.dataset_size))
        accounted = self.sampling.dataset_size
        if accounted is not None and accounted != self.dataset_size:
            raise ValueError(
                f"the data set has {self.dataset_size} examples, but the mechanism is accounted "
                f"for {accounted}; make the mechanism for this data set."
            )

    def sample(self, step: int) -> Indices:
        """The indices of the logical batch of `step`, sorted; possibly none.

        Returns:
            int64 [n], distinct, in [0, N).
        """
        step = checks.whole("step", step, minimum=0)
        n, sampling = self.dataset_size, self.sampling
        rng = self.key.child("step", step).numpy_generator()
        match sampling.sampler:
            case "poisson":
                return poisson_sample(rng, n, sampling.sample_rate)
            case "truncated-poisson":
                drawn = poisson_sample(rng, n, sampling.sample_rate)
                assert sampling.max_batch_size is not None
                if len(drawn) <= sampling.max_batch_size:
                    return drawn
                return drawn[uniform_subset(rng, len(drawn), sampling.max_batch_size)]
            case "fixed-size":
                return uniform_subset(rng, n, sampling.batch_size)
            case "cyclic-poisson":
                assert sampling.cycle is not None
                drawn = poisson_sample(rng, n, sampling.group_rate)
                turn = step % sampling.cycle
                mine: Indices = drawn[self._group_of(drawn, sampling.cycle) == turn]
                return mine
            case "shuffle-without-amplification":
                epoch, part = divmod(step, sampling.steps_per_epoch)
                order = self.key.child("epoch", epoch).numpy_generator().permutation(n)
                return np.sort(np.array_split(order, sampling.steps_per_epoch)[part])
            case other:
                raise ValueError(f"sampler {other!r} cannot be drawn from.")

    def _group_of(self, indices: Indices, groups: int) -> Indices:
        """The group of each index, one of so many: uniform and independent, of the key alone, [n] int64.

        A keyed hash of the index, so that no memory is needed for all of them: two rounds of splitmix64's
        finaliser (Steele et al. 2014, "Fast splittable pseudorandom number generators"), each with 64 secret
        bits. What is above the largest multiple of `groups` is less than `groups` / 2^64 of all hashes.
        """
        first, second = self.key.child("groups").numpy_generator().integers(0, 2**64, 2, dtype=np.uint64)
        hashed = _mixed(_mixed(indices.astype(np.uint64) ^ first) ^ second)
        return (hashed % np.uint64(groups)).astype(np.int64)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser, modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def poisson_sample(rng: np.random.Generator, dataset_size: int, sample_rate: float) -> Indices:
    """Each of N examples independently with probability q, in O(qN) memory.

    A Poisson sample's size is Binomial(N, q), and given its size it is a uniform subset.

    Returns:
        int64 [n], distinct, sorted.
    """
    size = int(rng.binomial(dataset_size, sample_rate))
    return uniform_subset(rng, dataset_size, size)


def uniform_subset(rng: np.random.Generator, population: int, size: int) -> Indices:
    """A uniformly random subset of [0, `population`), in O(`size`) memory.

    Draws integers until `size` distinct ones have been seen: no order or value is
    preferred, so every subset is equally likely, and while at most half are wanted,
    fewer than 1.4 draws each are expected. Of more than half, the complement is drawn.

    Returns:
        int64 [size], distinct, sorted.

    Raises:
        ValueError: a subset larger than the population.
    """
    if not 0 <= size <= population:
        raise ValueError(f"a subset of {size} out of {population} does not exist.")
    if size > population // 2:
        return np.flatnonzero(~_marked(rng, population, population - size))
    # Both ways make the same draws, so they find the same subset; marking is the faster, until
    # the marks outgrow the indices.
    if population <= _MARKED * size:
        return np.flatnonzero(_marked(rng, population, size))
    seen = np.empty(0, dtype=np.int64)
    # Never drawing more than are missing keeps the stopping rule exact: nothing that
    # was drawn is ever thrown away for being surplus.
    while missing := size - len(seen):
        drawn = np.sort(rng.integers(population, size=missing, dtype=np.int64))
        seen = np.sort(np.concatenate((seen, drawn)), kind="stable")  # which merges what is in order
        seen = seen[np.diff(seen, prepend=-1) > 0]
    return seen


def _marked(rng: np.random.Generator, population: int, size: int) -> Mask:
    """A uniformly random subset as marks, bool [population], drawn as in `uniform_subset`."""
    marked = np.zeros(population, dtype=np.bool_)
    while missing := size - np.count_nonzero(marked):
        marked[rng.integers(population, size=missing, dtype=np.int64)] = True
    return marked


def share(indices: Indices, rank: int, ranks: int) -> Indices:
    """A rank's part of a logical batch that every rank has drawn from the same key and step.

    No rank asks another: the union over ranks is the one sample, so its law does not depend
    on their number. Positions of the sample are dealt in turn, which balances the parts to
    within one example, and rank 0 has the most.

    Args:
        indices: int64 [n].
        rank: in [0, `ranks`).

    Returns:
        int64 [⌊n / ranks⌋ or ⌈n / ranks⌉], in the order of `indices`.

    Raises:
        ValueError: a rank that does not exist.
    """
    ranks = checks.whole("ranks", ranks)
    rank = checks.whole("rank", rank, minimum=0)
    if rank >= ranks:
        raise ValueError(f"rank {rank} does not exist among {ranks}; ranks count from 0.")
    return np.asarray(indices, dtype=np.int64)[rank::ranks]


def physical_batch_count(examples: int, physical_batch_size: int, ranks: int = 1) -> int:
    """The physical batches that each rank runs for a logical batch: as many as any needs.

    Args:
        examples: n, of the whole logical batch, dealt to the ranks by `share`.
        physical_batch_size: P, in rows of one rank.

    Returns:
        ⌈⌈n / ranks⌉ / P⌉, and 1 for an empty logical batch.
    """
    examples = checks.whole("examples", examples, minimum=0)
    rows = checks.whole("physical_batch_size", physical_batch_size)
    # Rounding up twice is rounding up once by the product.
    return max(1, -(-examples // (rows * checks.whole("ranks", ranks))))


def physical_batches(
    indices: Indices, physical_batch_size: int, *, count: int | None = None
) -> Iterator[PhysicalBatch]:
    """Cut a logical batch, or a rank's share of one, into physical batches of one shape.

    Their number is ⌈n / P⌉, and one for an empty logical batch: it holds only padding,
    for a step without examples still adds noise.

    Args:
        indices: int64 [n].
        physical_batch_size: P, at least 1.
        count: how many batches to make, where it is `physical_batch_count` of all ranks that
            decides; those beyond the examples hold only padding.

    Yields:
        Batches of P rows, padded after the last example.

    Raises:
        ValueError: `count` batches cannot hold the examples.
    """
    rows = checks.whole("physical_batch_size", physical_batch_size)
    indices = np.asarray(indices, dtype=np.int64)
    count = physical_batch_count(len(indices), rows) if count is None else checks.whole("count", count)
    if len(indices) > count * rows:
        raise ValueError(
            f"{len(indices)} examples do not fit into {count} physical batches of {rows}; "
            "take the count from physical_batch_count."
        )
    for start in range(0, count * rows, rows):
        part = indices[start : start + rows]
        padded = np.zeros(rows, dtype=np.int64)
        padded[: len(part)] = part
        yield PhysicalBatch(padded, np.arange(rows) < len(part))
