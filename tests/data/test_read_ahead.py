"""Threads read ahead in order, no further than they may, lose no error, and end with whoever asked."""

import gc
import threading
import time
from itertools import count, islice

import pytest

from dptrain.data.read_ahead import read_ahead


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("dptrain-read")]


def slow_square(number):
    time.sleep(0.002 * (number % 3))  # later ones may be done first
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_results_come_in_order(workers):
    assert list(read_ahead(slow_square, range(50), workers, 8)) == [n * n for n in range(50)]
    assert not threads()


def test_no_more_is_read_ahead_than_the_depth():
    begun = []

    def note(number):
        begun.append(number)
        return number

    results = read_ahead(note, count(), threads=4, depth=6)
    for number in range(5):
        assert next(results) == number
        time.sleep(0.01)
        assert max(begun) < number + 6
    results.close()


def test_work_goes_on_while_nobody_waits():
    done = threading.Event()
    results = read_ahead(lambda number: done.set() if number == 3 else None, range(9), threads=1, depth=5)
    next(results)
    assert done.wait(5)
    results.close()


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_is_raised_in_its_place(workers):
    def fail(number):
        if number == 5:
            raise ValueError("five is bad.")
        return slow_square(number)

    results = read_ahead(fail, range(20), workers, 8)
    assert list(islice(results, 5)) == [0, 1, 4, 9, 16]
    with pytest.raises(ValueError, match="five is bad"):
        next(results)
    assert not threads()
    assert list(results) == []


def test_an_error_of_the_items_is_raised_too():
    def items():
        yield 1
        raise RuntimeError("no more items.")

    with pytest.raises(RuntimeError, match="no more items"):
        list(read_ahead(slow_square, items(), 2, 4))
    assert not threads()


@pytest.mark.parametrize("end", ["close", "forget"])
def test_an_unfinished_iterator_stops_its_threads(end):
    calls = []

    def note(number):
        calls.append(number)
        time.sleep(0.001)

    results = read_ahead(note, count(), 4, 16)
    next(results)
    assert threads()
    if end == "close":
        results.close()
    else:
        del results
        gc.collect()
    assert not threads()
    before = len(calls)
    time.sleep(0.02)
    assert len(calls) == before


def test_what_was_not_begun_is_never_done():
    calls = []

    def note(number):
        calls.append(number)
        time.sleep(0.01)

    results = read_ahead(note, count(), threads=1, depth=100)
    next(results)
    results.close()
    assert len(calls) < 50


def test_an_iterator_that_was_never_begun_has_no_threads():
    read_ahead(slow_square, range(5), 4, 4)
    assert not threads()
