"""Cases and records: stable names, nothing lost on the way through JSON."""

import json

import pytest

from dptrain.bench import Case, Record, Records, grid
from dptrain.bench.checking import check


def test_ids_are_stable_and_tell_cases_apart():
    # This very text is the name of files: should it change, no record would be found again.
    assert Case().id == "throughput-torch-auto-vit-tiny-224px-b16-fp32-cpu-44136fa3"
    cases = grid(Case(), batch_size=[1, 2], seconds=[1.0, 2.0], compile=[False, True])
    assert len({case.id for case in cases}) == 8


def test_equal_cases_have_equal_ids():
    first = Case(seconds=2, settings=(("b", 1), ("a", 2)))
    second = Case(seconds=2.0, settings=(("a", 2), ("b", 1)))
    assert first == second and first.id == second.id


def test_a_grid_has_every_combination_once():
    cases = grid(Case(), model=["mlp", "linear", "mlp"], batch_size=[4, 8])
    assert [(c.model, c.batch_size) for c in cases] == [("mlp", 4), ("mlp", 8), ("linear", 4), ("linear", 8)]


def test_a_case_survives_json():
    case = Case(measure="accuracy", settings=(("lr", 0.5), ("data", "digits")), memory_gib=2.5)
    again = Case.from_dict(json.loads(json.dumps(case.to_dict())))
    assert again == case and again.id == case.id
    with pytest.raises(ValueError, match="no field 'colour'"):
        Case.from_dict({"colour": "red"})


def test_a_record_survives_its_file(tmp_path):
    record = Record(Case(), "error", sentence="why", traceback="where", results={"x": [1.0]}, warnings=("w",))
    records = Records(tmp_path)
    assert records.get(record.case) is None
    path = records.put(record)
    assert path.name == f"{record.case.id}.json" and records.get(record.case) == record
    assert list(records) == [record]
    path.write_text(path.read_text()[:-20])  # a damaged file is as none
    assert records.get(record.case) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "tensorflow"}, "there is no engine 'tensorflow'; choose from torch, jax, opacus"),
        (
            {"engine": "opacus", "method": "bk-ghost"},
            "opacus has no method 'bk-ghost'; choose from per-example",
        ),
        ({"method": "none"}, "clipping method 'none' is unknown"),
        ({"precision": "int8"}, "there is no precision 'int8'"),
        ({"device": "gpu"}, "there is no device 'gpu'; choose from cpu, cuda"),
        ({"model": "nosuch"}, "there is no model 'nosuch'"),
        ({"batch_size": 0}, "batch_size is 0: give a positive number"),
        ({"measure": "batch-size"}, "state memory_gib"),
        ({"settings": (("lr", 1.0),)}, "for the measure accuracy"),
        ({"measure": "accuracy", "settings": (("seed", 5),)}, "seed is a setting of the case itself"),
        ({"measure": "accuracy", "settings": (("sede", 5),)}, "no setting 'sede'"),
        ({"measure": "accuracy", "settings": (("lr", -1.0),)}, "--lr is -1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(Case(**changes))
