"""What labels mean to a head, whether they suit it, and their losses."""

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

from .configuration_fusmae import FusMAEConfig

IGNORED = -100
"""Label of a scene that does not count, as everywhere in transformers. Of a quantity NaN does not."""


def count_labels(config: FusMAEConfig) -> int:
    """`config.num_labels`, which must be set."""
    if config.num_labels is None:
        raise ValueError("`id2label` of the configuration is None: a head needs labels. Set `num_labels`.")
    if config.class_weights is not None and len(config.class_weights) != config.num_labels:
        raise ValueError(
            f"`class_weights` has {len(config.class_weights)} values for {config.num_labels} classes: give one each."
        )
    return config.num_labels


def resolve_problem_type(config: FusMAEConfig, labels: torch.Tensor) -> str:
    """`config.problem_type`, or what number and dtype of the labels mean where it is None, as in transformers."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def check_labels(labels: torch.Tensor, images: torch.Tensor, config: FusMAEConfig, dense: bool = False) -> None:
    """Raise a ValueError unless labels suit the configuration and the images.

    Values are looked at on the CPU alone, and where no graph is traced: a look would stall an accelerator.

    Args:
        labels: see [`FusMAEForImageClassification`] and, for label maps, [`FusMAEForSemanticSegmentation`].
        images: `(batch_size, bands, height, width)`.
        config: of the model.
        dense: whether they are label maps.
    """
    kind, num_labels, batch_size = resolve_problem_type(config, labels), count_labels(config), images.shape[0]
    if dense and kind == "multi_label_classification":
        raise ValueError(
            "Dense labels are classes (integers) or values (floats with problem_type='regression'); "
            f"problem_type={config.problem_type!r} with {labels.dtype} labels is neither."
        )
    size, classes = ("height", "width") if dense else (), kind == "single_label_classification"
    shapes = [(batch_size, *size) if classes else (batch_size, num_labels, *size)]
    if kind == "regression" and num_labels == 1:
        shapes.append((batch_size, *size))
    number_of = {len(shape): shape[: len(shape) - len(size)] for shape in shapes}
    fits = labels.ndim in number_of and labels.shape[: labels.ndim - len(size)] == number_of[labels.ndim]
    is_integer = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
    if not fits or not (is_integer if classes else labels.is_floating_point()):
        hint = ""
        if classes and not dense:
            hint = (
                f" For several labels a sample, pass floats of shape ({batch_size}, {num_labels}) and set "
                "problem_type='multi_label_classification'."
            )
        elif config.problem_type is None and num_labels == 1:
            hint = " One output means regression; for two classes use `num_labels=2`."
        raise ValueError(
            f"`labels` of problem_type={kind!r} must be {'integers' if classes else 'floats'} of shape "
            f"{' or '.join(str(shape) for shape in shapes)} with `num_labels={num_labels}`, but are {labels.dtype} "
            f"of shape {tuple(labels.shape)}.{hint}".replace("'height', 'width'", "height, width")
        )
    if dense:
        (height, width), (rows, columns) = images.shape[-2:], labels.shape[-2:]
        if rows * width != columns * height or (rows % height and height % rows):
            no_data = config.semantic_loss_ignore_index if classes else "NaN"
            raise ValueError(
                f"`labels` of {rows}x{columns} px cannot cover the same ground as images of {height}x{width} px: both "
                "sides must be the same whole multiple, or fraction, of the image's. Where the images were padded, "
                f"pad the labels likewise with {no_data}."
            )
    if labels.device.type != "cpu" or is_tracing(labels):
        return
    if classes:
        ignored = config.semantic_loss_ignore_index if dense else IGNORED
        labels = labels.long()  # small unsigned integers compare wrongly with negative and large numbers
        wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != ignored) & (labels != IGNORED)]
        if wrong.numel():
            raise ValueError(
                f"`labels` hold {sorted(set(wrong.flatten()[:1000].tolist()))[:5]}, but with `num_labels={num_labels}`"
                f" classes are 0 to {num_labels - 1}, and {ignored} is left out of the loss. Number the classes from "
                "0, or load the model with the right `num_labels`."
            )
    elif kind == "multi_label_classification":
        counted = labels[labels != IGNORED]
        if not bool(((counted >= 0) & (counted <= 1)).all()):
            raise ValueError(
                f"`labels` of a multi-label problem must lie in [0, 1], or be {IGNORED} where there is none, but "
                f"range from {counted.min()} to {counted.max()}."
            )
    elif not dense and bool(labels.isinf().any()):
        raise ValueError("`labels` of a regression hold infinity. Put NaN where there is no value.")


def scene_loss(labels: torch.Tensor, logits: torch.Tensor, config: FusMAEConfig, **kwargs) -> torch.Tensor:
    """Loss of labels of scenes, zero where no label counts; what `model.loss_function` is unless it is set.

    Args:
        labels: see [`FusMAEForImageClassification`].
        logits: `(batch_size, num_labels)`.
        config: of the model. Its `problem_type` is set where it is None, as in transformers.
        kwargs: what transformers hands to any loss.

    Returns:
        [`weighted_loss`] of classes, the mean squared error of values.
    """
    kind = resolve_problem_type(config, labels)
    if config.problem_type is None:
        config.problem_type = kind  # type: ignore[assignment]
    if kind == "regression":
        return squared_error(logits, labels)
    return weighted_loss(logits, labels, config, multi_label=kind == "multi_label_classification")


def squared_error(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error `()`, float32, where labels (of the same number of values) are finite; zero without any."""
    labels = labels.reshape(predicted.shape)
    valid = labels.isfinite()
    error = torch.where(valid, predicted.float() - torch.where(valid, labels.float(), 0.0), 0.0)
    return error.square().sum() / valid.sum().clamp(min=1)


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: FusMAEConfig,
    multi_label: bool = False,
    ignore_index: int = IGNORED,
) -> torch.Tensor:
    """Cross-entropy with class weights and focal modulation (Lin et al., 2017, arXiv 1708.02002, equation 4).

    An error is multiplied by `(1 - p) ** focal_gamma`, p being the probability given to what is true, and by the
    weight of its class. The mean is over the labels, not over their weights, so that it does not depend on how a batch
    is cut.

    Args:
        logits: `(batch_size, num_labels, ...)`.
        labels: integers `(batch_size, ...)`; with `multi_label` floats of the shape of the logits.
        config: has `class_weights` and `focal_gamma`.
        multi_label: each class is a problem of its own; weights are those of its positives.
        ignore_index: label that does not count.

    Returns:
        The loss `()`, float32; zero where no label counts.
    """
    logits = logits.float()
    weights = None if config.class_weights is None else logits.new_tensor(config.class_weights)
    if multi_label:
        counts = labels != ignore_index
        labels = torch.where(counts, labels.to(logits.dtype), 0.0)
        errors = nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
        if config.focal_gamma:
            probability = torch.sigmoid(logits)
            missed = torch.lerp(probability, 1 - probability, labels)
            errors = errors * missed.clamp(min=1e-6) ** config.focal_gamma
        return torch.where(counts, errors, 0.0).sum() / counts.sum().clamp(min=1)
    labels = labels.long()
    labels = labels.masked_fill(labels == IGNORED, ignore_index)
    errors = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    counts = labels != ignore_index
    if config.focal_gamma:  # not below 1e-6, where a power below 1 has no finite slope
        errors = errors * (1 - torch.exp(-errors)).clamp(min=1e-6) ** config.focal_gamma
    if weights is not None:
        errors = errors * weights[torch.where(counts, labels, 0)]
    return errors.sum() / counts.sum().clamp(min=1)


def dense_loss(logits: torch.Tensor, labels: torch.Tensor, config: FusMAEConfig) -> torch.Tensor:
    """Loss of label maps, to whose size the logits are upsampled bilinearly; zero where no label counts.

    Args:
        logits: `(batch_size, num_labels, rows, columns)`.
        labels: see [`FusMAEForSemanticSegmentation`]; values that are not finite mean no data.
        config: of the model.

    Returns:
        [`weighted_loss`] of classes, the mean squared error of values.
    """
    logits = nn.functional.interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
    if resolve_problem_type(config, labels) != "regression":
        return weighted_loss(logits, labels, config, ignore_index=config.semantic_loss_ignore_index)
    return squared_error(logits, labels)
