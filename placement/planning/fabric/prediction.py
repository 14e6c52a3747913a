"""Loads of the next layer from those of this one, so that circuits can be made before the gate has run.

MixNet (arXiv 2501.03905) fits a matrix P over past windows: ``min_P sum_i w_i ||Y_i - P X_i||^2`` with
columns that are probability distributions; the loads of layer l+1 are P times those of layer l. The program
is convex; it is solved by accelerated projected gradient, and how far from the best the answer can be is
known from its gradient.

Shape letters: W windows, E experts of this layer, F experts of the next, H held-out windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.errors import InputError

__all__ = ["Prediction", "fit_transition", "score_predictions", "simplex_columns"]

FloatArray = npt.NDArray[np.float64]

TOLERANCE = 1e-2
"""Distance from the best fit at which to stop, as a share of the squared error that is left."""

MAX_STEPS, STEPS_BETWEEN_CHECKS = 600, 10

PREDICTORS = ("transition", "last window", "mean")


def simplex_columns(values_FE: FloatArray) -> FloatArray:
    """Return the nearest matrix whose columns are probability distributions, by sorting."""
    ordered = -np.sort(-values_FE, axis=0)
    above = np.cumsum(ordered, axis=0) - 1.0
    count_F = np.arange(1, len(values_FE) + 1)[:, None]
    used_E = (ordered - above / count_F > 0).sum(axis=0)
    shift_E = above[used_E - 1, np.arange(values_FE.shape[1])] / used_E
    return np.asarray(np.maximum(values_FE - shift_E, 0.0))


def fit_transition(
    now_WE: FloatArray, next_WF: FloatArray, *, weight_W: FloatArray | None = None
) -> FloatArray:
    """Return the column-stochastic matrix that best turns loads of a layer into those of the next.

    Parameters
    ----------
    now_WE, next_WF
        Loads of both layers in past windows, ``[windows, experts]``; each window is scaled to sum 1.
    weight_W
        Weight of each window; all alike by default.

    Returns
    -------
    ndarray
        ``[experts of the next layer, experts of this one]``.

    Raises
    ------
    InputError
        If shapes do not fit or a window is empty.
    """
    if now_WE.ndim != 2 or next_WF.ndim != 2 or len(now_WE) != len(next_WF) or not len(now_WE):
        raise InputError(f"loads have shapes {now_WE.shape} and {next_WF.shape}")
    weight_W = np.ones(len(now_WE)) if weight_W is None else weight_W
    root_W1 = np.sqrt(weight_W)[:, None]
    now_WE, next_WF = root_W1 * _shares(now_WE), root_W1 * _shares(next_WF)
    gram_EE, cross_FE = now_WE.T @ now_WE, next_WF.T @ now_WE
    constant = float((next_WF**2).sum())
    step = 1.0 / max(float(np.linalg.eigvalsh(gram_EE)[-1]), np.finfo(float).tiny)
    fit = ahead = np.full(cross_FE.shape, 1.0 / len(cross_FE))
    momentum = 1.0
    for number in range(MAX_STEPS):
        if number % STEPS_BETWEEN_CHECKS == 0 and _is_close(fit, gram_EE, cross_FE, constant):
            break
        new = simplex_columns(ahead - step * (ahead @ gram_EE - cross_FE))
        faster = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / faster * (new - fit)
        fit, momentum = new, float(faster)
    return fit


def _is_close(fit_FE: FloatArray, gram_EE: FloatArray, cross_FE: FloatArray, constant: float) -> bool:
    """Return whether no fit is better by more than the tolerance."""
    product_FE = fit_FE @ gram_EE
    slope_FE = product_FE - cross_FE
    # The best column puts all weight where the slope is least: a bound on what is left to gain.
    left = 2 * float((slope_FE * fit_FE).sum() - slope_FE.min(axis=0).sum())
    value = float((product_FE * fit_FE).sum() - 2 * (cross_FE * fit_FE).sum()) + constant
    return left <= TOLERANCE * max(value, float(np.finfo(float).eps) * constant)


def _shares(load: FloatArray) -> FloatArray:
    total = load.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        raise InputError("a window without load predicts nothing")
    return np.asarray(load / total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """How well the next layer's loads are predicted, on windows that no fit has seen.

    Parameters
    ----------
    error
        Share of the load that is put on the wrong expert, mean over held-out windows and layers, for each
        way to predict: ``transition`` (the matrix), ``last window`` and ``mean`` (of past windows of the next
        layer itself).
    num_windows
        Held-out windows.
    """

    error: dict[str, float]
    num_windows: int

    @property
    def best(self) -> str:
        """The way with the least error."""
        return min(self.error, key=lambda name: self.error[name])


def score_predictions(load_WLE: FloatArray, *, history: int = 16, max_windows: int = 4) -> Prediction:
    """Predict each layer's loads from the layer before it in later windows, from windows before them.

    Parameters
    ----------
    load_WLE
        Loads, ``[windows, layers, experts]``, windows in order of time.
    history
        Past windows to fit on, at most.
    max_windows
        Held-out windows, the last ones, at most; and at most half of all.

    Raises
    ------
    InputError
        If there are fewer than two windows or layers.
    """
    num_windows, num_layers = load_WLE.shape[:2]
    if num_windows < 2 or num_layers < 2:
        raise InputError(f"{num_windows} windows of {num_layers} layers; predicting needs 2 of each")
    held_out = range(num_windows - min(max_windows, num_windows // 2), num_windows)
    wrong: dict[str, list[float]] = {name: [] for name in PREDICTORS}
    for window in held_out:
        past = slice(max(0, window - history), window)
        for layer in range(num_layers - 1):
            now_WE, next_WF = load_WLE[past, layer], load_WLE[past, layer + 1]
            actual_F = _shares(load_WLE[window, layer + 1])
            transition_FE = fit_transition(now_WE, next_WF)
            guesses = (
                transition_FE @ _shares(load_WLE[window, layer]),
                _shares(next_WF[-1]),
                _shares(next_WF).mean(axis=0),
            )
            for name, guess_F in zip(PREDICTORS, guesses, strict=True):
                wrong[name].append(float(np.abs(guess_F - actual_F).sum()) / 2)
    return Prediction(
        error={name: float(np.mean(values)) for name, values in wrong.items()}, num_windows=len(held_out)
    )
