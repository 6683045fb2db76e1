"""What a run starts from."""

import json

import pytest
import torch
from torch import nn

from hf_gem.training.config import TrainConfig
from hf_gem.training.data.order import SampleOrder
from hf_gem.training.errors import ConfigError, DataError
from hf_gem.training.initial import activation_inputs, new_task
from tests.training.toys import WIDTH, Objective, make_task

ROUNDED = {"rel": 2**-8}  # values are rounded to bfloat16


def make(act=nn.ReLU):
    task = make_task()
    task.model = nn.Sequential(nn.Linear(WIDTH, 8), act(), nn.Linear(8, 5))
    task.objective = Objective(task.model)  # with dropout
    return task


def test_the_first_samples_of_the_run_without_dropout():
    task, config = make(), TrainConfig(data_seed=3)
    found = activation_inputs(task, config)
    assert task.train.asked == SampleOrder(20, 3).batch(0, 8).tolist()
    assert task.train.draws == list(range(8))
    with torch.no_grad():
        rms = task.model[0](task.train.x[task.train.asked]).square().mean().item() ** 0.5
    assert found == {"rms": pytest.approx(rms, **ROUNDED), "layers": {"1": pytest.approx(rms, **ROUNDED)}}
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("unit", "units", "count"), [("images", 1, 64), ("tokens", 256, 8), ("tokens", 1024, 2), ("tokens", 10**6, 1)]
)
def test_how_many_samples(unit, units, count):
    task = make()
    task.unit, task.units_per_sample = unit, units
    activation_inputs(task, TrainConfig())
    assert len(task.train.asked) == count


def test_a_model_without_activations_has_no_entry():
    assert activation_inputs(make(nn.Identity), TrainConfig()) is None


def test_measuring_changes_nothing():
    task, stream = new_task(make, TrainConfig()), torch.rand(3)
    plain = make()
    assert torch.equal(torch.rand(3), stream)
    state, expected = task.objective.state_dict(), plain.objective.state_dict()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert task.objective.training
    assert task.facts["activation_inputs"]["layers"].keys() == {"1"}


def test_samples_that_cannot_be_read():
    def read(indices, draws):
        raise OSError("the disk is gone")

    task = make()
    task.train.batch = read
    with pytest.raises(DataError, match="cannot read the first samples: OSError: the disk is gone"):
        activation_inputs(task, TrainConfig())


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (nn.Identity, "an rms of nan over all activations"),
        (nn.ReLU, "an rms of 0 over all activations"),
    ],
)
def test_no_eps_belongs_to_what_is_measured(act, message):
    def zero():
        task = make(act)
        nn.init.zeros_(task.model[0].weight)
        nn.init.zeros_(task.model[0].bias)
        return task

    with pytest.raises(ConfigError, match=message):
        new_task(zero, TrainConfig(hidden_act="egem", eps="match"))
