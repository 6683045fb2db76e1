"""The loop: pure-function batches, exact normalisation, whole evaluation, resuming, stopping."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from hf_gem.training.config import TrainConfig
from hf_gem.training.errors import TrainingError
from hf_gem.training.loop import Interrupted, Task, make_accelerator, train
from hf_gem.training.loss import IGNORE
from hf_gem.training.optim import learning_rate
from tests.helpers import losses

CLASSES, WIDTH, LENGTH = 5, 4, 6


class Sequences:
    """Sequences with a different number of targets in each, so that a mean of means is not the mean."""

    def __init__(self, count, seed=0):
        draw = np.random.default_rng(seed)
        self.x = torch.from_numpy(draw.normal(size=(count, LENGTH, WIDTH))).float()
        self.labels = torch.from_numpy(draw.integers(CLASSES, size=(count, LENGTH)))
        for i in range(count):
            self.labels[i, : i % LENGTH] = IGNORE
        self.asked = []

    def __len__(self):
        return len(self.x)

    def batch(self, indices):
        self.asked.extend(indices.tolist())
        return {"x": self.x[indices], "labels": self.labels[indices]}


class Objective(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout(0.2)

    def forward(self, x, labels):
        logits = self.model(self.dropout(x))
        return nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="sum")


def make_task(cls=Objective):
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    return Task("test", "tiny", model, cls(model), Sequences(20), Sequences(7, seed=1), data_hash="d")


def config(folder, **fields):
    defaults = {"steps": 6, "global_batch_size": 8, "micro_batch_size": 8, "warmup_steps": 2, "learning_rate": 0.05}
    every = {"log_every": 1, "eval_every": 3, "save_every": 2, "output_dir": str(folder)}
    return TrainConfig(**{**defaults, **every, **fields})


def run(folder, task=None, **fields):
    task = task or make_task()
    settings = config(folder, **fields)
    return train(task, settings, make_accelerator(settings)), task


def test_the_same_run_twice_is_bit_identical(tmp_path):
    one, _ = run(tmp_path / "a")
    two, _ = run(tmp_path / "b")
    assert one["curves"] == two["curves"]
    assert one["init_hash"] == two["init_hash"]
    other, _ = run(tmp_path / "c", seed=1)  # the seed of dropout; the weights are the task's
    assert other["curves"] != one["curves"]
    assert run(tmp_path / "d", data_seed=1)[0]["curves"] != one["curves"]


def test_micro_batches_do_not_change_the_normalisation(tmp_path):
    task_of = lambda: make_task(type("NoDropout", (Objective,), {"forward": _without_dropout}))  # noqa: E731
    whole, _ = run(tmp_path / "a", task_of())
    parts, _ = run(tmp_path / "b", task_of(), micro_batch_size=2)
    for (_, a), (_, b) in zip(whole["curves"]["loss"], parts["curves"]["loss"], strict=True):
        # a few dozen float32 additions in another order, over six steps
        assert a == pytest.approx(b, rel=1000 * torch.finfo(torch.float32).eps)


def _without_dropout(self, x, labels):
    return nn.functional.cross_entropy(self.model(x).mT, labels, ignore_index=IGNORE, reduction="sum")


def test_every_step_takes_its_own_batch_and_learning_rate(tmp_path):
    record, task = run(tmp_path)
    assert sorted(task.train.asked[:40]) == sorted([*range(20), *range(20)])  # two passes in five steps of 8
    settings = config(tmp_path)
    rates = losses(tmp_path, "learning_rate")
    assert rates == {step + 1: learning_rate(step, settings) for step in range(6)}
    assert record["status"] == "finished"


def test_evaluation_weighs_every_target_once(tmp_path):
    record, task = run(tmp_path, micro_batch_size=2, global_batch_size=2)
    data = task.validation
    with torch.no_grad():
        logits = task.model(data.x).double()
        exact = nn.functional.cross_entropy(logits.mT, data.labels, ignore_index=IGNORE).item()
    assert record["result"]["validation_loss"] == pytest.approx(exact, rel=20 * torch.finfo(torch.float32).eps)
    assert [step for step, _ in record["curves"]["validation_loss"]] == [0, 3, 6]


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, at):
    whole, reference = run(tmp_path / "a")

    class Dying(Sequences):
        def batch(self, indices):
            if len(self.asked) == at * 8:
                raise Killed
            return super().batch(indices)

    task = make_task()
    task.train = Dying(20)
    with pytest.raises(Killed):
        run(tmp_path / "b", task)
    record, resumed = run(tmp_path / "b")
    assert record["curves"] == whole["curves"]
    assert len(resumed.train.asked) == (6 - at // 2 * 2) * 8  # from the newest checkpoint, not from the start
    for a, b in zip(reference.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_run_started_again_only_reports(tmp_path):
    first, _ = run(tmp_path)
    second, task = run(tmp_path)
    assert second["result"] == first["result"]
    assert task.train.asked == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number):
    whole, _ = run(tmp_path / "a")
    task = make_task()
    batch = task.train.batch

    def interrupt_in_step_3(indices):
        if len(task.train.asked) == 16:
            os.kill(os.getpid(), number)
        return batch(indices)

    task.train.batch = interrupt_in_step_3
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="step 3 of 6"):
        run(tmp_path / "b", task)
    assert signal.getsignal(number) is before
    assert json.loads((tmp_path / "b" / "record.json").read_text())["status"] == "interrupted"
    assert run(tmp_path / "b")[0]["curves"] == whole["curves"]


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    task = make_task()
    task.train.x[:] = math.inf
    with pytest.raises(TrainingError, match=r"loss is nan at step 1.*--learning_rate"):
        run(tmp_path, task)


def test_a_batch_that_does_not_divide_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--global_batch_size 8 must be a multiple of --micro_batch_size 3 x 1"):
        run(tmp_path, micro_batch_size=3)


def test_the_record_says_what_ran(tmp_path):
    record, task = run(tmp_path, report_to="tensorboard")
    on_disk = json.loads((tmp_path / "record.json").read_text())
    assert on_disk == json.loads(json.dumps({"schema": 1, **record}))
    assert on_disk["config"]["steps"] == 6
    assert (on_disk["data_hash"], on_disk["num_processes"], on_disk["mixed_precision"]) == ("d", 1, "no")
    assert on_disk["num_parameters"] == sum(p.numel() for p in task.model.parameters())
    assert len(on_disk["curves"]["loss"]) == 6
    assert losses(tmp_path) == dict(on_disk["curves"]["loss"])
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "fields", [{"compile": True}, {"mixed_precision": "bf16"}, {"compile": True, "mixed_precision": "bf16"}]
)
def test_compiled_and_mixed_precision_runs_follow_the_plain_one(tmp_path, fields):
    plain, _ = run(tmp_path / "a", make_task(type("NoDropout", (Objective,), {"forward": _without_dropout})))
    AcceleratorState._reset_state(reset_partial_state=True)
    other, _ = run(tmp_path / "b", make_task(type("NoDropout", (Objective,), {"forward": _without_dropout})), **fields)
    bound = 0.05 if "mixed_precision" in fields else 1e-5
    for (_, a), (_, b) in zip(plain["curves"]["loss"], other["curves"]["loss"], strict=True):
        assert a == pytest.approx(b, rel=bound)
    assert other["mixed_precision"] == fields.get("mixed_precision", "no")
