"""The record of releases claims all that happened, and shows when it was tampered with."""

import json
import os

import numpy as np
import pytest

from dptrain import Mechanism
from dptrain.core import accounting
from dptrain.core.clip_rules import Flat
from dptrain.core.entropy import Key
from dptrain.core.ledger import Ledger, LedgerError, Mark, _linked, together
from dptrain.core.releases import NotTheSame, Releases, releases_of
from dptrain.core.spec import Sampling, StepSpec, flat_step


def step(sigma=1.0):
    return flat_step(noise_multiplier=sigma, clip_norm=1.0, sample_rate=0.1, expected_batch_size=10)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def record(path, specs, dataset="made up", **options):
    """A ledger of these releases, closed."""
    with Ledger.create(path, dataset=dataset, **options) as ledger:
        for index, spec in enumerate(specs):
            ledger.append(index, spec, fingerprint=f"{index}")
    return path


@pytest.fixture
def three(path):
    """A closed ledger of three releases."""
    return record(path, 3 * [step()])


def test_epsilon_is_recomputed_from_the_record_alone(path):
    mechanism = Mechanism(((step(2.0), 3), (step(1.0), 2)), delta=1e-5)
    specs = [mechanism.step(index) for index in range(mechanism.steps)]
    read = Ledger.read(record(path, specs, neighbours=mechanism.neighbours))
    assert [release.step for release in read.releases] == list(range(5))
    assert read.epsilon(1e-5) == mechanism.epsilon()


def test_the_relation_of_its_mechanism_is_kept(path):
    record(path, [step()], neighbours="replace-one")
    once = Mechanism(((step(), 1),), "replace-one", delta=1e-5)
    assert Ledger.read(path).epsilon(1e-5) == once.epsilon()


def test_a_repeated_step_is_paid_for_again(path):
    with Ledger.create(path, dataset="made up") as ledger:
        for index in (0, 1, 1):
            ledger.append(index, step())
    assert ledger.epsilon(1e-5) == Mechanism(((step(), 3),), delta=1e-5).epsilon()


def test_an_entry_is_on_disk_when_append_returns(path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor):
        real(descriptor)
        synced.append(path.read_text().count("\n"))

    monkeypatch.setattr(os, "fsync", fsync)
    record(path, 2 * [step()])
    assert synced == [1, 1, 2, 3]  # the first line, its name in the folder, two releases


def test_a_line_cut_short_by_a_crash_was_no_release(three):
    whole = three.read_bytes()
    line = whole.splitlines(keepends=True)[-1]
    for end in range(1, len(line)):
        three.write_bytes(whole[:-end])
        assert len(Ledger.read(three).releases) == 2
    with Ledger.open(three) as ledger:
        ledger.append(2, step(), "other")
    assert [release.fingerprint for release in Ledger.read(three).releases] == ["0", "1", "other"]


def test_every_changed_bit_is_seen(three):
    whole = three.read_bytes()
    for place in range(len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 7)
        three.write_bytes(damaged)
        with pytest.raises(LedgerError):
            Ledger.read(three)


def test_lines_cannot_be_left_out_moved_or_added(three):
    first, *lines = three.read_bytes().splitlines(keepends=True)
    for forged in ([lines[0], lines[2]], [lines[1], lines[0], lines[2]], [*lines, lines[2]]):
        three.write_bytes(first + b"".join(forged))
        with pytest.raises(LedgerError, match="does not continue"):
            Ledger.read(three)


def test_lines_that_were_cut_off_are_missed(three):
    ledger = Ledger.read(three)
    mark = ledger.mark
    assert mark.length == 3
    three.write_bytes(b"".join(three.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(LedgerError, match="holds 2 releases, but 3 had been made"):
        Ledger.read(three).check_continues(mark)


def test_another_ledger_is_not_taken_for_this_one(three, tmp_path):
    other = Ledger.read(record(tmp_path / "other.jsonl", 4 * [step()]))
    with pytest.raises(LedgerError, match="is not the ledger"):
        other.check_continues(Ledger.read(three).mark)
    other.check_continues(Mark(4, other.mark.link))


def test_one_process_writes_at_a_time(three):
    with Ledger.open(three), pytest.raises(LedgerError, match="another process"):
        Ledger.open(three)
    with Ledger.open(three) as ledger:
        ledger.append(3, step())


def test_what_was_only_read_is_not_written(three):
    with pytest.raises(LedgerError, match="not open for writing"):
        Ledger.read(three).append(3, step())


def test_a_failed_write_closes_it(path, monkeypatch):
    """What is on disk is not known then: a second line after half a one would be lost with it."""
    ledger = Ledger.create(path, dataset="made up")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            ledger.append(0, step())
    with pytest.raises(LedgerError):
        ledger.append(0, step())
    assert not ledger.releases


def test_it_is_never_overwritten(three):
    with pytest.raises(LedgerError, match="never overwritten"):
        Ledger.create(three, dataset="made up")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"[]\n", b"\xff\xfe\n", b'{"step": 1}\n', b"[" * 100_000 + b"\n", b'{"ledger": NaN}\n'],
    ids=repr,
)
def test_what_is_no_ledger_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        Ledger.read(path)


def test_no_file_is_no_ledger(path):
    for make in (Ledger.read, Ledger.open):
        with pytest.raises(LedgerError):
            make(path)


