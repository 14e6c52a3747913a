"""What tests of recording share; torch is imported by those that ask for it."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """The models are tiny and the machine is shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model() -> Any:
    """A tiny OLMoE."""
    from placement.runtime.tiny import tiny_model

    return tiny_model("olmoe")
