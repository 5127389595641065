"""Accuracy of one class a scene, overall and by class, for `evaluate`."""

import datasets
import evaluate
import numpy as np

from fusmae_hf.evaluation.metrics import metric_info
from fusmae_hf.evaluation.scores import IGNORED_LABEL, accuracy


class ClassificationAccuracy(evaluate.Metric):
    """See `accuracy` of `fusmae_hf.evaluation.scores`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Accuracy of one class a scene: of all samples, of each class, and the mean over classes.",
            "predictions: class indices (samples,). references: class indices (samples,). class_names: a name for "
            "each class. ignore_index: reference of samples to leave out.",
            datasets.Value("int64"),
        )

    def _compute(self, predictions, references, class_names=None, ignore_index=IGNORED_LABEL):
        return accuracy(np.asarray(predictions), np.asarray(references), class_names, ignore_index)
