"""Evaluation counts every target once; as metrics of evaluate they agree, and with each other over processes."""

import math
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_gem.training import evaluate as evaluate_module
from hf_gem.training.errors import DataError, Interrupted
from hf_gem.training.evaluate import (
    METRICS,
    MOST_GROUPS,
    accuracy,
    evaluate,
    log10_relative_l2,
    perplexity,
    relative_l2,
)
from hf_gem.training.loss import IGNORE, Output
from hf_gem.training.signals import catch_signals
from tests.training.toys import Sequences, make_task

DRAW = np.random.default_rng(0)
PREDICTIONS, REFERENCES = DRAW.integers(3, size=(2, 101))


def test_accuracy_is_the_share_of_those_that_count():
    assert accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75
    assert accuracy([0, 1, 2, 2], [0, IGNORE, 1, 2]) == 2 / 3
    assert accuracy(PREDICTIONS, REFERENCES) == sum(map(int.__eq__, PREDICTIONS.tolist(), REFERENCES.tolist())) / 101


def test_perplexity_is_exp_of_the_mean_weighted_by_tokens():
    losses = [DRAW.normal(size=count) ** 2 for count in (1, 20, 300)]
    exact = math.exp(np.concatenate(losses).mean())
    assert perplexity([part.sum() for part in losses], [1, 20, 300]) == pytest.approx(exact, rel=1e-12)
    assert perplexity([8e5], [1000]) == math.inf


def test_relative_errors_are_those_of_the_whole_field():
    exact = DRAW.normal(size=50).astype(np.float32)
    assert relative_l2(1.25 * exact, exact) == pytest.approx(0.25, rel=5 * torch.finfo(torch.float32).eps)
    assert relative_l2([0.0, 4.0], [3.0, 4.0]) == 0.6
    assert log10_relative_l2([0.0, 4.0], [3.0, 4.0]) == math.log10(0.6)
    assert (relative_l2(exact, exact), log10_relative_l2(exact, exact)) == (0, -math.inf)
    assert relative_l2(np.zeros(50), exact) == 1
    assert math.isnan(log10_relative_l2([math.nan, 4.0], [3.0, 4.0]))


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_evaluate_count_together(name, tmp_path):
    """As evaluate does it: each process writes its part to a shared folder, and the first one reads them all."""
    pytest.importorskip("evaluate", reason="these are metrics of it")
    from hf_gem.training import metrics

    metric = getattr(metrics, "".join(map(str.capitalize, name.split("_"))))
    predictions, references = PREDICTIONS + (name != "accuracy") * 0.5, REFERENCES + 1

    def process(number):
        part = slice(None, 50) if number == 0 else slice(50, None)
        shared = {"num_process": 2, "experiment_id": "test", "cache_dir": str(tmp_path), "timeout": 240}
        found = metric(process_id=number, **shared)
        found.add_batch(predictions=predictions[part], references=references[part])
        return found.compute()

    with ThreadPoolExecutor(2) as pool:  # threads, since each waits for the other's files
        first, second = pool.map(process, range(2))
    assert first == {name: METRICS[name](predictions, references)}
    assert second is None


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_every_target_is_weighed_once(batch_size):
    task = make_task()
    found = evaluate(task.objective, task.validation, task.metrics, batch_size, Accelerator(cpu=True)).values
    data = task.validation
    assert data.asked == list(range(7))
    with torch.no_grad():
        logits = task.model(data.x).double()
        exact = torch.nn.functional.cross_entropy(logits.mT, data.labels, ignore_index=IGNORE).item()
    assert found["loss"] == pytest.approx(exact, rel=20 * torch.finfo(torch.float32).eps)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_processes_together_weigh_every_target_once(batch_size, monkeypatch):
    """One after the other, the main process last. With batches of 4 and 7, the last processes get no sample."""
    task, sent = make_task(), []
    monkeypatch.setattr(evaluate_module, "gather_object", lambda parts: sent.extend(parts) or sent)
    for rank in (2, 1, 0):
        accelerator = SimpleNamespace(
            num_processes=3,
            process_index=rank,
            is_main_process=rank == 0,
            device=torch.device("cpu"),
            reduce=lambda tensor, how: tensor,
        )
        found = evaluate(task.objective, task.validation, task.metrics, batch_size, accelerator)
    alone = evaluate(task.objective, task.validation, task.metrics, batch_size, Accelerator(cpu=True))
    assert found.values == pytest.approx(alone.values, rel=20 * torch.finfo(torch.float32).eps)


class Units(Sequences):
    """Of sequence k, each target is of unit 100 k; there are more units than groups."""

    def batch(self, indices, draws=None):
        found = super().batch(indices, draws)
        return {**found, "units": torch.from_numpy(100 * indices)[:, None].expand(found["labels"].shape)}


class Losses(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, labels):
        losses = torch.nn.functional.cross_entropy(self.model(x).mT, labels, ignore_index=IGNORE, reduction="none")
        return Output.evaluated(losses, labels)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_losses_of_each_group_of_units(batch_size):
    task = make_task(Losses)
    samples = Units(7, seed=1)
    found = evaluate(task.objective, samples, task.metrics, batch_size, Accelerator(cpu=True))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            task.model(samples.x).mT, samples.labels, ignore_index=IGNORE, reduction="none"
        )
    exact = {100 * k % MOST_GROUPS: (losses[k].double().sum().item(), k) for k in range(7)}
    assert found.groups["losses"] == pytest.approx([exact[group][0] for group in sorted(exact)], rel=1e-7)
    assert found.groups["counts"] == [int((samples.labels[exact[g][1]] != IGNORE).sum()) for g in sorted(exact)]
    assert found.num_units == 601
    assert found.values["loss"] == pytest.approx(sum(found.groups["losses"]) / sum(found.groups["counts"]), rel=1e-7)


def test_predictions_that_are_values():
    """Of a field, in batches of any size: each point counts once, whatever its value."""

    class Field(torch.nn.Module):
        def forward(self, x, labels):
            values = x.square()
            return Output((values - labels).square().sum(), values)

    class Points:
        x, labels = torch.linspace(-1, 1, 11), torch.linspace(-1, 1, 11).abs()

        def __len__(self):
            return len(self.x)

        def batch(self, indices, draws=None):
            return {"x": self.x[indices], "labels": self.labels[indices]}

    metrics = "relative_l2", "log10_relative_l2"
    errors = Points.x.square().double() - Points.labels.double()
    expected = (errors.norm() / Points.labels.double().norm()).item()
    for batch_size in (1, 4, 100):
        found = evaluate(Field(), Points(), metrics, batch_size, Accelerator(cpu=True)).values
        # of the float32 sums of a batch, and of none in the metrics
        assert found["loss"] == pytest.approx(errors.square().mean().item(), rel=20 * torch.finfo(torch.float32).eps)
        assert found["relative_l2"] == pytest.approx(expected, rel=1e-12)
        assert found["log10_relative_l2"] == math.log10(found["relative_l2"])


def test_what_cannot_be_read_and_what_is_asked_to_stop():
    class Broken(Sequences):
        def batch(self, indices, draws=None):
            if 4 in indices:
                raise OSError("the disk is gone")
            return super().batch(indices, draws)

    task = make_task()
    task.validation = Broken(7)
    with pytest.raises(DataError, match="cannot read the evaluation samples: OSError: the disk is gone"):
        evaluate(task.objective, task.validation, task.metrics, 2, Accelerator(cpu=True))
    with catch_signals() as caught:
        caught.number = signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped during an evaluation"):
            evaluate(task.objective, task.validation, task.metrics, 2, Accelerator(cpu=True))
