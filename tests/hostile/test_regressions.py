"""The smallest inputs that once ended in a traceback, a hang or a full memory."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.fuzz.surroundings import put
from benchmarks.fuzz.targets.arrays import idx
from benchmarks.fuzz.targets.images import png
from dptrain.bench import Case
from dptrain.bench.record import Record, Records
from dptrain.core.files import Unreadable, read_bytes, read_json
from dptrain.core.mechanism import Mechanism
from dptrain.core.remembered import Remembered
from dptrain.data import DataError
from dptrain.data.arrow_shard import ArrowShard, ParquetShard
from dptrain.data.cifar import read_binary
from dptrain.data.decode import decode
from dptrain.data.idx import read_idx
from dptrain.data.safetensors_shard import SafetensorsShard
from dptrain.models import ModelError, build, load_weights
from dptrain.report import draw_curves
from dptrain.report.errors import ReportError
from dptrain.report.reading import read_record
from dptrain.training import ConfigError, TrainConfig, read_config

KINDS = ("absent", "folder", "link-to-nothing", "link-to-itself", "fifo", "zero", "huge")
"""What may stand in the place of a file; "huge" has four tebibytes."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda path: decode(str(path), 8), DataError),
        (lambda path: read_idx(path, 3), DataError),
        (lambda path: SafetensorsShard.open(str(path)), DataError),
        (lambda path: ArrowShard.open(str(path), 8, None), DataError),
        (lambda path: ParquetShard.open(str(path), 8, None), DataError),
        (lambda path: read_binary(path, 1), DataError),
        (lambda path: load_weights(build("linear", 3, (1, 2, 2)), path), ModelError),
        (read_config, ConfigError),
        (read_record, ReportError),
        (read_json, Unreadable),
    ],
)
def test_what_is_no_file_is_refused(tmp_path, kind, read, error):
    path = tmp_path / "input"
    put(path, b"", kind)
    with pytest.raises(error) as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(60_000, 60_000, 1, 0, b""), "pixels"),
        (png(20_000, 20_000, 1, 0, bytes(100)), "pixels"),
        (png(9000, 9000, 1, 0, bytes(100)), "9000 x 9000 pixels, and at most 67,108,864 are ever decoded"),
        (b"P6\n99999 99999\n255\n", "pixels"),
        (b"P6\n13 17\n\x8055\n", "not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "of a known format"),
        (
            b"GIF89a\x01\x00\x01\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;",
            "known format",
        ),
        (b"", "of a known format"),
    ],
)
def test_images(tmp_path, content, message):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        decode(str(path), 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(2**31, 2**31, 2**31, content=b""), "more than the 268,435,456 that are ever read"),
        (idx(2**32 - 1, 1, 1, content=b""), "more than the"),
        (idx(3, 0, 28), "which is nothing"),
        (idx(1, 2, 2) + b"x", "but holds more"),
        (idx(1, 2, 2)[:-1], "announces 1x2x2 bytes but holds 3"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, content, message, packed):
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match=message):
        read_idx(path, 3)


def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_promises(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(1, 2, 2) + bytes(1 << 26)))
    with pytest.raises(DataError, match="but holds more"):
        read_idx(path, 3)


def tensors(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    own = {name: value.contiguous() for name, value in build("linear", 3, (1, 2, 2)).state_dict().items()}
    return own | {name.replace("_", "."): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((3, 4), float("nan")), "not finite"),
        (torch.full((3, 4), 1e300, dtype=torch.float64), "not finite"),
        (torch.ones(3, 4, dtype=torch.int64), "holds int64"),
        (torch.ones(3, 4, dtype=torch.complex64), "holds complex64|not a readable safetensors"),
        (torch.ones(3, 4, dtype=torch.bool), "holds bool"),
    ],
)
def test_weights(tmp_path, weight, message):
    model = build("linear", 3, (1, 2, 2))
    (name,) = [name for name, value in model.state_dict().items() if value.dim() == 2]
    path = tmp_path / "w.safetensors"
    save_file(tensors() | {name: weight}, path)
    with pytest.raises(ModelError, match=message):
        load_weights(model, path)


