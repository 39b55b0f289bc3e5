"""Measurements are kept between runs, and a resumed run recalls those that it was planned by."""

import pytest

from dptrain.core.remembered import recalling, remembered


@pytest.fixture(params=["", "folder"])
def cache(request, tmp_path, monkeypatch):
    """Nothing is kept, or all in a folder."""
    monkeypatch.setenv("DPTRAIN_CACHE", request.param and str(tmp_path / request.param))
    return request.param


def test_what_was_asked_for_is_recalled(cache):
    consulted = {}
    with recalling(consulted):
        memory = remembered("routes", "this machine")
        memory.known["gram"], memory.known["keep"] = 1.0, 2.0
        assert memory.known["gram"] == 1.0
        memory.save()
    (numbers,) = consulted.values()
    assert numbers == {"gram": 1.0}, "what nobody asked for decided nothing"

    later = remembered("routes", "this machine")
    assert ("gram" in later.known) == bool(cache)
    later.known["gram"] = 3.0  # measured again, otherwise
    later.save()
    with recalling(consulted):
        again = remembered("routes", "this machine")
        assert again.known["gram"] == 1.0
        assert "gram" not in remembered("routes", "another machine").known


def test_outside_nothing_is_noted(cache):
    consulted = {}
    with recalling(consulted):
        pass
    memory = remembered("routes", "this machine")
    memory.known["gram"] = 1.0
    assert memory.known["gram"] == 1.0 and not consulted
