"""`dptrain audit`, its records, and other libraries."""

from __future__ import annotations

import json

import pytest

from dptrain.audit import Audit, AuditRecord, run
from dptrain.bench.peers import PEERS
from dptrain.cli.dispatch import main
from tests.conformance.faults import FAULTS

SMALL = ["--canaries", "1000", "--steps", "2", "--method", "per-example"]


def test_a_correct_engine(tmp_path, capsys):
    assert main(["audit", *SMALL, "--out", str(tmp_path), "--seed", "1", "--confidence", "0.999999"]) == 0
    shown = capsys.readouterr().out
    assert "not refuted" in shown and "torch" in shown and "coins" in shown
    (path,) = (tmp_path / "records").glob("*.json")
    record = AuditRecord.from_dict(json.loads(path.read_text()))
    assert record.status == "ok" and not record.refuted and record.case.seed == 1
    assert record.to_dict() == json.loads(path.read_text())
    (figure,) = (tmp_path / "figures").glob("*.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_a_broken_engine_ends_with_an_exit_code_and_one_sentence(tmp_path, capsys):
    with FAULTS["no-noise"].planted("torch"):
        assert main(["audit", *SMALL, "--out", str(tmp_path), "--json"]) == 1
    said = capsys.readouterr()
    (record,) = json.loads(said.out)
    assert record["results"]["epsilon"] > 4
    assert "torch per-example is not (4, 1e-05)-differentially private: with 95 % confidence" in said.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--engine", "tensorflow"], "there is no engine 'tensorflow'; choose from torch, jax"),
        (["--peer", "opaque"], "there is no peer 'opaque'; choose from opacus"),
        (["--peer", "opacus:auto"], "opacus has no method 'auto'"),
        (["--method", "non-private"], "there is nothing to audit"),
        (["--method", "fastest"], "clipping method 'fastest' is unknown"),
        (["--canaries", "3"], "canaries must be at least 100"),
        (["--kind", "final-model", "--runs", "1"], "runs must be at least 20"),
        (["--scene", "nowhere"], "there is no scene 'nowhere'"),
        (["--confidence", "95"], "confidence must be at least 0.5 and below 1"),
        (["--epsilon", "-1"], "epsilon"),
        (["--sample-rate", "1.5"], "sample_rate"),
        (["--steps", "0"], "steps"),
        (["--physical-batch-size", "0"], "physical_batch_size must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
    assert main(["audit", *arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_equal_audits_have_equal_ids():
    assert Audit(canaries=500).id == Audit(canaries=500).id != Audit(canaries=501).id
    assert Audit.from_dict(Audit(kind="final-model").to_dict()) == Audit(kind="final-model")
    with pytest.raises(ValueError, match="an audit has no field 'colour'"):
        Audit.from_dict({"colour": 1})


MODES = [
    pytest.param(name, mode, id=f"{name}-{mode}")
    for name, peer in PEERS.items()
    for mode in dict.fromkeys(peer.methods.values())
]


@pytest.mark.parametrize(("peer", "mode"), MODES)
def test_other_libraries(peer, mode):
    """That are here: none is refuted, and each is seen through far enough for a bound."""
    audit = Audit(engine=peer, method=mode, canaries=2000, steps=2, confidence=1 - 1e-6, seed=2)
    record = run(audit)
    if record.status == "unsupported":
        pytest.skip(record.sentence)
    assert record.status == "ok", record.traceback
    assert not record.refuted
    assert record.epsilon > 0.3


def test_a_library_that_is_not_here_is_unsupported(monkeypatch, tmp_path, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "opacus", None)
    monkeypatch.delitem(sys.modules, "dptrain.bench.peers.opacus", raising=False)
    assert main(["audit", "--peer", "opacus", "--out", str(tmp_path)]) == 0
    assert "unsupported" in capsys.readouterr().out


def test_a_device_that_is_not_here_is_an_error_in_one_sentence(tmp_path, capsys):
    pytest.importorskip("jax")
    assert main(["audit", "--engine", "jax", "--device", "cuda:7", "--out", str(tmp_path)]) == 0
    assert "JAX has no device 'cuda:7' here" in " ".join(capsys.readouterr().out.split())
