"""Intersection over union of label maps, for `evaluate`, from counts that grow with the batches."""

import datasets
import evaluate
import torch

from fusmae_hf.evaluation.metrics import metric_info
from fusmae_hf.evaluation.scores import confusion_counts, intersection_over_union


class MeanIou(evaluate.Metric):
    """Keeps one number for each pair of classes, not the maps.

    `add_batch` takes maps of any shape, `add_counts` what `confusion_counts` of `fusmae_hf.evaluation.scores`
    counted elsewhere, such as on a device or in another process. Options for `evaluate.load`:

    Args:
        num_classes: classes are 0 to `num_classes - 1`, and others are refused. None: as many as are seen.
        ignore_index: value in the references of pixels that are left out; None: all count.

    Attributes:
        counts: `(classes, classes)` int64, rows references, columns predictions; since the last `compute`.
    """

    def __init__(self, *args, num_classes=None, ignore_index=255, **kwargs):
        super().__init__(*args, **kwargs)
        if self.num_process > 1:
            raise ValueError("This metric does not gather over processes: gather counts and pass them to add_counts.")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self._reset()

    def _reset(self):
        self.counts, self._filled = torch.zeros((self.num_classes or 0,) * 2, dtype=torch.long), False

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            "Intersection over union of each class over all pixels together, and its mean.",
            "predictions and references: maps of class indices, (batch, height, width), the same size. class_names: a "
            "name for each class.",
            datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
        )

    def add_batch(self, *, predictions=None, references=None):
        """Count a batch of maps."""
        predicted, truth = torch.as_tensor(predictions), torch.as_tensor(references)
        num_classes = self.num_classes
        if num_classes is None:
            kept = truth[truth.long() != self.ignore_index]
            num_classes = 1 + max(int(values.max()) if values.numel() else -1 for values in (predicted, kept))
        self.add_counts(confusion_counts(predicted, truth, num_classes, self.ignore_index))

    def add(self, *, prediction=None, reference=None):
        """Count one map."""
        self.add_batch(predictions=prediction, references=reference)

    def add_counts(self, counts):
        """Add counts `(classes, classes)`, rows references, columns predictions."""
        counts = torch.as_tensor(counts).cpu().long()
        if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) > (self.num_classes or len(counts)):
            raise ValueError(f"counts have shape {tuple(counts.shape)}, but must be (classes, classes).")
        size = max(len(self.counts), len(counts))
        before, added = (torch.nn.functional.pad(table, (0, size - len(table)) * 2) for table in (self.counts, counts))
        self.counts = before + added
        self._filled = True

    def compute(self, *, predictions=None, references=None, class_names=None):
        """Scores of everything counted since the last call; see `intersection_over_union`."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self._filled:
            raise ValueError("Nothing was counted: pass predictions and references, or call add_batch first.")
        if class_names is not None and self.num_classes is None and len(class_names) > len(self.counts):
            self.add_counts(torch.zeros((len(class_names),) * 2, dtype=torch.long))
        counts = self.counts
        self._reset()
        return intersection_over_union(counts, class_names)
