"""Traffic of which only expert counts are known: how many tokens selected each expert, window by window.

Engines count cheaply what they do not keep per token. Counts serve every objective that loads alone decide
(balance; compute-bound step time where dispatch is not priced by destination), and none that asks which
experts a token selects together: fanout, hops, dispatched traffic.
Shape letters: W windows, L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.profile import RoutingProfile

__all__ = ["ExpertCounts", "drop_dense_layers"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertCounts:
    """Token-expert pairs per window, MoE layer and logical expert.

    Parameters
    ----------
    load_WLE
        Pairs, ``[windows, layers, experts]``, MoE layers alone in decoder order. Windows without any pair are
        dropped.
    top_k
        Experts that each token selects in each layer.
    model_name, moe_layer_ids
        What the layers are, as in `Trace`.

    Raises
    ------
    InputError
        If counts are not whole, negative, all zero, or a layer has none.
    """

    load_WLE: IntArray
    top_k: int
    model_name: str | None = None
    moe_layer_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        load = np.asarray(self.load_WLE)
        if load.ndim != 3 or 0 in load.shape:
            raise InputError(f"expert counts have shape {load.shape}, not [windows, layers, experts]")
        if load.dtype.kind not in "iu":
            raise InputError(f"expert counts are {load.dtype} values, not integers")
        if int(load.min()) < 0:
            window, layer, expert = (int(i) for i in np.unravel_index(int(load.argmin()), load.shape))
            raise InputError(
                f"the count of window {window} layer {layer} expert {expert} is {load.min()}; counts are not "
                "negative"
            )
        load = load[load.any(axis=(1, 2))]
        if not len(load):
            raise InputError("every count is zero: no token was routed while it was recorded")
        silent_L = ~load.any(axis=(0, 2))
        if silent_L.any():
            raise InputError(
                f"layer {int(silent_L.argmax())} of {load.shape[1]} counts no token; name the model with "
                "--model so that its dense layers are known"
            )
        if not 1 <= self.top_k <= load.shape[2]:
            raise InputError(f"top-{self.top_k} of {load.shape[2]} experts is impossible")
        if self.moe_layer_ids is not None and len(self.moe_layer_ids) != load.shape[1]:
            raise InputError(
                f"moe_layer_ids names {len(self.moe_layer_ids)} layers, the counts have {load.shape[1]}"
            )
        kept = np.ascontiguousarray(load, dtype=np.int64)
        kept.setflags(write=False)
        object.__setattr__(self, "load_WLE", kept)

    @property
    def num_windows(self) -> int:
        """Windows that routed a token."""
        return int(self.load_WLE.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.load_WLE.shape[1])

    @property
    def num_experts(self) -> int:
        """Logical experts per layer."""
        return int(self.load_WLE.shape[2])

    @property
    def window_tokens_W(self) -> npt.NDArray[np.float64]:
        """Tokens of each window: its pairs per layer over `top_k`."""
        return np.asarray(self.load_WLE.sum(axis=(1, 2)) / (self.num_layers * self.top_k))

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows, rounded."""
        return round(float(self.window_tokens_W.sum()))

    @cached_property
    def digest(self) -> str:
        """``"sha256:..."`` of the content."""
        header = {
            "shape": self.load_WLE.shape,
            "top_k": self.top_k,
            "model_name": self.model_name,
            "moe_layer_ids": self.moe_layer_ids,
        }
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        digest.update(self.load_WLE.astype("<i8").data)
        return f"sha256:{digest.hexdigest()}"

    def profile(self) -> RoutingProfile:
        """Return the optimizer's profile: loads alone."""
        return RoutingProfile(
            load_WLE=self.load_WLE.astype(np.float64), window_tokens_W=self.window_tokens_W, top_k=self.top_k
        )


def drop_dense_layers(
    load_WLE: npt.NDArray[Any], *, moe_layer_ids: tuple[int, ...] | None, num_decoder_layers: int | None
) -> tuple[npt.NDArray[Any], tuple[int, ...] | None]:
    """Keep the MoE layers of counts that may list every decoder layer.

    Parameters
    ----------
    load_WLE
        Counts, ``[windows, layers, experts]``, of the MoE layers or of all decoder layers.
    moe_layer_ids, num_decoder_layers
        The model's layer map where it is known. Without it, layers without any count are taken to be dense.

    Returns
    -------
    load_WLE, moe_layer_ids
        Counts of the MoE layers, and which decoder layers they are; `None` if no layer was dropped and no
        map is known.

    Raises
    ------
    InputError
        If the layers are neither the model's MoE layers nor its decoder layers, or a dense layer counts
        tokens.
    """
    num_layers = load_WLE.shape[1]
    busy_L = load_WLE.any(axis=(0, 2))
    if moe_layer_ids is None:
        if busy_L.all():
            return load_WLE, None
        return load_WLE[:, busy_L], tuple(np.nonzero(busy_L)[0].tolist())
    if num_layers == len(moe_layer_ids):
        return load_WLE, moe_layer_ids
    if num_decoder_layers is None or num_layers < num_decoder_layers:
        raise InputError(
            f"has {num_layers} layers, the model {len(moe_layer_ids)} MoE layers and "
            f"{num_decoder_layers} decoder layers; name the right model with --model"
        )
    # Beyond the decoder layers come those of multi-token prediction, which belong to no placement here.
    keep_L = np.zeros(num_layers, dtype=bool)
    keep_L[list(moe_layer_ids)] = True
    dense_L = busy_L & ~keep_L
    dense_L[num_decoder_layers:] = False
    if dense_L.any():
        raise InputError(
            f"counts tokens in layer {int(dense_L.argmax())}, which is dense in the model; name the right "
            "model with --model"
        )
    return load_WLE[:, keep_L], moe_layer_ids
