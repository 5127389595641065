"""Errors of a quantity, of scenes or pixels, for `evaluate`, from sums that grow with the batches."""

import datasets
import evaluate
import numpy as np

from fusmae_hf.evaluation.metrics import metric_info
from fusmae_hf.evaluation.scores import error_sums, errors_of_sums


class RegressionErrors(evaluate.Metric):
    """Keeps sums, not values. References that are NaN are refused, unless loaded with `ignore_nan=True`."""

    def __init__(self, *args, ignore_nan=False, **kwargs):
        super().__init__(*args, **kwargs)
        if self.num_process > 1:
            raise ValueError("This metric does not gather over processes: gather predictions and references first.")
        self.ignore_nan = ignore_nan
        self._sums = []

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Root mean squared error, mean absolute error, coefficient of determination, and bias.",
            "predictions and references: numbers of the same shape.",
            datasets.Value("float64"),
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add numbers of any shape."""
        predicted, truth = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
        if predicted.shape != truth.shape:
            raise ValueError(f"predictions of shape {predicted.shape} for references of shape {truth.shape}.")
        there = ~np.isnan(truth)
        for what, values in (("predictions", predicted[there]), ("references", truth[there])):
            if not np.isfinite(values).all():
                raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} {what} are NaN or infinite.")
        if not self.ignore_nan and not there.all():
            raise ValueError(
                f"{(~there).sum()} references are NaN. To leave them out, load the metric with ignore_nan=True."
            )
        self._sums.append(error_sums(predicted, truth))

    def add(self, *, prediction=None, reference=None):
        """Add one number."""
        self.add_batch(predictions=prediction, references=reference)

    def compute(self, *, predictions=None, references=None):
        """Errors of everything added since the last call; see `errors_of_sums`."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self._sums:
            raise ValueError("Nothing was added: pass predictions and references, or call add_batch first.")
        sums, self._sums = self._sums, []
        return errors_of_sums(sums)
