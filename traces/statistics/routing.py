"""What a pass over a trace leaves: counts that are exact, and a sample of tokens for all that is not counted.

Shape letters: W windows kept, L MoE layers, E experts, K top-k, T sampled tokens, S strata, B stretches of
time, R ranks, C domains.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from placement.profile import RoutingProfile
from traces.source import BLOCK_TOKENS, TraceHeader
from traces.statistics.sample import TokenSample
from traces.statistics.segment import Segment
from traces.trace import Trace

__all__ = ["RoutingStatistics", "total_variation"]

CountArray = npt.NDArray[np.unsignedinteger[Any]]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

_HASHED_AT_ONCE = 1 << 17
_NORMAL_95 = 1.959964


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingStatistics:
    """Routing of some traffic, counted in one pass: small, exact where it says so, and mergeable.

    Loads in total, per stretch of time, domain and rank are exact; so are the loads of the windows kept and
    the pair counts, where these are kept. What is not kept is estimated from the sample (`errors` says how
    well). Count arrays have the smallest unsigned type that fits and are read-only.

    Parameters
    ----------
    header
        Shape, model and domain names of the trace.
    window_tokens
        Consecutive tokens per window.
    segments
        What was counted, in time order.
    window_stride
        Loads are kept of every window whose number in its trace is a multiple of this power of two. So many
        windows form one stratum of the sample.
    load_LE
        Token-expert pairs of all tokens, ``[layers, experts]``.
    load_WLE
        Token-expert pairs of the windows kept, in time order.
    time_windows, time_load_BLE
        Loads of stretches of so many windows (a power of two), in time order; tails are in none.
    sample
        Stratified sample of tokens; `None` where it was left out.
    transitions_LEE
        Tokens that select expert e (row) in a layer and f (column) in the next, all pairs,
        ``[layers - 1, experts, experts]``; `None` where not counted.
    first_transitions_LEE
        The same for first choices alone, as `RoutingProfile.transitions` counts them.
    coactivation_LEE
        Tokens that select both experts of a pair in a layer, ``[layers, experts, experts]``, symmetric with
        an empty diagonal; `None` where not counted.
    rank_R, rank_tokens_R, home_load_RLE
        Ranks of origin, ascending, the tokens of each, and their loads; `None` where unknown or not counted.
    most_ranks
        Loads by rank are dropped where more ranks turn up.
    domain_tokens_C, domain_load_CLE
        Tokens and loads of each domain of `header.domain_names`; `None` where unknown or not counted.

    Raises
    ------
    InputError
        If shapes disagree with each other.
    """

    header: TraceHeader
    window_tokens: int
    segments: tuple[Segment, ...]
    window_stride: int
    load_LE: CountArray
    load_WLE: CountArray
    time_windows: int
    time_load_BLE: CountArray
    sample: TokenSample | None = None
    transitions_LEE: CountArray | None = None
    first_transitions_LEE: CountArray | None = None
    coactivation_LEE: CountArray | None = None
    rank_R: IntArray | None = None
    rank_tokens_R: IntArray | None = None
    home_load_RLE: CountArray | None = None
    most_ranks: int = 1 << 16
    domain_tokens_C: IntArray | None = None
    domain_load_CLE: CountArray | None = None

    def __post_init__(self) -> None:
        for name, shape in self._shapes().items():
            array = getattr(self, name)
            if array is None:
                continue
            if array.shape != shape:
                raise InputError(f"{name} has shape {array.shape}, not {shape}")
            view = array.view()
            view.setflags(write=False)
            object.__setattr__(self, name, view)
        if self.sample is not None:
            self.sample.check(self.header, num_strata=self.num_strata)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        layers, experts = self.header.num_layers, self.header.num_experts
        ranks = 0 if self.rank_R is None else len(self.rank_R)
        domains = len(self.header.domain_names)
        stretches = sum(segment.num_groups(self.time_windows) for segment in self.segments)
        kept = sum(segment.num_multiples(self.window_stride) for segment in self.segments)
        return {
            "load_LE": (layers, experts),
            "load_WLE": (kept, layers, experts),
            "time_load_BLE": (stretches, layers, experts),
            "transitions_LEE": (layers - 1, experts, experts),
            "first_transitions_LEE": (layers - 1, experts, experts),
            "coactivation_LEE": (layers, experts, experts),
            "rank_R": (ranks,),
            "rank_tokens_R": (ranks,),
            "home_load_RLE": (ranks, layers, experts),
            "domain_tokens_C": (domains,),
            "domain_load_CLE": (domains, layers, experts),
        }

    # -- what was counted ------------------------------------------------------------------------------------

    @property
    def num_windows(self) -> int:
        """Whole windows counted, kept or not."""
        return sum(segment.num_windows for segment in self.segments)

    @property
    def tail_tokens(self) -> int:
        """Tokens that fill no window."""
        return sum(segment.tail_tokens for segment in self.segments)

    @property
    def num_tokens(self) -> int:
        """Tokens counted."""
        return self.num_windows * self.window_tokens + self.tail_tokens

    @cached_property
    def window_index_W(self) -> IntArray:
        """Number of each kept window in its trace."""
        return np.concatenate([segment.multiples(self.window_stride) for segment in self.segments])

    @property
    def window_share(self) -> float:
        """Share of the windows whose loads are kept; 1 if all are."""
        return len(self.load_WLE) / max(1, self.num_windows)

    @property
    def num_strata(self) -> int:
        """Strata of the sample: groups of `window_stride` windows."""
        return sum(segment.num_groups(self.window_stride) for segment in self.segments)

    @cached_property
    def stratum_tokens_S(self) -> IntArray:
        """Real tokens of each stratum; the last one holds the tokens that fill no window."""
        windows = [segment.group_windows(self.window_stride) for segment in self.segments]
        return np.append(np.concatenate(windows) * self.window_tokens, self.tail_tokens)

    @cached_property
    def time_tokens_B(self) -> IntArray:
        """Tokens of each stretch of time."""
        windows = [segment.group_windows(self.time_windows) for segment in self.segments]
        return np.concatenate(windows) * self.window_tokens

    # -- pairs: exact where counted, else from the sample ----------------------------------------------------

    def transitions(self, layer: int) -> FloatArray:
        """Tokens by any expert selected in `layer` (row) and any selected in the next (column)."""
        if self.transitions_LEE is not None:
            return _floats(self.transitions_LEE[layer])
        return self._estimated("transitions").pairs(
            layer, layer + 1, weight_T=self.sample_weight_T, num_experts=self.header.num_experts
        )

    def first_transitions(self, layer: int) -> FloatArray:
        """Tokens by the first expert in `layer` (row) and in the next one (column)."""
        if self.first_transitions_LEE is not None:
            return _floats(self.first_transitions_LEE[layer])
        return self._estimated("first transitions").pairs(
            layer,
            layer + 1,
            weight_T=self.sample_weight_T,
            num_experts=self.header.num_experts,
            choices=1,
        )

    def coactivation(self, layer: int) -> FloatArray:
        """Tokens that select both experts of a pair in `layer`, symmetric, the diagonal empty."""
        if self.coactivation_LEE is not None:
            return _floats(self.coactivation_LEE[layer])
        pairs_EE = self._estimated("co-activation").pairs(
            layer, layer, weight_T=self.sample_weight_T, num_experts=self.header.num_experts
        )
        np.fill_diagonal(pairs_EE, 0)
        return pairs_EE

    def _estimated(self, what: str) -> TokenSample:
        if self.sample is None:
            raise InputError(
                f"these statistics have neither {what} nor sampled tokens; collect them again from the trace"
            )
        return self.sample

    @cached_property
    def sample_weight_T(self) -> FloatArray:
        """Real tokens that each sampled token stands for; together `num_tokens`."""
        if self.sample is None:
            return np.zeros(0)
        sampled_S = np.bincount(self.sample.stratum_T, minlength=self.num_strata + 1)
        real_S = np.where(sampled_S > 0, self.stratum_tokens_S, 0)
        weight_S = real_S / np.maximum(sampled_S, 1) * (self.num_tokens / max(1, int(real_S.sum())))
        return np.asarray(weight_S[self.sample.stratum_T])

    @property
    def errors(self) -> Mapping[str, float]:
        r"""95 % bounds on what is estimated from the sample, as shares of all tokens; exact parts are absent.

        Each count of a pair is within ``error * num_tokens`` of the truth with probability 0.95. The bound is
        that of simple sampling, :math:`1.96 \sqrt{p (1 - p) (1 - n / N) / n}`, at the largest share `p`
        that any pair can have, which is that of the busiest expert; strata only make it smaller.
        """
        if self.sample is None:
            return MappingProxyType({})
        busiest = min(0.5, float(self.load_LE.max()) / max(1, self.num_tokens))
        bound = self.error(busiest)
        names = ("transitions", "first_transitions", "coactivation")
        lacking = (name for name in names if getattr(self, f"{name}_LEE") is None)
        return MappingProxyType(dict.fromkeys(lacking, bound))

    def error(self, share: float) -> float:
        """95 % bound on the error of an estimated share of tokens `share`; infinite without a sample."""
        if self.sample is None or not self.sample.num_tokens:
            return math.inf
        sampled, real = self.sample.num_tokens, self.num_tokens
        left_out = max(0.0, 1 - sampled / real)
        return _NORMAL_95 * math.sqrt(share * (1 - share) * left_out / sampled)

    # -- change over time ------------------------------------------------------------------------------------

    @cached_property
    def drift_BL(self) -> FloatArray:
        """Total variation distance of each stretch's expert shares from those of all traffic, per layer."""
        total = self.time_load_BLE.sum(axis=0, dtype=np.int64)
        return total_variation(self.time_load_BLE, total[np.newaxis])

    @cached_property
    def drift_L(self) -> FloatArray:
        """Total variation distance between the first and the last half of the time, per layer.

        Halves are cut between stretches of time; with an odd number of them the middle one is in neither.
        """
        half = len(self.time_load_BLE) // 2
        first_LE = self.time_load_BLE[:half].sum(axis=0, dtype=np.int64)
        last_LE = self.time_load_BLE[len(self.time_load_BLE) - half :].sum(axis=0, dtype=np.int64)
        return total_variation(first_LE, last_LE)

    # -- as input of the optimizer ---------------------------------------------------------------------------

    def profile(self, num_devices: int | None = None) -> RoutingProfile:
        """Return the optimizer's profile: the windows kept, exact, and the sampled tokens.

        Parameters
        ----------
        num_devices
            As for `build_profile`.

        Raises
        ------
        InputError
            If no window was kept.
        """
        from traces.statistics.profiles import profile_of

        return profile_of(self, num_devices)

    def blocks(
        self, start: int = 0, stop: int | None = None, *, max_tokens: int = BLOCK_TOKENS
    ) -> Iterator[Trace]:
        """Refuse: of most tokens nothing but counts is left.

        With this method statistics are a `TraceSource`, so that they can be named wherever a trace can.

        Raises
        ------
        InputError
            Always.
        """
        raise InputError("holds statistics of a trace, not the experts of every token; name the trace itself")

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all arrays that there are by name, those of the sample as ``sample.NAME``."""
        named = {name: getattr(self, name) for name in self._shapes()}
        if self.sample is not None:
            named |= {f"sample.{name}": array for name, array in self.sample.arrays().items()}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def size_bytes(self) -> int:
        """Memory that the arrays take, in bytes."""
        return sum(int(array.nbytes) for array in self.arrays().values())

    def plain(self) -> dict[str, Any]:
        """Return all but the arrays, as plain data."""
        return {
            "header": {field.name: getattr(self.header, field.name) for field in fields(self.header)},
            "window_tokens": self.window_tokens,
            "window_stride": self.window_stride,
            "time_windows": self.time_windows,
            "most_ranks": self.most_ranks,
            "segments": [asdict(segment) for segment in self.segments],
            "most_per_stratum": None if self.sample is None else self.sample.most_per_stratum,
        }

    @cached_property
    def digest(self) -> str:
        """``"sha256:..."`` of the content."""
        digest = hashlib.sha256(json.dumps(self.plain(), sort_keys=True).encode())
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.shape}".encode())
            flat, wide = array.reshape(-1), "<f8" if array.dtype.kind == "f" else "<i8"
            # Piece by piece: counts lie in fewer bytes than they are hashed in.
            for start in range(0, flat.size, _HASHED_AT_ONCE):
                digest.update(flat[start : start + _HASHED_AT_ONCE].astype(wide).data)
        return f"sha256:{digest.hexdigest()}"


def _floats(count: CountArray) -> FloatArray:
    return count.astype(np.float64)


def total_variation(p_LE: npt.NDArray[Any], q_LE: npt.NDArray[Any]) -> FloatArray:
    """Half the L1 distance of the shares over the last axis; 0 where one of both counts nothing."""
    sums = [count.sum(axis=-1, keepdims=True, dtype=np.float64) for count in (p_LE, q_LE)]
    p, q = (count / np.maximum(total, 1) for count, total in zip((p_LE, q_LE), sums, strict=True))
    known = (sums[0] > 0) & (sums[1] > 0)
    distance: FloatArray = 0.5 * np.where(known, np.abs(p - q), 0).sum(axis=-1)
    return distance
