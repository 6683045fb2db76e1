"""Evaluation counts every target once; the metrics agree with scikit-learn's, and with each other over processes."""

import math
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import accuracy_score

from hf_gem.training.errors import DataError, Interrupted
from hf_gem.training.evaluate import METRICS, Accuracy, Perplexity, evaluate
from hf_gem.training.loss import IGNORE
from hf_gem.training.signals import catch_signals
from tests.training.toys import Sequences, make_task

DRAW = np.random.default_rng(0)
PREDICTIONS, REFERENCES = DRAW.integers(3, size=(2, 101))


def test_accuracy_is_that_of_scikit_learn():
    metric = Accuracy(keep_in_memory=True)
    for part in np.array_split(np.arange(101), 4):
        metric.add_batch(predictions=PREDICTIONS[part], references=REFERENCES[part])
    assert metric.compute()["accuracy"] == accuracy_score(REFERENCES, PREDICTIONS)
    ignored = np.where(np.arange(101) % 3, REFERENCES, IGNORE)
    counted = ignored != IGNORE
    got = Accuracy(keep_in_memory=True).compute(predictions=PREDICTIONS, references=ignored)
    assert got["accuracy"] == accuracy_score(REFERENCES[counted], PREDICTIONS[counted])


def test_perplexity_is_exp_of_the_mean_weighted_by_tokens():
    losses = [DRAW.normal(size=count) ** 2 for count in (1, 20, 300)]
    metric = Perplexity(keep_in_memory=True)
    for part in losses:
        metric.add(prediction=part.sum(), reference=len(part))
    exact = math.exp(np.concatenate(losses).mean())
    assert metric.compute()["perplexity"] == pytest.approx(exact, rel=1e-12)
    assert Perplexity(keep_in_memory=True).compute(predictions=[8e5], references=[1000])["perplexity"] == math.inf


@pytest.mark.parametrize("name", METRICS)
def test_two_processes_count_together(name, tmp_path):
    """As evaluate does it: each process writes its part to a shared folder, and the first one reads them all."""
    predictions = PREDICTIONS if name == "accuracy" else PREDICTIONS + 0.5
    references = REFERENCES + 1

    def process(number):
        part = slice(None, 50) if number == 0 else slice(50, None)
        shared = {"num_process": 2, "experiment_id": "test", "cache_dir": str(tmp_path), "timeout": 240}
        metric = METRICS[name](process_id=number, **shared)
        metric.add_batch(predictions=predictions[part], references=references[part])
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:  # threads, since each waits for the other's files
        first, second = pool.map(process, range(2))
    assert first == METRICS[name](keep_in_memory=True).compute(predictions=predictions, references=references)
    assert second is None


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_every_target_is_weighed_once(batch_size):
    task = make_task()
    found = evaluate(task.objective, task, batch_size, Accelerator(cpu=True))
    data = task.validation
    assert data.asked == list(range(7))
    with torch.no_grad():
        logits = task.model(data.x).double()
        exact = torch.nn.functional.cross_entropy(logits.mT, data.labels, ignore_index=IGNORE).item()
    assert found["loss"] == pytest.approx(exact, rel=20 * torch.finfo(torch.float32).eps)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_what_cannot_be_read_and_what_is_asked_to_stop():
    class Broken(Sequences):
        def batch(self, indices, draws=None):
            if 4 in indices:
                raise OSError("the disk is gone")
            return super().batch(indices, draws)

    task = make_task()
    task.validation = Broken(7)
    with pytest.raises(DataError, match="validation samples cannot be read: OSError: the disk is gone"):
        evaluate(task.objective, task, 2, Accelerator(cpu=True))
    with catch_signals() as caught:
        caught.number = signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped in an evaluation"):
            evaluate(task.objective, task, 2, Accelerator(cpu=True))
