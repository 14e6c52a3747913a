r"""Fits a model of hidden token classes to how often experts are selected, together and one after the other.

In every layer a token is of one of C classes; the class decides with what probability :math:`p_{ce}` it
selects expert :math:`e`, and classes follow each other from layer to layer with joint probability
:math:`J_{cc'}`. Then

.. math:: n_{ef} = \sum_c \pi_c\, x_{ce}\, x_{cf}, \qquad m_{ef} = \sum_{cc'} J_{cc'}\, p_{ce}\, p'_{c'f}

are the probabilities that a token selects both :math:`e \ne f` in a layer, and :math:`e` before :math:`f` in
two consecutive ones. Draws are without replacement:
:math:`x_{ce} (\sum_f x_{cf} - x_{ce}) = (k - 1)\, p_{ce}`, which is exact for experts that are alike. Both
are matched to what was counted by multiplicative updates for the Kullback-Leibler divergence (Lee and Seung,
NIPS 2000), all layers in turn. Windows differ by how frequent classes are and by a factor per expert, which
reproduce their loads less what chance explains of the variance.

Shape letters: W windows, L MoE layers, E experts, C classes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.synthesize.fitted import FittedRouting
from traces.synthesize.moments import Moments

__all__ = ["fit_routing", "pair_roots"]

FloatArray = npt.NDArray[np.float64]

_TINY = 1e-12
_MOST_LIKELY = 0.995
"""No class selects an expert more surely: the remainder keeps what was never counted possible."""

_MOST_CLASSES = 64
_MOST_CELLS = 1 << 24
"""Loads by window, layer and expert that are fitted; of longer traffic every n-th window is taken."""

_WEIGHT_ROUNDS = 40
_SINKHORN_ROUNDS = 30
_FACTOR_ROUNDS = 4


def fit_routing(moments: Moments, *, num_classes: int | None = None, rounds: int = 150) -> FittedRouting:
    """Fit a router whose synthetic traces have a trace's moments.

    Parameters
    ----------
    moments
        What was counted. Without pair counts every layer has one class per window: loads and their drift are
        reproduced, what is selected together is not.
    num_classes
        Hidden classes per layer; by default as many as experts, 64 at most.
    rounds
        Rounds of updates.

    Raises
    ------
    InputError
        If a number is out of range.
    """
    header = moments.header
    known = moments.pair_LEE is not None or moments.next_LEE is not None
    classes = num_classes or min(header.num_experts, _MOST_CLASSES)
    if classes < 1 or rounds < 1:
        raise InputError(f"{classes} classes in {rounds} rounds are impossible; use at least 1 of each")
    mean_LE = moments.share_WLE.mean(axis=0)
    factors = _Factors(moments, mean_LE, classes if known else 1)
    for _ in range(rounds if known else 1):
        factors.update()
    step = -(-moments.share_WLE.size // _MOST_CELLS)
    signal_WLE = mean_LE + _kept_variation(moments)[:, None] * (moments.share_WLE[::step] - mean_LE)
    weight_WLC = _class_weights(signal_WLE, factors.select_LCE, factors.prior_LC)
    return FittedRouting(
        header=replace(header, domain_names=()),
        window_tokens=moments.window_tokens,
        traffic_windows=moments.num_windows,
        select_LCE=factors.select_LCE.astype(np.float32),
        follow_LCC=factors.follow_LCC.astype(np.float32),
        weight_WLC=weight_WLC.astype(np.float32),
        factor_WLE=_window_factors(signal_WLE, weight_WLC, factors.select_LCE).astype(np.float32),
    )


class _Factors:
    """The probabilities being fitted, and the updates that fit them."""

    def __init__(self, moments: Moments, mean_LE: FloatArray, num_classes: int) -> None:
        self._pair_LEE, self._next_LEE, self._mean_LE = moments.pair_LEE, moments.next_LEE, mean_LE
        self._top_k = moments.header.top_k
        layers = len(mean_LE)
        self.select_LCE = np.stack([self._seeded(layer, num_classes) for layer in range(layers)])
        self.prior_LC = np.full((layers, num_classes), 1.0 / num_classes)
        self.prior_LC = _class_weights(mean_LE[None], self.select_LCE, self.prior_LC)[0]
        if self._pair_LEE is not None:
            self._roots_LCE = np.stack([pair_roots(rows, self._top_k) for rows in self.select_LCE])
        self.follow_LCC = np.empty((max(layers - 1, 0), num_classes, num_classes))
        for layer in range(layers - 1):
            self.follow_LCC[layer] = self._first_follow(layer)

    def _seeded(self, layer: int, num_classes: int) -> FloatArray:
        """Begin with what tokens select beside an expert; popular and different experts come first."""
        mean_E = self._mean_LE[layer]
        profile_EE = np.tile(mean_E, (len(mean_E), 1))
        if self._pair_LEE is not None:
            profile_EE = self._pair_LEE[layer] / np.maximum(mean_E[:, None], _TINY)
            np.fill_diagonal(profile_EE, 1.0)
        elif self._next_LEE is not None:
            np.fill_diagonal(profile_EE, 1.0 + profile_EE.diagonal())
        profile_EE = 0.8 * profile_EE + 0.2 * mean_E
        chosen = _spread_rows(np.sqrt(profile_EE), mean_E, num_classes)
        return _as_probabilities(profile_EE[chosen], self._top_k)

    def _first_follow(self, layer: int) -> FloatArray:
        here_C, there_C = self.prior_LC[layer], self.prior_LC[layer + 1]
        joint_CC = np.outer(here_C, there_C)
        if self._next_LEE is not None:
            expected_EE = np.outer(self._mean_LE[layer], self._mean_LE[layer + 1])
            lift_EE = self._next_LEE[layer] / np.maximum(expected_EE, _TINY)
            lift_CC = self.select_LCE[layer] @ lift_EE @ self.select_LCE[layer + 1].T
            joint_CC = joint_CC * lift_CC
        return _scaled(joint_CC, here_C, there_C)

    def update(self) -> None:
        """Improve all probabilities once."""
        for layer in range(len(self.select_LCE)):
            self._update_selection(layer)
        for layer in range(len(self.follow_LCC)):
            if self._next_LEE is not None:
                ratio_EE = self._next_ratio(layer)
                gain_CC = self.select_LCE[layer] @ ratio_EE @ self.select_LCE[layer + 1].T / self._top_k**2
                self.follow_LCC[layer] *= gain_CC
        self._update_priors()

    def _update_selection(self, layer: int) -> None:
        select_CE, prior_C = self.select_LCE[layer], self.prior_LC[layer]
        mean_E = self._mean_LE[layer]
        ratio_E = mean_E / np.maximum(prior_C @ select_CE, _TINY)
        above_CE = prior_C[:, None] * ratio_E
        below_CE = np.broadcast_to(prior_C[:, None], select_CE.shape).copy()
        if self._pair_LEE is not None:
            roots_CE = self._roots_LCE[layer]
            found_CE = roots_CE * (roots_CE @ self._pair_ratio(layer))
            above_CE += prior_C[:, None] * found_CE / select_CE
            below_CE += prior_C[:, None] * (self._top_k - 1)
        if self._next_LEE is not None and layer < len(self.follow_LCC):
            reach_CE = self.follow_LCC[layer] @ self.select_LCE[layer + 1]
            above_CE += reach_CE @ self._next_ratio(layer).T
            below_CE += reach_CE.sum(axis=1, keepdims=True)
        if self._next_LEE is not None and layer > 0:
            reach_CE = self.follow_LCC[layer - 1].T @ self.select_LCE[layer - 1]
            above_CE += reach_CE @ self._next_ratio(layer - 1)
            below_CE += reach_CE.sum(axis=1, keepdims=True)
        select_CE = _as_probabilities(select_CE * above_CE / np.maximum(below_CE, _TINY), self._top_k)
        self.select_LCE[layer] = select_CE
        if self._pair_LEE is not None:
            self._roots_LCE[layer] = pair_roots(select_CE, self._top_k, self._roots_LCE[layer])

    def _pair_ratio(self, layer: int) -> FloatArray:
        """Return counted over modelled pairs; the diagonal, which nobody counts, is 0."""
        assert self._pair_LEE is not None
        roots_CE = self._roots_LCE[layer]
        model_EE = (roots_CE * self.prior_LC[layer][:, None]).T @ roots_CE
        ratio_EE: FloatArray = self._pair_LEE[layer] / np.maximum(model_EE, _TINY)
        np.fill_diagonal(ratio_EE, 0.0)
        return ratio_EE

    def _next_ratio(self, layer: int) -> FloatArray:
        assert self._next_LEE is not None
        model_EE = self.select_LCE[layer].T @ self.follow_LCC[layer] @ self.select_LCE[layer + 1]
        return np.asarray(self._next_LEE[layer] / np.maximum(model_EE, _TINY))

    def _update_priors(self) -> None:
        """Agree on how frequent classes are, and scale the joint probabilities to it."""
        layers = len(self.prior_LC)
        for layer in range(layers):
            select_CE, prior_C = self.select_LCE[layer], self.prior_LC[layer]
            mean_11E = self._mean_LE[layer][None, None]
            opinions = [_class_weights(mean_11E, select_CE[None], prior_C[None])[0, 0]]
            if self._pair_LEE is not None:
                ratio_EE = self._pair_ratio(layer)
                roots_CE = self._roots_LCE[layer]
                gain_C = ((roots_CE @ ratio_EE) * roots_CE).sum(axis=1)
                opinions.append(prior_C * gain_C / (self._top_k * (self._top_k - 1)))
            if layer < layers - 1 and self._next_LEE is not None:
                opinions.append(self.follow_LCC[layer].sum(axis=1))
            if layer > 0 and self._next_LEE is not None:
                opinions.append(self.follow_LCC[layer - 1].sum(axis=0))
            prior_C = np.maximum(np.mean([opinion / opinion.sum() for opinion in opinions], axis=0), 1e-6)
            self.prior_LC[layer] = prior_C / prior_C.sum()
        for layer in range(layers - 1):
            self.follow_LCC[layer] = _scaled(
                self.follow_LCC[layer], self.prior_LC[layer], self.prior_LC[layer + 1]
            )


def pair_roots(select_CE: FloatArray, top_k: int, roots_CE: FloatArray | None = None) -> FloatArray:
    """Return the x whose products off the diagonal, ``x_e x_f``, are each class's pairs; see the module.

    Parameters
    ----------
    select_CE, top_k
        Probabilities of selection, which sum to top-k, 2 at least.
    roots_CE
        Where to begin: the roots of probabilities like these.
    """
    target_CE = (top_k - 1) * select_CE
    x_CE = np.sqrt((top_k - 1) / top_k) * select_CE if roots_CE is None else roots_CE
    for _ in range(100 if roots_CE is None else 6):
        others_CE = np.maximum(x_CE.sum(axis=1, keepdims=True) - x_CE, _TINY)
        # The square root damps: undamped, two classes of values take turns for ever.
        x_CE = np.sqrt(x_CE * target_CE / others_CE)
    return x_CE


def _spread_rows(row_EF: FloatArray, weight_E: FloatArray, count: int) -> list[int]:
    """Choose rows far from each other, heavy ones first (farthest-point rule on weighted distances)."""
    chosen = [int(weight_E.argmax())]
    distance_E = np.full(len(row_EF), np.inf)
    while len(chosen) < min(count, len(row_EF)):
        distance_E = np.minimum(distance_E, ((row_EF - row_EF[chosen[-1]]) ** 2).sum(axis=1))
        score_E = distance_E * weight_E
        score_E[chosen] = -1.0
        chosen.append(int(score_E.argmax()))
    return chosen + [chosen[at % len(chosen)] for at in range(count - len(chosen))]


def _as_probabilities(weight_CE: FloatArray, top_k: int) -> FloatArray:
    """Scale rows to sum to `top_k` with no entry above 1."""
    select_CE = np.maximum(weight_CE, _TINY)
    most = 1.0 if top_k >= select_CE.shape[1] else max(_MOST_LIKELY, top_k / select_CE.shape[1])
    for _ in range(30):
        select_CE = np.minimum(select_CE * (top_k / select_CE.sum(axis=1, keepdims=True)), most)
        if np.abs(select_CE.sum(axis=1) - top_k).max() < 1e-9 * top_k:
            break
    return select_CE


def _scaled(joint_CC: FloatArray, row_C: FloatArray, column_C: FloatArray) -> FloatArray:
    """Scale a joint probability to given margins (Sinkhorn)."""
    joint_CC = np.maximum(joint_CC, _TINY)
    for _ in range(_SINKHORN_ROUNDS):
        joint_CC = joint_CC * (row_C / joint_CC.sum(axis=1))[:, None]
        joint_CC = joint_CC * (column_C / joint_CC.sum(axis=0))
    return joint_CC


def _class_weights(share_WLE: FloatArray, select_LCE: FloatArray, prior_LC: FloatArray) -> FloatArray:
    """Return how frequent classes are in each window, ``[windows, layers, classes]``, from its loads."""
    weight_WLC = np.tile(prior_LC, (len(share_WLE), 1, 1))
    top_k_LC = select_LCE.sum(axis=2)
    for _ in range(_WEIGHT_ROUNDS):
        # As products of matrices, layer by layer; the sum over all letters at once would not fit.
        model_LWE = weight_WLC.transpose(1, 0, 2) @ select_LCE
        ratio_LWE = share_WLE.transpose(1, 0, 2) / np.maximum(model_LWE, _TINY)
        weight_WLC *= (ratio_LWE @ select_LCE.transpose(0, 2, 1)).transpose(1, 0, 2) / top_k_LC
        weight_WLC /= weight_WLC.sum(axis=2, keepdims=True)
    return weight_WLC


def _kept_variation(moments: Moments) -> FloatArray:
    """Return per layer what part of the windows' deviation is none of chance, ``[layers]``, 0 to 1."""
    share_WLE = moments.share_WLE
    if len(share_WLE) < 2:
        return np.ones(share_WLE.shape[1])
    seen_L = share_WLE.var(axis=0, ddof=1).sum(axis=1)
    mean_LE = share_WLE.mean(axis=0)
    chance_L = (mean_LE * np.maximum(1 - mean_LE, 0)).sum(axis=1) / moments.window_tokens
    kept_L: FloatArray = np.sqrt(np.clip(1 - chance_L / np.maximum(seen_L, _TINY), 0.0, 1.0))
    return kept_L


