"""F1 of several labels a scene, micro and macro, for `evaluate`."""

import datasets
import evaluate

from fusmae_hf.evaluation.classification_scores import f1


class MultilabelF1(evaluate.Metric):
    """See `f1` of `fusmae_hf.evaluation.classification_scores`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of several labels a scene: micro, macro and of each class.",
            citation="",
            inputs_description=(
                "predictions: scores (samples, classes); a class is predicted where its score exceeds the threshold. "
                "references: (samples, classes), 1 where a class holds, else 0. threshold: 0.5 for probabilities, 0 "
                "for logits. class_names: a name for each class."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions, references, threshold=0.5, class_names=None):
        return f1(predictions, references, threshold, class_names)