@pytest.mark.parametrize("length", [0, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_another_length(tmp_path, length):
    path = tmp_path / "w.safetensors"
    path.write_bytes(
        struct.pack("<Q", length) + b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
    )
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_weights(build("linear", 3, (1, 2, 2)), path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nests too deep|not valid JSON"),
        ('{"model": ' * 50_000 + "1" + "}" * 50_000, "nests too deep"),
        ('{"lr": 1, "lr": 2}', "gives 'lr' twice"),
        ('{"lr": NaN}', "--lr is nan"),
        ('{"lr": Infinity}', "--lr is inf"),
        (f'{{"steps": {10**400}}}', "--steps is 1000"),
        (f'{{"steps": {"9" * 5000}}}', "not valid JSON"),
        ('{"weight_decay": Infinity}', "--weight-decay is inf"),
        ('{"out": "a\\u0000b"}', "--out is"),
        ('{"model": "\\ud800"}', "--model is"),
        ('{"data_dir": 3}', "--data-dir cannot be 3"),
        ('{"out": []}', "--out cannot be"),
        ("\ufeff{}", "not valid JSON"),
    ],
)
def test_configurations(tmp_path, content, message):
    path = tmp_path / "run.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_config(path).check()


def test_a_configuration_that_is_not_utf_8(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(at byte 9\)"):
        read_config(path)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "{",
        '{"a": NaN}',
        '{"a": -1}',
        f'{{"a": {10**400}}}',
        '{"a": null}',
        "[" * 100_000,
        '{"a": true}',
    ],
)
def test_remembered_measurements_that_make_no_sense_are_forgotten(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    assert Remembered(path).known == {}


def test_records_that_are_damaged_or_of_another_case_are_measured_again(tmp_path):
    records, case = Records(tmp_path), Case("compile")
    whole = Record(case, "ok").to_dict()
    path = records.put(Record(case, "ok"))
    assert records.get(case) is not None
    other = {"case": Case("memory").to_dict()}
    changes = ({"results": 3}, {"status": "fine"}, {"sentence": 3}, {"case": "x"}, other)
    for damaged in (3, [], {}, *(whole | change for change in changes)):
        path.write_text(json.dumps(damaged))
        assert records.get(case) is None
    path.write_text("[" * 100_000)
    assert records.get(case) is None


def test_metrics_of_another_hand_are_left_out_of_the_picture(tmp_path):
    lines = ["[" * 100_000, "3", "\ud800", '{"evaluation"', '{"event": "evaluation"}']
    lines.append('{"event": "evaluation", "step": 1e999}')
    metrics, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    metrics.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    draw_curves(metrics, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "changes",
    [
        {"segments": 3.5},
        {"segments": None},
        {"segments": [{"steps": 10**400, "step": {}}]},
        {"segments": [3]},
        {"delta": 10**400},
        {"a\nb": 1},
    ],
)
def test_mechanisms(changes):
    data = Mechanism.constant(
        noise_multiplier=1, clip_norm=1, sample_rate=0.5, steps=2, expected_batch_size=2
    ).to_dict()
    with pytest.raises((ValueError, TypeError), match=r"^[^\n]+\.$"):
        Mechanism.from_dict(data | changes)


def test_numbers_too_large_for_a_float_are_refused():
    with pytest.raises(ConfigError, match="--clip-norm is 1000"):
        TrainConfig(clip_norm=10**400).check()
    with pytest.raises(ValueError, match="too large for a float"):
        Mechanism.constant(
            noise_multiplier=10**400, clip_norm=1, sample_rate=0.5, steps=2, expected_batch_size=2
        )


def test_no_more_is_read_than_the_limit(tmp_path):
    path = tmp_path / "x"
    np.zeros(1000, np.uint8).tofile(path)
    assert len(read_bytes(path, 1000)) == 1000
    with pytest.raises(Unreadable, match="1,000 bytes, more than the 999"):
        read_bytes(path, 999)
    with pytest.raises(Unreadable, match="cannot be read"):
        read_bytes(Path("a\0b"), 9)
