"""The tiny instances, prepared once."""

from pathlib import Path

import pytest

from benchmarks.gpu.instances import instances
from benchmarks.gpu.prepare import prepare


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tiny instances."""
    folder = tmp_path_factory.mktemp("prepared")
    for instance in instances(tiny=True):
        prepare(instance, folder, calibrations={}, work_s=0.05)
    return folder
