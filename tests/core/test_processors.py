"""Who else is at work, and what a process does about threads and memory."""

import multiprocessing
import os
import resource
import sys

import pytest

from dptrain.core import processors
from dptrain.core.allocation import keep_freed_memory


@pytest.mark.parametrize(("busy", "policy"), [(0.0, None), (1.0, "PASSIVE"), (None, "PASSIVE")])
def test_threads_spin_only_on_a_quiet_machine(monkeypatch, busy, policy):
    clock = iter([None, None] if busy is None else [10.0, 10.0 + busy])
    monkeypatch.setattr(processors, "busy_s", lambda: next(clock))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    processors.share_threads()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_whoever_set_a_policy_keeps_it(monkeypatch):
    monkeypatch.setattr(processors, "busy_s", lambda: None)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    processors.share_threads()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell")
def test_busy_seconds_grow():
    before = processors.busy_s()
    sum(range(3_000_000))
    assert 0 < before <= processors.busy_s()


def _faults_of_a_second_go(queue, keep: bool) -> None:
    """Page faults of taking, writing and freeing 40 MB for the third time."""
    told = keep_freed_memory() if keep else True
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytearray(b"x") * 40_000_000
        del block
    queue.put((told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is told")
def test_freed_memory_is_kept(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        monkeypatch.delenv(name)
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    faults = {}
    for keep in (False, True):
        process = multiprocessing.get_context("spawn").Process(
            target=_faults_of_a_second_go, args=(queue, keep)
        )
        process.start()
        process.join()
        told, faults[keep] = queue.get()
    if not told:
        pytest.skip("another C library")
    assert faults[True] < 1000 < faults[False]


def test_whoever_has_set_glibc_s_allocator_keeps_it(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert not keep_freed_memory()
