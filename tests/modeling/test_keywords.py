"""What `forward` takes: its own arguments and what other libraries hand to any model, and nothing else."""

import inspect

import pytest
import torch
from transformers import Trainer, TrainingArguments, pipeline
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import TransformersKwargs

from fusmae_hf import FusMAEForImageClassification, FusMAEForPreTraining, FusMAEForSemanticSegmentation, FusMAEModel
from fusmae_hf.modeling.keywords_fusmae import OF_TEXT, OF_TRANSFORMERS

from .conftest import CLASSES, HEADS

LABELS = {
    FusMAEForImageClassification: torch.tensor(1),
    FusMAEForSemanticSegmentation: torch.ones(16, 16, dtype=torch.long),
    FusMAEForPreTraining: None,
}


@pytest.mark.parametrize("model_class", CLASSES)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pixel_value_sar", "Did you mean `pixel_values_sar`"),
        ("pixel_masks", "Did you mean `pixel_mask`"),
        ("sar_avialable", "Did you mean `sar_available`"),
        ("gds", "Did you mean `gsd`"),
        ("output_attention", "Did you mean `output_attentions`"),
        ("mask_ratio", "field of the configuration: set `model.config.mask_ratio`"),
        ("interpolate_pos_encoding", r"It takes \['pixel_values', 'pixel_values_sar'"),
        ("input_ids", "takes images, by name"),
        ("attention_mask", "takes images, by name"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(tiny, images, model_class, name, message):
    model = model_class(tiny())
    with pytest.raises(TypeError, match=f"{model_class.__name__} has no argument `{name}`.*{message}"):
        model(**images, **{name: torch.ones(4)})


@pytest.mark.parametrize("model_class", CLASSES)
def test_an_unknown_name_is_refused_though_it_is_none(tiny, images, model_class):
    with pytest.raises(TypeError, match="`pixel_value_sar`"):
        model_class(tiny())(**images, pixel_value_sar=None)


@pytest.mark.parametrize("model_class", [FusMAEModel, FusMAEForPreTraining])
def test_a_model_without_labels_refuses_them(tiny, images, model_class):
    with pytest.raises(TypeError, match="has no argument `labels`"):
        model_class(tiny())(**images, labels=torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("model_class", CLASSES)
def test_what_other_libraries_hand_to_any_model_changes_nothing(tiny, images, model_class):
    model = model_class(tiny()).eval()
    images |= {"noise": torch.rand(4, 16), "noise_sar": torch.rand(4, 16)} if model_class not in HEADS else {}
    expected = model(**images).to_tuple()
    handed = dict.fromkeys(OF_TEXT) | {"num_items_in_batch": torch.tensor(4), "output_attentions": False}
    handed |= {"output_hidden_states": None, "return_dict": True, "is_causal": False, "use_cache": None}
    got = model(**images, **handed).to_tuple()
    torch.testing.assert_close(got, expected)


def test_the_list_covers_what_transformers_declares():
    assert set(TransformersKwargs.__annotations__) <= set(OF_TRANSFORMERS)


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_trainer_still_finds_the_arguments(model_class):
    arguments = inspect.signature(model_class.forward).parameters
    assert {"pixel_values", "pixel_values_sar", "pixel_mask_sar", "optical_available"} <= set(arguments)


class Samples(torch.utils.data.Dataset):
    def __init__(self, label: torch.Tensor | None, sensors: tuple[str, ...]):
        bands = {"pixel_values": 3, "pixel_values_sar": 2}
        self.sample = {name: torch.randn(bands[name], 16, 16) for name in sensors}
        self.sample |= {} if label is None else {"labels": label}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.sample


@pytest.mark.parametrize("sensors", [("pixel_values", "pixel_values_sar"), ("pixel_values_sar",), ("pixel_values",)])
@pytest.mark.parametrize("model_class", LABELS)
def test_the_plain_trainer_trains_and_hands_inputs_to_metrics(tiny, tmp_path, model_class, sensors):
    seen = []
    trainer = Trainer(
        model=model_class(tiny(num_labels=3)),
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            report_to="none", include_for_metrics=["inputs", "loss"], gradient_checkpointing=True, save_strategy="no",
        ),
        train_dataset=Samples(LABELS[model_class], sensors),
        eval_dataset=Samples(LABELS[model_class], sensors),
        compute_metrics=lambda prediction: seen.append(prediction.inputs.shape) or {"seen": 1.0},
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    if LABELS[model_class] is not None:  # metrics need labels
        assert seen == [(4, 3 if "pixel_values" in sensors else 2, 16, 16)]


class OneImage(BaseImageProcessor):
    model_input_names = ("pixel_values",)

    def __call__(self, image, return_tensors=None, **kwargs):
        return BatchFeature({"pixel_values": torch.ones(1, 3, 16, 16)})


def test_a_pipeline_runs_with_a_processor_that_suits_it(tiny):
    PIL = pytest.importorskip("PIL.Image")
    extract = pipeline(
        "image-feature-extraction", model=FusMAEModel(tiny()), image_processor=OneImage(), return_tensors=True
    )
    assert extract(PIL.new("RGB", (16, 16))).shape == (1, 17, 32)
