"""Proves on real text that a placement leaves a model's outputs unchanged, and comes out without a trace.

Shape letters: T tokens of one sequence, V vocabulary, L MoE layers, K top-k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from placement.errors import InputError, PlacementError
from placement.plan import Placement
from placement.runtime.checkpoint import TextSequence, load_checkpoint, read_sequences
from placement.runtime.families.registry import family_of, moe_layers_of
from placement.runtime.hook import apply_placement
from placement.runtime.samples import sample_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RELATIVE_TOLERANCE", "VerifyReport", "verify_placement"]

RELATIVE_TOLERANCE = 1e-4
"""Allowed difference of a logit, as a share of the largest logit.

A float32 sum of a few thousand terms in another order differs by about 1e-6 of its size, some layers on
top by 1e-5; an expert in the wrong slot changes logits by a tenth of their size and more.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """How a model's outputs with a placement compare with those without.

    Parameters
    ----------
    max_abs_diff, mean_abs_diff
        Absolute difference of the logits with the placement from those before.
    logit_scale
        Largest absolute logit before.
    tolerance
        Allowed `max_abs_diff`: `RELATIVE_TOLERANCE` times `logit_scale`.
    tokens
        Tokens compared.
    top1_agreement
        Share of tokens whose most likely next token is the same.
    routing_agreement
        Share of (token, layer) pairs whose selected experts are the same. A near-tie of two experts may
        fall the other way by rounding; then logits may differ by more than `tolerance`.
    restored
        Whether all weights and buffers are bit for bit the same after the placement was taken out.
    max_abs_diff_restored
        Absolute difference of the logits after that; 0 unless kernels depend on memory addresses.
    dtype
        Floating point type of the comparison.
    """

    max_abs_diff: float
    mean_abs_diff: float
    logit_scale: float
    tolerance: float
    tokens: int
    top1_agreement: float
    routing_agreement: float
    restored: bool
    max_abs_diff_restored: float
    dtype: str

    @property
    def ok(self) -> bool:
        """Whether the outputs are unchanged and the model was restored."""
        return self.restored and max(self.max_abs_diff, self.max_abs_diff_restored) <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {**asdict(self), "ok": self.ok}

    def check(self) -> None:
        """Raise what is wrong, if anything is.

        Raises
        ------
        PlacementError
            If outputs differ by more than the tolerance, or the model was not restored.
        """
        if not self.restored:
            raise PlacementError("the model's weights are not bit for bit the same after the placement")
        if not self.ok:
            worst = max(self.max_abs_diff, self.max_abs_diff_restored)
            raise PlacementError(
                f"the placement changes the model's outputs: logits differ by up to {worst:.3g}, allowed are "
                f"{self.tolerance:.3g} ({RELATIVE_TOLERANCE:g} of {self.logit_scale:.3g}); "
                f"{(1 - self.routing_agreement) * 100:.3g} % of the routing differs"
            )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Outputs:
    """Logits and selected experts of one sequence, on the CPU."""

    logits_TV: torch.Tensor
    experts_LTK: torch.Tensor


def verify_placement(
    model_dir: Path,
    placement: Placement,
    *,
    text_files: Sequence[Path] | None = None,
    max_tokens: int = 8192,
    context: int | None = None,
    device: str = "cpu",
) -> VerifyReport:
    """Run the same text before, with and after a placement, in float32, and compare.

    Parameters
    ----------
    model_dir
        Checkpoint folder.
    text_files
        Text to run; `None` means the bundled samples. Files are taken in equal shares.
    max_tokens
        Tokens to run in all, at most. Memory: this times the vocabulary times 4 bytes.
    context
        Tokens per sequence at most; `None` means the model's context.
    device
        Torch device that the model runs on.

    Raises
    ------
    InputError
        If checkpoint, text or placement are unusable or do not fit together.
    """
    if max_tokens < 1:
        raise InputError(f"{max_tokens} tokens to verify on; it must be at least 1")
    files = sample_texts() if text_files is None else tuple(text_files)
    sequences = _equal_shares(read_sequences(model_dir, files, max_length=context), max_tokens)
    model = load_checkpoint(model_dir, dtype=torch.float32, device=device)
    digest = _digest(model)
    before = [_run(model, sequence) for sequence in sequences]
    comparison = _Comparison()
    with apply_placement(model, placement):
        for sequence, expected in zip(sequences, before, strict=True):
            comparison.add(expected, _run(model, sequence))
    restored = _Comparison()
    for sequence, expected in zip(sequences, before, strict=True):
        restored.add(expected, _run(model, sequence))
    return comparison.report(restored, same_weights=_digest(model) == digest)


