"""Files that anybody may have written are read within limits, or refused at once."""

import os

import pytest

from dptrain.core.files import Unreadable, parse_json, read_bytes, size_of


def test_a_pipe_keeps_no_reader_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Unreadable, match="not a regular file"):
        size_of(tmp_path / "pipe", 10)


def test_what_is_too_large_takes_no_memory(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(Unreadable, match="more than the 1,024"):
        read_bytes(path, 1024)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"a": 1, "a": 2}', "twice"), ("[" * 10**5, "nests too deep|not valid"), ("{", "not valid JSON")],
    ids=["twice", "deep", "cut"],
)
def test_json_says_one_thing(text, message):
    with pytest.raises(Unreadable, match=message):
        parse_json(text)
