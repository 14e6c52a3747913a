"""Checkpoints with their experts in another order, for engines that shard them contiguously.

`permute_checkpoint` rewrites a folder of safetensors, tensor by tensor, so that the model computes the same
and every device's contiguous shard holds the experts that the placement gives it.
"""

from __future__ import annotations

from placement.checkpoint.permute import CheckpointReport, permute_checkpoint, restore_checkpoint

__all__ = ["CheckpointReport", "permute_checkpoint", "restore_checkpoint"]