class _Comparison:
    """Sums of differences over sequences."""

    def __init__(self) -> None:
        self.max_abs_diff = self.logit_scale = 0.0
        self._sum_abs_diff = 0.0
        self._logits = self._tokens = self._same_top1 = self._choices = self._same_choices = 0

    def add(self, expected: _Outputs, actual: _Outputs) -> None:
        """Compare one sequence; NaN differs from everything."""
        diff_TV = (actual.logits_TV - expected.logits_TV).abs().nan_to_num(nan=float("inf"))
        self.max_abs_diff = max(self.max_abs_diff, float(diff_TV.max()))
        self.logit_scale = max(self.logit_scale, float(expected.logits_TV.abs().max()))
        self._sum_abs_diff += float(diff_TV.sum(dtype=torch.float64))
        self._logits += diff_TV.numel()
        self._tokens += len(diff_TV)
        self._same_top1 += int((actual.logits_TV.argmax(1) == expected.logits_TV.argmax(1)).sum())
        same_LT = (actual.experts_LTK.sort().values == expected.experts_LTK.sort().values).all(dim=2)
        self._choices += same_LT.numel()
        self._same_choices += int(same_LT.sum())

    def report(self, restored: _Comparison, *, same_weights: bool) -> VerifyReport:
        """Put the figures with the placement and after it together."""
        return VerifyReport(
            max_abs_diff=self.max_abs_diff,
            mean_abs_diff=self._sum_abs_diff / self._logits,
            logit_scale=self.logit_scale,
            tolerance=RELATIVE_TOLERANCE * self.logit_scale,
            tokens=self._tokens,
            top1_agreement=self._same_top1 / self._tokens,
            routing_agreement=self._same_choices / self._choices,
            restored=same_weights,
            max_abs_diff_restored=restored.max_abs_diff,
            dtype="float32",
        )


def _equal_shares(sequences: Sequence[TextSequence], max_tokens: int) -> list[TextSequence]:
    """Cut every file to the same number of tokens, at most `max_tokens` in all."""
    files = list(dict.fromkeys(sequence.file for sequence in sequences))[:max_tokens]
    share = max_tokens // len(files)
    return [
        TextSequence(
            tokens_T=sequence.tokens_T[: share - sequence.start], file=sequence.file, start=sequence.start
        )
        for sequence in sequences
        if sequence.file in files and sequence.start < share
    ]


def _run(model: PreTrainedModel, sequence: TextSequence) -> _Outputs:
    tokens = torch.from_numpy(sequence.tokens_T).unsqueeze(0).to(model.device)
    with torch.inference_mode(), _routing(model) as experts:
        logits_TV = model(input_ids=tokens, use_cache=False).logits[0].float().cpu()
    return _Outputs(logits_TV=logits_TV, experts_LTK=torch.stack([index.cpu() for index in experts]))


@contextmanager
def _routing(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the routers' top-k expert ids, layer by layer, before a placement turns them into slots."""
    family, collected = family_of(model), list[torch.Tensor]()
    with ExitStack() as hooks:
        for layer in moe_layers_of(model):
            hook = layer.router.register_forward_hook(
                lambda router, args, output, layer=layer: collected.append(family.read_top_k(output, layer)),
                prepend=True,
            )
            hooks.callback(hook.remove)
        yield collected


def _digest(model: nn.Module) -> dict[str, str]:
    """Shape, type and SHA-256 of the bytes of every parameter and buffer, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: f"{tuple(tensor.shape)} {tensor.dtype} {_sha256(tensor)}" for name, tensor in named}


def _sha256(tensor: torch.Tensor) -> str:
    content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content.tobytes()).hexdigest()
