"""Average precision of several labels a scene, micro and macro, for `evaluate`."""

import datasets
import evaluate

from fusmae_hf.evaluation.metrics import metric_info
from fusmae_hf.evaluation.scores import average_precision


class MultilabelAveragePrecision(evaluate.Metric):
    """See `average_precision` of `fusmae_hf.evaluation.scores`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Average precision of several labels a scene: micro, macro and of each class.",
            "predictions: scores (samples, classes), higher where a class is more likely. references: (samples, "
            "classes), 1 where a class holds, else 0. class_names: a name for each class.",
            datasets.Sequence(datasets.Value("float64")),
        )

    def _compute(self, predictions, references, class_names=None):
        return average_precision(predictions, references, class_names)
