"""What the tests of every reader share; each makes its own `archive`."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def own_archive(archive: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(archive, tmp_path / "archive"))
