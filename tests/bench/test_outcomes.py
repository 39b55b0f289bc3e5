"""A process of its own: what came of it, and whether lack of memory, no support and bugs are told apart."""

import os
import signal
import time

import pytest
import torch

from dptrain.bench import processes
from dptrain.bench.contestant import Unsupported
from dptrain.bench.outcome import Outcome, failure


def answer(x):
    return {"x": x, "process": os.getpid()}


def too_much():
    from dptrain.bench.meters import limit

    limit("cpu", 200 * 2**20)
    return torch.ones(2**28).sum().item()


def refuses():
    raise Unsupported("this does not exist")


def is_broken():
    print("last words")
    raise ZeroDivisionError("a bug")


def dies():
    os.write(2, b"something terrible\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def aborts_for_memory():
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.kill(os.getpid(), signal.SIGABRT)


def nests():
    raise processes.Ended(Outcome("out-of-memory", sentence="of a try"))


def sleeps():
    time.sleep(60)


@pytest.fixture(scope="module", autouse=True)
def server():
    """It is there before anything is timed: it takes seconds to import the libraries."""
    assert processes.run(answer, 0).status == "ok"


def test_an_answer_comes_from_another_process():
    outcome = processes.run(answer, 3)
    assert outcome.status == "ok" and outcome.value["x"] == 3 and outcome.value["process"] != os.getpid()


@pytest.mark.parametrize(
    ("function", "status", "sentence"),
    [
        (too_much, "out-of-memory", "can't allocate memory"),
        (aborts_for_memory, "out-of-memory", "for lack of memory"),
        (nests, "out-of-memory", "of a try"),
        (refuses, "unsupported", "this does not exist"),
        (is_broken, "error", "ZeroDivisionError: a bug"),
        (dies, "error", "ended by SIGSEGV without an answer"),
    ],
)
def test_endings_are_told_apart(function, status, sentence):
    outcome = processes.run(function)
    assert outcome.status == status and sentence in outcome.sentence
    assert (outcome.traceback is not None) == (status == "error")
    if function is is_broken:
        assert "in is_broken" in outcome.traceback
    if function is dies:
        assert "something terrible" in outcome.traceback


def test_what_takes_too_long_is_ended():
    began = time.perf_counter()
    outcome = processes.run(sleeps, timeout_s=0.5)
    assert outcome.status == "error" and "more than 0.5 s" in outcome.sentence
    assert time.perf_counter() - began < 30


def starts_another(path):
    processes.run(writes_its_number, path)


def writes_its_number(path):
    path.write_text(str(os.getpid()))
    time.sleep(60)


def test_what_a_process_has_started_ends_with_it(tmp_path):
    path = tmp_path / "number"
    assert processes.run(starts_another, path, timeout_s=10).status == "error"
    number = int(path.read_text())
    for _ in range(50):
        if not os.path.exists(f"/proc/{number}"):
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")


def test_an_error_that_mentions_memory_is_an_error():
    assert failure(RuntimeError("shape mismatch in memory format")).status == "error"
    assert failure(MemoryError()).status == "out-of-memory"
    assert failure(torch.OutOfMemoryError("CUDA out of memory")).status == "out-of-memory"
