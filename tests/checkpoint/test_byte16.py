"""The bundled real model on real text: the same from a permuted checkpoint, by our own loader.

Shape letters: T tokens, V vocabulary, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensor_files import digests

from placement.checkpoint import permute_checkpoint
from placement.formats.permutation import Permutation
from placement.runtime.checkpoint import load_checkpoint, read_sequences
from placement.runtime.samples import resolve_model, sample_texts
from placement.runtime.verify import RELATIVE_TOLERANCE

pytestmark = pytest.mark.model

E = 16
K = 2
LAYERS = 6
CONTEXT = 256


@pytest.fixture(scope="module")
def order() -> Permutation:
    """Return a random order of experts in every layer."""
    rng = np.random.default_rng(0)
    return Permutation(
        old_expert_of_new_LE=np.array([rng.permutation(E) for _ in range(LAYERS)]),
        moe_layer_ids=tuple(range(LAYERS)),
        num_devices=4,
    )


@contextmanager
def routers(model: Any) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect of every router its logits ``[T, E]`` and the experts that it chose ``[T, K]``."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if name.endswith(".mlp.gate"):
                hook = module.register_forward_hook(
                    lambda router, args, output: found.append((output[0], output[2]))
                )
                hooks.callback(hook.remove)
        yield found


def run(folder: Path) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Run the start of every sample text; return logits ``[T, V]`` and what the routers did."""
    model = load_checkpoint(folder, dtype=torch.float32)
    sequences = read_sequences(folder, sample_texts(), max_length=CONTEXT)
    tokens = torch.from_numpy(np.stack([s.tokens_T for s in sequences if s.start == 0]))
    with torch.inference_mode(), routers(model) as found:
        logits = model(tokens, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1]), found


def test_byte16_computes_the_same(tmp_path: Path, order: Permutation) -> None:
    """Logits within rounding, the most likely byte and all choices of experts the same; no ties to break."""
    source = resolve_model("byte16")
    permute_checkpoint(source, tmp_path / "b", order)
    expected_TV, before = run(source)
    actual_TV, after = run(tmp_path / "b")
    tolerance = RELATIVE_TOLERANCE * float(expected_TV.abs().max())
    assert float((actual_TV - expected_TV).abs().max()) <= tolerance
    assert torch.equal(actual_TV.argmax(1), expected_TV.argmax(1))
    assert len(before) == LAYERS
    for (score_TE, chosen_TK), (_, chosen_after_TK), old_E in zip(
        before, after, order.old_expert_of_new_LE, strict=True
    ):
        old = torch.from_numpy(old_E.copy())
        assert torch.equal(old[chosen_after_TK].sort().values, chosen_TK.sort().values)
        best = score_TE.topk(K + 1).values
        assert bool((best[:, K - 1] > best[:, K]).all())


def test_byte16_comes_back_byte_for_byte(tmp_path: Path, order: Permutation) -> None:
    """A file that the safetensors library wrote is restored to the last byte."""
    source = resolve_model("byte16")
    permute_checkpoint(source, tmp_path / "b", order)
    permute_checkpoint(tmp_path / "b", tmp_path / "c", order.inverse())
    assert digests(tmp_path / "c") == digests(source)
    assert digests(tmp_path / "b")["model.safetensors"] != digests(source)["model.safetensors"]


def test_ties_fall_by_position() -> None:
    """Equal scores are the one case where a permuted router chooses otherwise: the limit of exactness."""
    score_E = torch.full((4,), 0.5)
    old = torch.tensor([3, 2, 1, 0])
    assert old[score_E[old].topk(1).indices].tolist() != score_E.topk(1).indices.tolist()
