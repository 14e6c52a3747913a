"""Running totals of the selected experts, on the device that selects them.

Totals are never set back: a window is the difference of two readings, so that nothing is lost or counted
twice between them, and the memory that a captured CUDA graph adds to stays where it is.

Shape letters: B rows of a batch, N token places of a row (padding included), P places of all rows, L MoE
layers, K top-k, C columns (experts, and one more for none where a family may lack some).
"""

from __future__ import annotations

import torch

from placement.errors import InputError

__all__ = ["LoadTally"]


class LoadTally:
    """Counts pairs of layer and column in place, with one kernel for all layers.

    No kernel here asks for the size of its result, as `torch.bincount` does: the host waits for nothing.

    Parameters
    ----------
    num_layers, num_columns
        Shape of the totals.
    device
        Where they are.
    """

    def __init__(self, num_layers: int, num_columns: int, *, device: torch.device) -> None:
        self._shape = num_layers, num_columns
        # Inference tensors could not be added to outside of inference mode.
        with torch.inference_mode(False):
            self._total = torch.zeros(num_layers * num_columns, dtype=torch.int64, device=device)
            first_L = torch.arange(num_layers, dtype=torch.int64, device=device) * num_columns
            self._first_L11 = first_L.view(-1, 1, 1)
            self._one = torch.ones(1, dtype=torch.int64, device=device)

    @property
    def device(self) -> torch.device:
        """Where the totals are."""
        return self._total.device

    def memory(self) -> tuple[torch.Tensor, ...]:
        """Everything that counting reads and writes beside the ids."""
        return self._total, self._first_L11, self._one

    def move_to(self, device: torch.device) -> None:
        """Go on on another device."""
        with torch.inference_mode(False):
            self._total, self._first_L11 = self._total.to(device), self._first_L11.to(device)
            self._one = self._one.to(device)

    def add(self, ids_LPK: torch.Tensor, kept_P: torch.Tensor | None) -> None:
        """Count the ids of a pass, of the kept places alone if some are not.

        Raises
        ------
        InputError
            If there are other numbers of kept and of routed places.
        """
        index = (ids_LPK + self._first_L11).view(-1)
        if kept_P is None:
            self._total.scatter_add_(0, index, self._one.expand(index.numel()))
            return
        if kept_P.numel() != ids_LPK.shape[1]:
            raise InputError(
                f"the routers saw {ids_LPK.shape[1]} tokens, the mask has {kept_P.numel()} places (parallel "
                "ranks may each see a part); say which places are real with batch(kept=...)"
            )
        one_P = kept_P.to(self.device, torch.int64)
        self._total.scatter_add_(0, index, one_P.view(1, -1, 1).expand(ids_LPK.shape).reshape(-1))

    def reading(self) -> torch.Tensor:
        """Totals as they are after the work queued so far, ``[layers, columns]``: a copy."""
        return self._total.clone().view(self._shape)
