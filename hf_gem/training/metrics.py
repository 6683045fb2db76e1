"""The metrics of `evaluate.py` as subclasses of `evaluate.Metric`, for your own code. The recipes do not need them."""

from __future__ import annotations

from typing import Any

from datasets import Features, Value
from evaluate import Metric, MetricInfo

from .evaluate import METRICS


class _Metric(Metric):  # type: ignore[misc]  # evaluate has no types
    of: str  # the name in METRICS
    kinds: tuple[str, str]  # types of predictions and references

    def _info(self) -> MetricInfo:
        features = Features(dict(zip(("predictions", "references"), map(Value, self.kinds), strict=True)))
        return MetricInfo(description=type(self).__doc__ or "", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {self.of: METRICS[self.of](predictions, references)}


class Perplexity(_Metric):
    """`perplexity`: `add_batch(predictions=losses, references=targets)`, then `compute()["perplexity"]`."""

    of, kinds = "perplexity", ("float64", "int64")


class Accuracy(_Metric):
    """`accuracy` of classes, without references equal to `IGNORE`."""

    of, kinds = "accuracy", ("int64", "int64")


class RelativeL2(_Metric):
    """`relative_l2` of the values of a field."""

    of, kinds = "relative_l2", ("float64", "float64")


class Log10RelativeL2(_Metric):
    """`log10_relative_l2` of the values of a field."""

    of, kinds = "log10_relative_l2", ("float64", "float64")
