"""Caches of evaluate that belong to the tests."""

from pathlib import Path

import evaluate
import pytest


@pytest.fixture(autouse=True, scope="session")
def _evaluate_in_a_folder_of_the_tests(tmp_path_factory: pytest.TempPathFactory):
    """Metrics write their temporary files below the tests' folder."""
    folder: Path = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(folder))
        yield
