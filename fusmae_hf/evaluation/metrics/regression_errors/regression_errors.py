"""Errors of a quantity, of scenes or pixels, for `evaluate`, from sums that grow with the batches."""

import datasets
import evaluate

from fusmae_hf.evaluation.map_scores import RegressionSums


class RegressionErrors(evaluate.Metric):
    """Keeps sums, not values. References that are NaN are refused, unless loaded with `ignore_nan=True`."""

    def __init__(self, *args, ignore_nan=False, **kwargs):
        super().__init__(*args, **kwargs)
        if self.num_process > 1:
            raise ValueError("This metric does not gather over processes: gather predictions and references first.")
        self.ignore_nan = ignore_nan
        self._sums = None

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Root mean squared error, mean absolute error, coefficient of determination, and bias.",
            citation="",
            inputs_description="predictions and references: numbers of the same shape.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def add_batch(self, *, predictions=None, references=None):
        """Add numbers of any shape."""
        sums = self._sums or RegressionSums()
        missing = sums.num_missing
        sums.add(predictions, references)
        if sums.num_missing > missing and not self.ignore_nan:
            self._sums = None
            raise ValueError(
                f"{sums.num_missing - missing} references are NaN. To leave them out, load the metric with "
                "ignore_nan=True."
            )
        self._sums = sums

    def add(self, *, prediction=None, reference=None):
        """Add one number."""
        self.add_batch(predictions=prediction, references=reference)

    def compute(self, *, predictions=None, references=None):
        """Errors of everything added since the last call; see `RegressionSums.errors`."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if self._sums is None:
            raise ValueError("Nothing was added: pass predictions and references, or call add_batch first.")
        errors, self._sums = self._sums.errors(), None
        return errors
