"""What the optimizer knows of traffic: load windows, tokens' expert sets, transitions, homes.

No torch, no files. Shape letters: W windows, L layers, E experts, K top-k, T sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["RoutingProfile"]

FloatArray = npt.NDArray[np.float64]


def _read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = array.view()
    view.setflags(write=False)
    return view


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingProfile:
    """Routing of one model on some traffic, cut into windows of consecutive tokens (scenarios).

    Parameters
    ----------
    load_WLE
        Token-expert pairs per window, layer and expert, exact (not sampled).
    window_tokens_W
        Tokens that each window covers, ``[windows]``.
    top_k
        Experts that each token selects in each layer.
    experts_TLK
        Expert ids of a sample of tokens, window by window in recorded order, distinct for each token and
        layer; `None` when the source has counts only (then only the load can be balanced).
    window_of_token_T
        Window of each sampled token, ascending. The number `num_windows` marks the tail: tokens after the
        last whole window, which count in per-token figures (fanout, hops) but form no window.
    home_T
        Device on which each sampled token lives before dispatch; -1 where unknown; `None` when no
        token's home is known.
    tail_tokens
        Real tokens after the last whole window.

    Raises
    ------
    InputError
        On inconsistent shapes, ids out of range, NaN, negative or empty loads, or a layer in which
        no token was routed.
    """

    load_WLE: FloatArray
    window_tokens_W: FloatArray
    top_k: int
    experts_TLK: npt.NDArray[np.unsignedinteger[Any]] | None = None
    window_of_token_T: npt.NDArray[np.int64] | None = None
    home_T: npt.NDArray[np.int64] | None = None
    tail_tokens: int = 0

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "load_WLE", _read_only(np.ascontiguousarray(self.load_WLE, dtype=np.float64)))
        set_(
            self, "window_tokens_W", _read_only(np.ascontiguousarray(self.window_tokens_W, dtype=np.float64))
        )
        self._check_loads()
        if self.experts_TLK is None:
            if self.window_of_token_T is not None or self.home_T is not None:
                raise InputError("a profile without sampled tokens cannot give their windows or homes")
            return
        set_(self, "experts_TLK", _read_only(np.ascontiguousarray(self.experts_TLK)))
        self._check_sample()

    def _check_loads(self) -> None:
        load = self.load_WLE
        if load.ndim != 3 or 0 in load.shape:
            raise InputError(f"load_WLE has shape {load.shape}, not [windows, layers, experts]")
        if self.window_tokens_W.shape != load.shape[:1]:
            raise InputError(
                f"window_tokens_W has shape {self.window_tokens_W.shape}, load_WLE {load.shape[0]} windows"
            )
        bad = ~np.isfinite(load) | (load < 0)
        if bad.any():
            window, layer, expert = (int(i[0]) for i in np.nonzero(bad))
            raise InputError(
                f"load of window {window} layer {layer} expert {expert} is {load[window, layer, expert]}; "
                "loads are finite and not negative"
            )
        if not (np.isfinite(self.window_tokens_W) & (self.window_tokens_W > 0)).all():
            raise InputError("every window covers a positive number of tokens")
        silent = np.nonzero(load.sum(axis=(0, 2)) == 0)[0]
        if silent.size:
            raise InputError(
                f"layer {int(silent[0])} routed no token in any window; drop dense layers from the trace"
            )
        if not 1 <= self.top_k <= load.shape[2]:
            raise InputError(f"top-{self.top_k} of {load.shape[2]} experts is impossible")
        if self.tail_tokens < 0:
            raise InputError(f"tail_tokens is {self.tail_tokens}; it must be 0 or more")

    def _check_sample(self) -> None:
        experts, window, home = self.experts_TLK, self.window_of_token_T, self.home_T
        assert experts is not None
        if experts.ndim != 3 or experts.shape[1:] != (self.num_layers, self.top_k) or not len(experts):
            raise InputError(
                f"experts_TLK has shape {experts.shape}, not [tokens, {self.num_layers}, {self.top_k}]"
            )
        if experts.dtype.kind != "u":
            raise InputError(f"experts_TLK holds {experts.dtype} values, not unsigned integers")
        if int(experts.max()) >= self.num_experts:
            raise InputError(f"experts_TLK names expert {int(experts.max())} of {self.num_experts}")
        if window is None or window.shape != experts.shape[:1]:
            raise InputError("window_of_token_T must name the window of every sampled token")
        if (np.diff(window) < 0).any() or window[0] < 0 or window[-1] > self.num_windows:
            raise InputError(f"window_of_token_T must ascend within 0..{self.num_windows}")
        if window[0] == self.num_windows:
            raise InputError("every sampled token lies after the last whole window; sample some inside")
        if home is not None and home.shape != window.shape:
            raise InputError(f"home_T has shape {home.shape}, not {window.shape}")
        if home is not None and home.min() < -1:
            raise InputError(f"home_T names device {int(home.min())}; -1 marks an unknown home")

    @property
    def num_windows(self) -> int:
        """Windows (scenarios)."""
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
    def num_sampled_tokens(self) -> int:
        """Tokens whose expert sets are kept; 0 for a source that has counts only."""
        return 0 if self.experts_TLK is None else int(self.experts_TLK.shape[0])

    @cached_property
    def token_weight_T(self) -> FloatArray:
        """Real tokens that each sampled token stands for, ``[tokens]``."""
        if self.window_of_token_T is None:
            return np.zeros(0)
        real = np.append(self.window_tokens_W, float(self.tail_tokens))
        sampled = np.bincount(self.window_of_token_T, minlength=self.num_windows + 1)
        weight = np.divide(real, sampled, out=np.zeros(real.size), where=sampled > 0)
        return np.asarray(weight[self.window_of_token_T])

    def select_windows(self, windows: npt.ArrayLike) -> RoutingProfile:
        """Return the profile of some windows alone, renumbered in ascending order, without the tail."""
        chosen = np.unique(np.asarray(windows, dtype=np.int64))
        if chosen.size == 0 or chosen[0] < 0 or chosen[-1] >= self.num_windows:
            raise InputError(f"windows {np.asarray(windows).tolist()} of {self.num_windows}")
        kept: dict[str, Any] = {
            "load_WLE": self.load_WLE[chosen],
            "window_tokens_W": self.window_tokens_W[chosen],
            "tail_tokens": 0,
        }
        if self.experts_TLK is not None and self.window_of_token_T is not None:
            token = np.isin(self.window_of_token_T, chosen)
            if not token.any():
                raise InputError(f"no token of windows {chosen.tolist()} was sampled; sample more tokens")
            kept["experts_TLK"] = self.experts_TLK[token]
            kept["window_of_token_T"] = np.searchsorted(chosen, self.window_of_token_T[token])
            kept["home_T"] = None if self.home_T is None else self.home_T[token]
        return replace(self, **kept)

    def split_alternate(self) -> tuple[RoutingProfile, RoutingProfile]:
        """Split into even windows (to fit on) and odd windows (to score on).

        Raises
        ------
        InputError
            If there are fewer than two windows.
        """
        return self.split_fold(1, folds=2)

    def split_fold(self, fold: int, *, folds: int) -> tuple[RoutingProfile, RoutingProfile]:
        """Split into windows to fit on and windows to score on: every `folds`-th window from `fold` on.

        Over all folds every window is held out exactly once.

        Raises
        ------
        InputError
            If there are fewer windows than folds, or no such fold.
        """
        if folds < 2 or not 0 <= fold < folds:
            raise InputError(f"fold {fold} of {folds}; folds are 2 or more, counted from 0")
        if self.num_windows < folds:
            raise InputError(
                f"{self.num_windows} window{'s' * (self.num_windows > 1)} cannot be split into {folds} parts "
                "(fitted and held-out); use a longer trace or a smaller --window"
            )
        every = np.arange(self.num_windows)
        held = every % folds == fold
        return self.select_windows(every[~held]), self.select_windows(every[held])

    def transitions(self, layer: int) -> FloatArray:
        """Count tokens by their first expert in `layer` and in the next one, ``[experts, experts]``.

        Weighted to the real number of tokens. Row: expert of `layer`; column: expert of `layer + 1`.
        """
        if self.experts_TLK is None or self.window_of_token_T is None:
            raise InputError("the trace has expert counts only; transitions need the tokens' experts")
        count = np.zeros((self.num_experts, self.num_experts))
        np.add.at(
            count, (self.experts_TLK[:, layer, 0], self.experts_TLK[:, layer + 1, 0]), self.token_weight_T
        )
        return count
