"""F1 of several labels a scene, micro and macro, for `evaluate`."""

import datasets
import evaluate

from fusmae_hf.evaluation.metrics import metric_info
from fusmae_hf.evaluation.scores import f1


class MultilabelF1(evaluate.Metric):
    """See `f1` of `fusmae_hf.evaluation.scores`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "F1 of several labels a scene: micro, macro and of each class.",
            "predictions: scores (samples, classes); a class is predicted where its score exceeds the threshold. "
            "references: (samples, classes), 1 where a class holds, else 0. threshold: 0.5 for probabilities, 0 for "
            "logits. class_names: a name for each class.",
            datasets.Sequence(datasets.Value("float64")),
        )

    def _compute(self, predictions, references, threshold=0.5, class_names=None):
        return f1(predictions, references, threshold, class_names)
