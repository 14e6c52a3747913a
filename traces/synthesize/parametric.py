"""Makes routing traces with the traits of real ones: skew, domains in bursts, co-activation, drift.

Shape letters: T tokens, L MoE layers, E experts, K top-k, G groups of experts, C domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.trace import MAX_EXPERTS, ExpertArray, IntArray, Trace

__all__ = ["Knobs", "Router", "bursts", "synthesize"]

FloatArray = npt.NDArray[np.float32]

_BURST_SEQUENCES = 4
_DRAWN_AT_ONCE = 1 << 22


def synthesize(
    *,
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_domains: int = 4,
    skew: float = 0.5,
    domain_strength: float = 0.8,
    coactivation: float = 2.0,
    layer_affinity: float = 0.6,
    drift: float = 0.4,
    sequence_tokens: int = 512,
    num_groups: int = 1,
    top_groups: int = 1,
    popularity_LE: npt.ArrayLike | None = None,
    seed: int,
) -> Trace:
    r"""Draw a trace of a router that does not exist but behaves like one.

    A token of domain :math:`c` at time :math:`t \in [0, 1]` selects, in layer :math:`l`, `top_k` different
    experts, one after the other with probability proportional to :math:`\exp a_e` (the Gumbel top-k trick:
    Kool et al., arXiv 1903.06059), where

    .. math:: a_e = -s \log r_e + d\,u_{ce} + f\,(2t - 1)\,v_e + g\,z_{G(e)}

    with skew :math:`s` and popularity rank :math:`r_e` (Zipf), domain strength :math:`d`, drift :math:`f`,
    co-activation :math:`g`, standard normal :math:`u, v` fixed per layer, and :math:`z` drawn per token and
    group of `top_k` experts. From layer to layer :math:`z` keeps the correlation `layer_affinity`, so a
    token's choices in one layer predict those in the next.

    With several groups, routing is group-limited as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): the
    experts form equal groups of consecutive ids, and a token selects among the experts of the `top_groups`
    groups whose two highest perturbed scores have the largest sum.

    Parameters
    ----------
    num_tokens, num_layers, num_experts, top_k
        Size of the trace.
    num_domains
        Kinds of traffic; their sequences come in bursts of four on average.
    skew
        Exponent of the experts' popularity; 0 makes all equally popular.
    domain_strength
        How much a domain changes the popularity; 0 makes domains alike.
    coactivation
        How much experts of a group are selected together; 0 makes choices independent.
    layer_affinity
        Correlation of a token's preferred groups in consecutive layers, 0 to 1.
    drift
        How much the popularity changes from the first to the last token.
    sequence_tokens
        Tokens per sequence; the last one may be shorter.
    num_groups, top_groups
        Groups of group-limited routing, and how many of them a token's experts may lie in.
    popularity_LE
        Relative popularity of the experts, ``[layers, experts]``, in place of the Zipf law (`skew` is then
        unused): :math:`\log p_e` in place of :math:`-s \log r_e`. An expert of popularity 0 is given a
        millionth of the mean. Layers may be fewer than `num_layers`; they are then used in turn.
    seed
        Seed; the same arguments give the same trace.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    knobs = Knobs(
        num_tokens=num_tokens,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        num_domains=num_domains,
        skew=skew,
        domain_strength=domain_strength,
        coactivation=coactivation,
        layer_affinity=layer_affinity,
        drift=drift,
        sequence_tokens=sequence_tokens,
        num_groups=num_groups,
        top_groups=top_groups,
        popularity_LE=popularity_LE,
    )
    rng = np.random.default_rng(seed)
    sequence_T, position_T = np.divmod(np.arange(num_tokens), sequence_tokens)
    domain_T = bursts(rng, int(sequence_T[-1]) + 1, num_domains)[sequence_T]
    router = Router(rng, knobs)
    experts_TLK = np.empty(
        (num_tokens, num_layers, top_k), dtype=np.uint8 if num_experts <= 256 else np.uint16
    )
    for tokens in _blocks(num_tokens, num_experts):
        time_T = (np.arange(tokens.start, tokens.stop) / max(num_tokens - 1, 1)).astype(np.float32)
        for layer, choice_TK in enumerate(router.route(rng, domain_T[tokens], time_T)):
            experts_TLK[tokens, layer] = choice_TK
    return Trace(
        experts_TLK=experts_TLK,
        num_experts=num_experts,
        sequence_T=sequence_T,
        position_T=position_T,
        domain_T=domain_T,
        domain_names=knobs.domain_names,
        model_name="synthetic",
        moe_layer_ids=tuple(range(num_layers)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Knobs:
    """What `synthesize` takes beside the seed, checked.

    Raises
    ------
    InputError
        If a number is out of range.
    """

    num_tokens: int
    num_layers: int
    num_experts: int
    top_k: int
    num_domains: int = 4
    skew: float = 0.5
    domain_strength: float = 0.8
    coactivation: float = 2.0
    layer_affinity: float = 0.6
    drift: float = 0.4
    sequence_tokens: int = 512
    num_groups: int = 1
    top_groups: int = 1
    popularity_LE: npt.ArrayLike | None = None

    def __post_init__(self) -> None:
        sizes = ("num_tokens", "num_layers", "num_experts", "top_k", "num_domains", "sequence_tokens")
        strengths = ("skew", "domain_strength", "coactivation", "drift")
        _check(
            {name: getattr(self, name) for name in sizes},
            {name: getattr(self, name) for name in strengths},
            self.layer_affinity,
        )
        _check_gate(self.num_groups, self.top_groups, num_experts=self.num_experts, top_k=self.top_k)
        if self.popularity_LE is not None:
            object.__setattr__(self, "popularity_LE", _popularity(self.popularity_LE, self.num_experts))

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Names of the kinds of traffic."""
        return tuple(f"domain{domain}" for domain in range(self.num_domains))


def _check(sizes: dict[str, int], strengths: dict[str, float], layer_affinity: float) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}; use at least 1")
    if sizes["num_experts"] > MAX_EXPERTS:
        raise InputError(f"num_experts is {sizes['num_experts']}; at most {MAX_EXPERTS} are possible")
    if sizes["top_k"] > sizes["num_experts"]:
        raise InputError(f"top_k is {sizes['top_k']} of {sizes['num_experts']} experts; choose at most all")
    for name, strength in strengths.items():
        if not (math.isfinite(strength) and strength >= 0):
            raise InputError(f"{name} is {strength}; use a finite number that is not negative")
    if not 0 <= layer_affinity <= 1:
        raise InputError(f"layer_affinity is {layer_affinity}; use a number from 0 to 1")


def _check_gate(num_groups: int, top_groups: int, *, num_experts: int, top_k: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        raise InputError(f"{num_experts} experts do not form {num_groups} equal groups")
    if not 1 <= top_groups <= num_groups:
        raise InputError(f"top_groups is {top_groups} of {num_groups} groups; use 1 to {num_groups}")
    if top_k > top_groups * (num_experts // num_groups):
        raise InputError(
            f"{top_groups} of {num_groups} groups hold {top_groups * (num_experts // num_groups)} experts, "
            f"fewer than top_k {top_k}"
        )


def _popularity(popularity_LE: npt.ArrayLike, num_experts: int) -> npt.NDArray[np.float64]:
    """Return popularity with a mean of 1 in every layer and no zeros."""
    popularity = np.asarray(popularity_LE, dtype=np.float64)
    if popularity.ndim != 2 or popularity.shape[1] != num_experts or not len(popularity):
        raise InputError(f"popularity has shape {popularity.shape}, not [layers, {num_experts}]")
    if not (np.isfinite(popularity).all() and (popularity >= 0).all() and popularity.any(axis=1).all()):
        raise InputError("popularity must be finite, not negative, and above 0 somewhere in every layer")
    return np.asarray(np.maximum(popularity / popularity.mean(axis=1, keepdims=True), 1e-6))


def bursts(rng: np.random.Generator, num_sequences: int, num_domains: int) -> IntArray:
    """Domain of each sequence: a new one is drawn once every few sequences."""
    turn = rng.random(num_sequences) < 1 / _BURST_SEQUENCES
    turn[0] = True
    drawn = rng.integers(num_domains, size=num_sequences)
    return drawn[np.maximum.accumulate(np.where(turn, np.arange(num_sequences), 0))]


def _blocks(num_tokens: int, num_experts: int) -> Iterator[slice]:
    step = max(1, _DRAWN_AT_ONCE // num_experts)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


class Router:
    """The preferences that all tokens share: popularity, domains, drift and groups, per layer.

    Parameters
    ----------
    rng
        Draws the preferences.
    knobs
        How strong they are.
    """

    def __init__(self, rng: np.random.Generator, knobs: Knobs) -> None:
        num_layers, num_experts = knobs.num_layers, knobs.num_experts
        every = np.broadcast_to(np.arange(num_experts), (num_layers, num_experts))
        rank_LE = rng.permuted(every, axis=1) + 1
        taste_LCE = rng.standard_normal((num_layers, knobs.num_domains, num_experts))
        self._knobs = knobs
        self._num_groups = -(-num_experts // knobs.top_k)
        prior_LE = -knobs.skew * np.log(rank_LE)
        if knobs.popularity_LE is not None:
            popularity_LE = np.asarray(knobs.popularity_LE)
            prior_LE = np.log(popularity_LE)[np.arange(num_layers) % len(popularity_LE)]
        self._base_LCE = (knobs.domain_strength * taste_LCE + prior_LE[:, None]).astype(np.float32)
        self._drift_LE = (knobs.drift * rng.standard_normal((num_layers, num_experts))).astype(np.float32)
        self._group_LE = rng.permuted(every, axis=1) % self._num_groups

    def route(
        self, rng: np.random.Generator, domain_T: IntArray, time_T: FloatArray
    ) -> Iterator[ExpertArray]:
        """Yield the experts of these tokens layer by layer, ``[tokens, k]``, first choice first.

        Parameters
        ----------
        rng
            Draws the choices.
        domain_T, time_T
            Domain of each token, and when it comes, 0 to 1.
        """
        knobs = self._knobs
        num_tokens = len(domain_T)
        fresh = np.float32(math.sqrt(1 - knobs.layer_affinity**2))
        swing_T1 = (2 * time_T - 1)[:, None]
        gate = (knobs.num_groups, knobs.top_groups)
        taste_TG = rng.standard_normal((num_tokens, self._num_groups), dtype=np.float32)
        for base_CE, drift_E, group_E in zip(self._base_LCE, self._drift_LE, self._group_LE, strict=True):
            affinity_TE = base_CE[domain_T] + swing_T1 * drift_E
            affinity_TE += np.float32(knobs.coactivation) * taste_TG[:, group_E]
            yield _select(rng, affinity_TE, knobs.top_k, gate=gate)
            news_TG = rng.standard_normal(taste_TG.shape, dtype=np.float32)
            taste_TG = np.float32(knobs.layer_affinity) * taste_TG + fresh * news_TG


def _select(
    rng: np.random.Generator, affinity_TE: FloatArray, top_k: int, *, gate: tuple[int, int]
) -> ExpertArray:
    """Sample without replacement, probability proportional to exp(affinity), by adding Gumbel noise."""
    waiting_TE = rng.standard_exponential(affinity_TE.shape, dtype=np.float32)
    # A draw may round to zero, whose logarithm is no number.
    score = affinity_TE - np.log(np.maximum(waiting_TE, np.finfo(np.float32).tiny))
    if gate[1] < gate[0]:
        score = _limit_groups(score, *gate)
    chosen = np.argpartition(score, -top_k, axis=1)[:, -top_k:]
    order = np.argsort(-np.take_along_axis(score, chosen, axis=1), axis=1)
    return np.take_along_axis(chosen, order, axis=1).astype(np.uint16)


def _limit_groups(score_TE: FloatArray, num_groups: int, top_groups: int) -> FloatArray:
    """Rule out the experts of all but the groups with the largest sum of their two highest scores."""
    score_TGM = score_TE.reshape(len(score_TE), num_groups, -1)
    size = score_TGM.shape[2]
    best_TG = np.partition(score_TGM, size - min(2, size), axis=2)[:, :, -2:].sum(axis=2)
    ruled_out = np.argpartition(best_TG, -top_groups, axis=1)[:, :-top_groups]
    limited = score_TGM.copy()
    limited[np.arange(len(score_TE))[:, None], ruled_out] = -np.inf
    return limited.reshape(score_TE.shape)
