"""Metrics of evaluations, as subclasses of `evaluate.Metric` whose code is here, so that nothing is fetched."""

from __future__ import annotations

import math
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value

from .loss import IGNORE


class Perplexity(evaluate.Metric):
    """exp of the mean loss of a token: `add_batch(predictions=..., references=...)`, then `compute()["perplexity"]`.

    Predictions are losses in nats, each summed over some tokens; references are the numbers of these tokens.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, Value("float64"), Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        mean = math.fsum(predictions) / sum(references)
        return {"perplexity": math.exp(mean) if mean < 700 else math.inf}


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their references; references equal to `IGNORE` are left out."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self, Value("int64"), Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        counted = references != IGNORE
        return {"accuracy": float((predictions == references)[counted].mean())}


def _info(metric: evaluate.Metric, predictions: Value, references: Value) -> evaluate.MetricInfo:
    features = Features({"predictions": predictions, "references": references})
    return evaluate.MetricInfo(
        description=type(metric).__doc__ or "", citation="", inputs_description="", features=features
    )


METRICS: dict[str, type[evaluate.Metric]] = {"perplexity": Perplexity, "accuracy": Accuracy}
