"""transformers' common tests on every Fus-MAE class, unmodified (`make conformance`)."""

import unittest

import pytest
import torch
from transformers.models.auto import modeling_auto

from fusmae_hf import (
    FusMAEBackbone,
    FusMAEConfig,
    FusMAEForImageClassification,
    FusMAEForPreTraining,
    FusMAEForSemanticSegmentation,
    FusMAEModel,
)

from .upstream import available, upstream

pytestmark = pytest.mark.conformance

if not available():
    pytest.skip("transformers' tests are not unpacked: run `make conformance`", allow_module_level=True)

ConfigTester = upstream("test_configuration_common").ConfigTester
ModelTesterMixin = upstream("test_modeling_common").ModelTesterMixin
BackboneTesterMixin = upstream("test_backbone_common").BackboneTesterMixin

# The mixins recognise what a class is for by its name in transformers' own tables.
modeling_auto.MODEL_MAPPING_NAMES["fusmae"] = "FusMAEModel"
modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES["fusmae"] = "FusMAEForPreTraining"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["fusmae"] = "FusMAEForImageClassification"
modeling_auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["fusmae"] = "FusMAEForSemanticSegmentation"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["fusmae"] = "FusMAEBackbone"


class FusMAEModelTester:
    """Tiny models and inputs, in the shape that the mixins expect of a tester."""

    is_training = True
    batch_size = 3
    image_size = 16
    patch_size = 4
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    mask_ratio = 0.5
    num_patches = (image_size // patch_size) ** 2

    def __init__(self, parent: unittest.TestCase, masked: bool):
        self.parent = parent
        self.masked = masked
        visible = int(self.num_patches * (1 - self.mask_ratio)) if masked else self.num_patches
        self.seq_length = 1 + 2 * visible

    def get_config(self) -> FusMAEConfig:
        return FusMAEConfig(
            optical_bands=["B02", "B03", "B04"],
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=24,
            mask_ratio=self.mask_ratio,
            segmentation_hidden_size=16,
            contrastive_loss_weight=0.1 if self.masked else 0.0,
            contrastive_projection_size=12,
            feature_layers=None if self.masked else [0, 2],
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FusMAEConfig, dict[str, torch.Tensor]]:
        size = (self.image_size, self.image_size)
        inputs = {
            "pixel_values": torch.randn(self.batch_size, 3, *size),
            "pixel_values_sar": torch.randn(self.batch_size, 2, *size),
        }
        if self.masked:
            inputs["noise"] = torch.rand(self.batch_size, self.num_patches)
            inputs["noise_sar"] = torch.rand(self.batch_size, self.num_patches)
        return self.get_config(), inputs


class FusMAEConformance(ModelTesterMixin):
    masked: bool
    test_resize_embeddings = False
    test_torch_exportable = True
    additional_model_inputs = ("pixel_values_sar", "noise_sar")

    def setUp(self):
        self.model_tester = FusMAEModelTester(self, self.masked)
        self.config_tester = ConfigTester(self, config_class=FusMAEConfig, has_text_modality=False, hidden_size=36)

    def test_config(self):
        self.config_tester.run_common_tests()


class FusMAEModelConformanceTest(FusMAEConformance, unittest.TestCase):
    all_model_classes = (
        FusMAEModel,
        FusMAEForImageClassification,
        FusMAEForSemanticSegmentation,
        FusMAEBackbone,
    )
    masked = False


class FusMAEForPreTrainingConformanceTest(FusMAEConformance, unittest.TestCase):
    all_model_classes = (FusMAEForPreTraining,)
    masked = True


class FusMAEBackboneConformanceTest(BackboneTesterMixin, unittest.TestCase):
    all_model_classes = (FusMAEBackbone,)
    config_class = FusMAEConfig

    def setUp(self):
        self.model_tester = FusMAEModelTester(self, masked=False)
