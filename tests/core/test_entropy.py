"""Keys: secret, separated, repeatable on demand."""

import numpy as np
import pytest

from dptrain.core.entropy import Key


def test_fresh_keys_differ_and_are_not_reproducible():
    one, other = Key.from_entropy(), Key.from_entropy()
    assert one != other
    assert not one.reproducible
    assert not one.child("noise").reproducible


def test_a_seed_gives_the_same_key_and_marks_all_that_descend():
    assert Key.from_seed(3) == Key.from_seed(3) != Key.from_seed(4)
    assert Key.from_seed(3).reproducible
    assert Key.from_seed(3).child("noise", 1).child(2).reproducible


def test_the_secret_is_not_shown():
    secret = bytes(range(32))
    shown = repr(Key(secret, reproducible=False)) + str(Key(secret, reproducible=False))
    assert shown == "<Key, secret>" * 2


def test_children_are_separated_by_their_labels():
    key = Key.from_seed(0)
    children = [
        key,
        key.child("a"),
        key.child("b"),
        key.child("ab"),
        key.child("a", "b"),
        key.child("a").child("b"),
        key.child("b", "a"),
        key.child(1),
        key.child("1"),
        key.child(11),
        key.child(1, 1),
        key.child(-1),
        Key.from_seed(1).child("a"),
    ]
    assert len(set(children)) == len(children)
    assert len({child.seed64() for child in children}) == len(children)
    assert key.child(np.int64(7)) == key.child(7)


def test_streams_repeat_and_do_not_overlap():
    key = Key.from_seed(0).child("sampling")
    draw = key.numpy_generator().integers(2**63, size=100)
    np.testing.assert_array_equal(draw, key.numpy_generator().integers(2**63, size=100))
    other = Key.from_seed(0).child("noise").numpy_generator().integers(2**63, size=100)
    assert not np.intersect1d(draw, other).size


def test_derived_values_are_pinned():
    # A change of the derivation would make resumed runs draw other noise: let it be seen.
    assert Key.from_seed(0).child("noise", 7).seed64() == 11069434275124518661


def test_seed64_uses_its_range():
    seeds = [Key.from_seed(i).seed64() for i in range(64)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) >= 2**63


@pytest.mark.parametrize("label", [1.5, None, True, b"a"])
def test_labels_are_strings_or_integers(label):
    with pytest.raises(TypeError, match="label"):
        Key.from_seed(0).child(label)


def test_bad_keys_are_refused():
    with pytest.raises(ValueError, match="32 secret bytes"):
        Key(b"short", reproducible=False)
    with pytest.raises(ValueError, match="at least one label"):
        Key.from_seed(0).child()
    with pytest.raises(ValueError, match="seed"):
        Key.from_seed(-1)
    with pytest.raises(TypeError, match="seed"):
        Key.from_seed(1.5)
