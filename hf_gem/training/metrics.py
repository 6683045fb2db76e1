"""The metrics of `evaluate.py` as subclasses of `evaluate.Metric`, for code of one's own; recipes do not need them."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value
from evaluate import Metric, MetricInfo

from .evaluate import accuracy, perplexity


class Perplexity(Metric):  # type: ignore[misc]  # evaluate has no types
    """`perplexity`: `add_batch(predictions=losses, references=targets)`, then `compute()["perplexity"]`."""

    def _info(self) -> MetricInfo:
        return _info(self, Value("float64"), Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"perplexity": perplexity(predictions, references)}


class Accuracy(Metric):  # type: ignore[misc]  # evaluate has no types
    """`accuracy`, of classes; references equal to `IGNORE` are left out."""

    def _info(self) -> MetricInfo:
        return _info(self, Value("int64"), Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": accuracy(predictions, references)}


def _info(metric: Metric, predictions: Value, references: Value) -> MetricInfo:
    features = Features({"predictions": predictions, "references": references})
    return MetricInfo(description=type(metric).__doc__ or "", citation="", inputs_description="", features=features)
