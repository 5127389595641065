"""What labels mean to a head, whether they suit it, and losses that weigh them."""

import torch
from torch import nn

from .configuration_fusmae import FusMAEConfig


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


def _is_integer(labels: torch.Tensor) -> bool:
    return not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool


def _refuse_classes(labels: torch.Tensor, num_labels: int, ignore_index: int) -> None:
    """Raise a ValueError where a label is neither a class nor `ignore_index`. Looks at values."""
    labels = labels.long()  # small unsigned integers compare wrongly with negative and large numbers
    wrong = labels[((labels < 0) | (labels >= num_labels)) & (labels != ignore_index)]
    if wrong.numel():
        raise ValueError(
            f"`labels` hold {sorted(set(wrong.flatten()[:1000].tolist()))[:5]}, but with `num_labels={num_labels}` "
            f"classes are 0 to {num_labels - 1}, and {ignore_index} is left out of the loss. Number the classes from "
            "0, or load the model with the right `num_labels`."
        )


def _regression_hint(config: FusMAEConfig) -> str:
    """What to do about integer labels of a regression that was inferred."""
    if config.problem_type is None and config.num_labels == 1:
        return " One output means regression; for two classes use `num_labels=2`."
    return ""


def check_image_labels(labels: torch.Tensor, batch_size: int, config: FusMAEConfig, look: bool) -> None:
    """Raise a ValueError unless labels of whole images suit the configuration.

    Args:
        labels: see [`FusMAEForImageClassification`].
        batch_size: number of pairs.
        config: of the model.
        look: whether to check the values, too.
    """
    kind, num_labels = resolve_problem_type(config, labels), count_labels(config)
    shape = tuple(labels.shape)
    if kind == "single_label_classification":
        if shape != (batch_size,) or not _is_integer(labels):
            raise ValueError(
                f"`labels` of a single-label problem must be integers of shape ({batch_size},), one class a sample, "
                f"but are {labels.dtype} of shape {shape}. For several labels a sample, pass floats of shape "
                f"({batch_size}, {num_labels}) and set problem_type='multi_label_classification'."
            )
        if look:
            _refuse_classes(labels, num_labels, ignore_index=-100)
        return
    shapes: list[tuple[int, ...]] = [(batch_size, num_labels)]
    if kind == "regression" and num_labels == 1:
        shapes.append((batch_size,))
    if shape not in shapes or not labels.is_floating_point():
        raise ValueError(
            f"`labels` of problem_type={kind!r} must be floats of shape {' or '.join(map(str, shapes))} with "
            f"`num_labels={num_labels}`, but are {labels.dtype} of shape {shape}.{_regression_hint(config)}"
        )
    if look and kind == "multi_label_classification" and not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError(
            f"`labels` of a multi-label problem must lie in [0, 1], but range from {labels.min()} to {labels.max()}."
        )
    if look and kind == "regression" and not bool(labels.isfinite().all()):
        raise ValueError("`labels` of a regression hold NaN or infinity. Leave such samples out of the batch.")


def check_dense_labels(
    labels: torch.Tensor, batch_size: int, size: tuple[int, int], config: FusMAEConfig, look: bool
) -> None:
    """Raise a ValueError unless label maps suit the configuration and the images.

    Args:
        labels: see [`FusMAEForSemanticSegmentation`].
        batch_size: number of pairs.
        size: (height, width) of the images in pixels.
        config: of the model.
        look: whether to check the values, too.
    """
    kind, num_labels = resolve_problem_type(config, labels), count_labels(config)
    if kind == "multi_label_classification":
        raise ValueError(
            "Dense labels are classes (integers) or values (floats with problem_type='regression'); "
            f"problem_type={config.problem_type!r} with {labels.dtype} labels is neither."
        )
    dense = kind == "regression"
    expected = f"({batch_size}, {num_labels}, height, width)" if dense else f"({batch_size}, height, width)"
    fits = labels.shape[0] == batch_size if labels.ndim else False
    if dense and num_labels == 1 and labels.ndim == 3:
        pass
    elif dense:
        fits = fits and labels.ndim == 4 and labels.shape[1] == num_labels
    else:
        fits = fits and labels.ndim == 3
    if not fits or (not labels.is_floating_point() if dense else not _is_integer(labels)):
        raise ValueError(
            f"`labels` must be {'floats' if dense else 'integers'} of shape {expected} for problem_type={kind!r}, but "
            f"are {labels.dtype} of shape {tuple(labels.shape)}.{_regression_hint(config)}"
        )
    height, width = labels.shape[-2:]
    if height * size[1] != width * size[0] or (height % size[0] and size[0] % height):
        raise ValueError(
            f"`labels` of {height}x{width} px cannot cover the same ground as images of {size[0]}x{size[1]} px: both "
            "sides must be the same whole multiple, or fraction, of the image's. Where the images were padded, pad "
            f"the labels likewise with {'NaN' if dense else config.semantic_loss_ignore_index}."
        )
    if look and not dense:
        _refuse_classes(labels, num_labels, config.semantic_loss_ignore_index)


def weighs_classes(config: FusMAEConfig) -> bool:
    """Whether the classification loss is not the plain cross-entropy."""
    return config.class_weights is not None or config.focal_gamma > 0


def weighted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    config: FusMAEConfig,
    multi_label: bool = False,
    ignore_index: int = -100,
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
        labels = labels.to(logits.dtype)
        errors = nn.functional.binary_cross_entropy_with_logits(logits, labels, pos_weight=weights, reduction="none")
        probability = torch.sigmoid(logits)
        missed = torch.lerp(probability, 1 - probability, labels)
        return (errors * missed.clamp(min=1e-6) ** config.focal_gamma).mean()
    errors = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=ignore_index)
    counts = labels != ignore_index
    # Not below 1e-6, where a power below 1 has no finite slope.
    errors = errors * (1 - torch.exp(-errors)).clamp(min=1e-6) ** config.focal_gamma
    if weights is not None:
        errors = errors * weights[torch.where(counts, labels, 0)]
    return errors.sum() / counts.sum().clamp(min=1)
