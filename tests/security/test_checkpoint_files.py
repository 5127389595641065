"""`config.json` and `preprocessor_config.json` of somebody else: right, or refused with a message."""

import json

from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st

from fusmae_hf import FusMAEConfig, FusMAEImageProcessor

from .test_dataset_info import ANY_JSON

CONFIG = FusMAEConfig.from_preset("tiny").to_dict()
PROCESSOR = FusMAEImageProcessor(statistics="bigearthnet").to_dict()
# OverflowError: a whole number of more than 308 digits where a float is meant.
REFUSALS = (ValueError, TypeError, OverflowError, StrictDataclassError)
# Those of every transformers model, such as `dtype` and `id2label`, transformers looks into before any check.
FIELDS = sorted(FusMAEConfig._own_fields() & CONFIG.keys())


@settings(max_examples=300, derandomize=True, deadline=None)
@given(key=st.sampled_from(FIELDS), value=ANY_JSON)
def test_a_configuration_with_one_value_replaced_is_refused_or_right(key, value):
    try:
        config = FusMAEConfig.from_dict(CONFIG | {key: value})
    except REFUSALS:
        return
    assert FusMAEConfig.from_dict(json.loads(config.to_json_string())).hidden_size == config.hidden_size


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=5))
def test_any_configuration_is_refused_or_right(fields):
    try:
        config = FusMAEConfig.from_dict(fields)
    except REFUSALS:
        return
    assert config.image_height_width


@settings(max_examples=300, derandomize=True, deadline=None)
@given(key=st.sampled_from(sorted(PROCESSOR)), value=ANY_JSON)
def test_a_processor_with_one_value_replaced_is_refused_or_right(key, value):
    try:
        processor = FusMAEImageProcessor.from_dict(PROCESSOR | {key: value})
    except REFUSALS:
        return
    assert processor.to_dict()