def _window_factors(signal_WLE: FloatArray, weight_WLC: FloatArray, select_LCE: FloatArray) -> FloatArray:
    """Return by what factor each window's weights must change for draws to have its loads."""
    base_LCE = -np.log1p(-np.minimum(select_LCE, 1 - 1e-6))
    top_k, experts = float(select_LCE[0, 0].sum()), select_LCE.shape[2]
    # Experts that a window hardly selects are not chased: a hundredth of an even share is added to all.
    few = 0.01 * top_k / experts
    factor_WLE = np.ones_like(signal_WLE)
    for signal_LE, weight_LC, factor_LE in zip(signal_WLE, weight_WLC, factor_WLE, strict=True):
        time_LC1 = np.ones((*weight_LC.shape, 1))
        for _ in range(_FACTOR_ROUNDS):
            rate_LCE = base_LCE * factor_LE[:, None, :]
            # A race ends when top-k clocks have rung on average; Newton's steps find that time.
            for _ in range(3):
                quiet_LCE = np.exp(-rate_LCE * time_LC1)
                missing_LC1 = top_k - (1 - quiet_LCE).sum(axis=2, keepdims=True)
                slope_LC1 = (rate_LCE * quiet_LCE).sum(axis=2, keepdims=True)
                time_LC1 *= np.exp(np.clip(missing_LC1 / np.maximum(slope_LC1 * time_LC1, _TINY), -1, 1))
            model_LE = (weight_LC[:, None, :] @ (1 - np.exp(-rate_LCE * time_LC1)))[:, 0]
            factor_LE *= np.clip((signal_LE + few) / (model_LE + few), 0.2, 5.0)
        factor_LE /= np.exp(np.log(factor_LE).mean(axis=1, keepdims=True))
    return factor_WLE