def test_releases_from_one_data_set_add_up(tmp_path):
    for name, dataset, count in (("a", "scans", 2), ("b", "scans", 3), ("c", "texts", 1)):
        record(tmp_path / name, count * [step()], dataset)
    ledgers = [Ledger.read(tmp_path / name) for name in "abc"]
    assert together(ledgers) == {
        "scans": (((step(), 5),), "add-or-remove-one"),
        "texts": (((step(), 1),), "add-or-remove-one"),
    }
    with pytest.raises(LedgerError, match="same run"):
        together([ledgers[0], ledgers[0]])


def test_relations_do_not_add_up(tmp_path):
    for name, relation in (("a", "replace-one"), ("b", "add-or-remove-one")):
        record(tmp_path / name, [step()], neighbours=relation)
    with pytest.raises(LedgerError, match="cannot be added up"):
        together([Ledger.read(tmp_path / name) for name in "ab"])


def test_the_first_line_says_what_the_user_named(three):
    head = json.loads(three.read_text().splitlines()[0])
    assert head["dataset"] == "made up" and len(head["run"]) == 32


def test_a_run_s_name_cannot_be_a_path(path):
    """Its key is kept, and removed, under this name."""
    head = {"ledger": 2, "run": "../../important", "dataset": "made up", "neighbours": "replace-one"}
    path.write_bytes(_linked("", head))
    with pytest.raises(LedgerError, match="is no ledger"):
        Ledger.read(path)


def shuffled(steps_per_epoch=4):
    sampling = Sampling("shuffle-without-amplification", 1 / steps_per_epoch)
    return StepSpec(Flat(1.0), 2.0, sampling, 10)


def epochs(count):
    """epsilon of so many shuffled epochs."""
    return Mechanism(((shuffled(), 4 * count),), "replace-special", 1e-5).epsilon()


@pytest.mark.parametrize(
    ("indices", "count"),
    [
        (range(3), 1),
        (range(5), 2),
        ((0, 1, 2, 2, 3), 2),  # step 2 was lost and drawn afresh, by another permutation
        ((0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7), 4),  # the epochs of steps 0 to 3 and 4 to 7, of both draws
    ],
)
def test_every_shuffled_epoch_that_a_draw_has_touched_is_paid_for(path, indices, count):
    with Ledger.create(path, dataset="made up", neighbours="replace-special") as ledger:
        for index in indices:
            ledger.append(index, shuffled(), None)
    assert Ledger.read(path).epsilon(1e-5) == epochs(count)


def test_begun_epochs_of_several_runs_add_up(tmp_path):
    for name in "ab":
        with Ledger.create(tmp_path / name, dataset="made up", neighbours="replace-special") as ledger:
            ledger.append(0, shuffled(), None)
    ((segments, neighbours),) = together(Ledger.read(tmp_path / name) for name in "ab").values()
    assert accounting.epsilon(segments, 1e-5, neighbours) == epochs(2)


def test_the_middle_of_a_shuffled_epoch_goes_on_with_the_key_it_was_drawn_with(path):
    """By another permutation an example could be in it twice, which the record would not tell."""
    mechanism = Mechanism(((shuffled(), 8),), "replace-special", 1e-5)
    with Ledger.create(path, dataset="made up", neighbours="replace-special") as ledger:
        for index in range(4):
            ledger.append(index, shuffled(), None)
        with pytest.raises(ValueError, match="the same key"):
            releases_of(mechanism, ledger, None, 3)
        assert releases_of(mechanism, ledger, Key.from_seed(0), 3).may_go_on(4)
        assert releases_of(mechanism, ledger, None, 4).may_go_on(4)


def test_steps_of_a_shuffled_epoch_are_not_drawn_afresh(path):
    """A third draw would follow the second one by its numbers, and not be paid for."""
    mechanism = Mechanism(((shuffled(), 8),), "replace-special", 1e-5)
    with Ledger.create(path, dataset="made up", neighbours="replace-special") as ledger:
        releases = releases_of(mechanism, ledger, Key.from_seed(0), 0)
        releases.before(0, mechanism.step(0), lambda: {"w": np.ones(2)})
        again = releases_of(mechanism, ledger, Key.from_seed(0), 0)
        with pytest.raises(NotTheSame):
            again.before(0, mechanism.step(0), lambda: {"w": np.zeros(2)})
        with pytest.raises(ValueError, match="cannot be drawn afresh"):
            again.draw_afresh()


def test_two_trainings_on_one_ledger_share_its_budget(path):
    mechanism = Mechanism(((shuffled(), 8),), "replace-special", 1e-5)
    with Ledger.create(path, dataset="made up", neighbours="replace-special") as ledger:
        two = [releases_of(mechanism, ledger, None, 0) for _ in range(2)]
        taken = 0
        for index in range(8):
            for releases in two:
                if releases.may_go_on(index):
                    releases.before(index, mechanism.step(index), dict)
                    taken += 1
        assert ledger.epsilon(1e-5) == mechanism.epsilon()
        assert taken == 5  # the first epoch of both, of which one goes on


def test_a_run_that_lost_steps_of_a_shuffled_epoch_ends_within_its_budget(path):
    mechanism = Mechanism(((shuffled(), 8),), "replace-special", 1e-5)
    with Ledger.create(path, dataset="made up", neighbours="replace-special") as ledger:
        releases = Releases(mechanism, ledger, Key.from_seed(0), repeats=False)
        for index in (0, 1, 2, 2, 3):  # two epochs' worth, of two draws
            assert releases.may_go_on(index)
            releases.before(index, mechanism.step(index), dict)
        assert not releases.may_go_on(4)
        assert ledger.epsilon(1e-5) == mechanism.epsilon()
