"""Logs and records."""

import json
import math

import pytest
import torch
from torch import nn

from hf_gem.training.environment import environment
from hf_gem.training.record import MetricsLog, check_saved, hash_weights, write_record


def test_a_resumed_log_goes_on_where_the_checkpoint_was(tmp_path):
    log = MetricsLog(tmp_path / "log.jsonl")
    log.start([])
    for step in range(1, 6):
        log.add(step=step, loss=float(step))
    with log.path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    again = MetricsLog(log.path)
    again.start(log.entries[:3])
    again.add(step=4, loss=40.0)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert lines == again.entries
    assert again.curve("loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert again.curve("validation_loss") == []


def test_a_record_is_replaced_whole(tmp_path):
    write_record(tmp_path / "record.json", {"status": "running"})
    write_record(tmp_path / "record.json", {"status": "finished"})
    assert json.loads((tmp_path / "record.json").read_text()) == {"schema": 1, "status": "finished"}
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    with pytest.raises(TypeError):
        write_record(tmp_path / "record.json", {"status": object()})
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "finished"


def test_what_is_not_finite_is_null(tmp_path):
    values = {"loss": math.nan, "curve": [(1, math.inf), (2, 0.5)], "inner": {"low": -math.inf, "text": "NaN"}}
    null = {"loss": None, "curve": [[1, None], [2, 0.5]], "inner": {"low": None, "text": "NaN"}}
    write_record(tmp_path / "record.json", values)
    assert json.loads((tmp_path / "record.json").read_text()) == {"schema": 1, **null}
    log = MetricsLog(tmp_path / "log.jsonl")
    log.start([{"step": 0, **values}])
    log.add(step=1, **values)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{"step": i, **null} for i in (0, 1)]
    assert math.isnan(log.entries[1]["loss"])  # in memory it is what it was


def test_the_environment_names_what_decides_a_result(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]["cpu_count"] >= 1
    assert found["command"].startswith("python ")  # nothing launched this
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert environment()["command"].startswith("torchrun ")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert environment()["command"].startswith("accelerate launch ")
    assert found.keys() >= {"commit", "dirty"}
    json.dumps(found)


def test_weights_have_a_hash():
    torch.manual_seed(0)
    one = nn.Linear(3, 2)
    torch.manual_seed(0)
    two = nn.Linear(3, 2)
    assert hash_weights(one) == hash_weights(two)
    two.bias.data[0] += 1e-6
    assert hash_weights(one) != hash_weights(two)
    assert hash_weights(one.bfloat16()) != hash_weights(two)


def test_signs_have_a_hash_that_scales_do_not_change():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    values, signs = hash_weights(layer), hash_weights(layer, signs=True)
    layer.weight.data *= 1.7
    assert hash_weights(layer) != values
    assert hash_weights(layer, signs=True) == signs
    layer.weight.data[0, 0] *= -1
    assert hash_weights(layer, signs=True) != signs


SAVED = {
    "log": [{"step": 1, "loss": 2.0, "mfu": None}],
    "nonfinite": {"skipped_steps": 0, "rollbacks": 0, "skipped_batches": 0},
    "sessions": [],
    "samples_hash": None,
    "evaluation": {"unit": "documents", "validation": {"num_units": 1, "counts": [3], "losses": [0.5]}},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log": [{"loss": 1.0}]}, r"state.log\[0\].step must be a whole number, got None"),
        ({"log": [{"step": 1.5}]}, r"state.log\[0\].step must be a whole number, got 1.5"),
        ({"log": [{"step": 1, "loss": "<b>"}]}, r"state.log\[0\]\['loss'\] must be a number or null, got '<b>'"),
        ({"log": {}}, "state.log must be a list"),
        ({"nonfinite": {"skipped_steps": 0, "rollbacks": 0}}, "state.nonfinite.skipped_batches is missing"),
        ({"nonfinite": {**SAVED["nonfinite"], "skipped_batches": -8}}, "skipped_batches must be at least 0, got -8"),
        ({"sessions": [{}]}, r"state.sessions\[0\].\w+ is missing"),
        ({"run_id": 3}, "state.run_id must be text, got 3"),
        ({"evaluation": {"unit": "`x`"}}, "evaluation.unit must be a word, got '`x`'"),
        ({"owes_evaluation": "yes"}, "state.owes_evaluation must be true or false, got 'yes'"),
    ],
)
def test_what_a_checkpoint_keeps_is_checked(change, message):
    check_saved(SAVED, "state.json: state")
    with pytest.raises(ValueError, match=message):
        check_saved({**SAVED, **change}, "state.json: state")
