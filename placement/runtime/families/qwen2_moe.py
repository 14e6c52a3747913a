"""Qwen2-MoE (shared expert and dense layers stay as they are)."""

from __future__ import annotations

from placement.runtime.families.fused import FusedFamily

__all__ = ["FAMILY"]

FAMILY = FusedFamily(model_type="qwen2_moe")
