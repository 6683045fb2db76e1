"""The metrics agree with those of scikit-learn, and with each other over processes."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from sklearn.metrics import accuracy_score

from hf_gem.training.evaluate import METRICS, Accuracy, Perplexity
from hf_gem.training.loss import IGNORE

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
        shared = {"num_process": 2, "experiment_id": "test", "cache_dir": str(tmp_path), "timeout": 20}
        metric = METRICS[name](process_id=number, **shared)
        metric.add_batch(predictions=predictions[part], references=references[part])
        return metric.compute()

    with ThreadPoolExecutor(2) as pool:  # threads, since each waits for the other's files
        first, second = pool.map(process, range(2))
    assert first == METRICS[name](keep_in_memory=True).compute(predictions=predictions, references=references)
    assert second is None
