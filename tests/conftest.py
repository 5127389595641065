"""Settings that every test shares."""

import pytest
import torch

# Marks that transformers' own test mixins set (see tests/conformance).
UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_mps_test",
    "fsdp2_test",
    "generate",
    "is_staging_test",
    "is_pipeline_test",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # faster than many for models as small as these
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: set by transformers' test mixins")
