"""Qwen3-MoE (dense layers stay as they are)."""

from __future__ import annotations

from placement.runtime.families.fused import FusedFamily

__all__ = ["FAMILY"]

FAMILY = FusedFamily(model_type="qwen3_moe")
