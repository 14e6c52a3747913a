"""What is timed is what the models compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from placement.model import preset_model
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.measure import Sizes
from placement.runtime.measure.bench import Bench
from placement.runtime.measure.experts import _Experts
from placement.runtime.measure.shapes import shape_on_rank
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.tiny import tiny_model

pytestmark = pytest.mark.model

COUNTS = (3, 0, 5)


@pytest.mark.parametrize(("preset", "family"), [("gpt-oss-20b", "gpt_oss"), ("olmoe", "olmoe")])
def test_experts_compute_what_the_model_s_do(preset: str, family: str) -> None:
    """The same weights in transformers' own module give the same outputs: biases and gate included."""
    sizes = Sizes(shrink=64)
    bench = Bench(mesh=Mesh.single(), sizes=sizes, progress=lambda _: None, dtype=torch.float32)
    shape = shape_on_rank(preset_model(preset), world_size=8, sizes=sizes, element_bytes=4)
    num_pairs = sum(COUNTS)
    timed = _Experts(bench, shape, most_pairs=num_pairs)
    counts_C = torch.tensor([*COUNTS, *[0] * (shape.local_experts - len(COUNTS))])
    model = tiny_model(
        family,
        num_layers=1,
        num_experts=shape.local_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_hidden_size,
        moe_intermediate_size=shape.expert_hidden_size,
    )
    experts: Any = moe_layers_of(model)[0].experts
    for name, tensor in timed._module.named_buffers():
        getattr(experts, name).data = tensor
    index_P1 = torch.repeat_interleave(torch.arange(shape.local_experts), counts_C).unsqueeze(1)
    with torch.no_grad():
        expected_PH = experts(timed._x_PH, index_P1, torch.ones(num_pairs, 1))
        torch.testing.assert_close(timed(num_pairs, counts_C), expected_PH, atol=1e-5, rtol=1e-5)
