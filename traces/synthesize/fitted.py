"""A router fitted to real traffic (`traces.synthesize.fit`), and synthetic traces of it.

What it reveals of the traffic: how frequent each expert is in each window, and, smoothed, how often two
experts are selected together or one after the other. No token's choices, no text, no order of tokens within a
window.

Shape letters: W windows, L MoE layers, E experts, C classes, K top-k, T tokens.
"""

from __future__ import annotations

import json
import tokenize
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InputError
from traces.files import check_size, reading, writing_whole
from traces.source import TraceHeader
from traces.synthesize.drawn import DrawnSource, block_generator
from traces.trace import Trace

__all__ = ["FORMAT", "FittedRouting", "FittedSource"]

FORMAT = "moe-fitted-routing/1"
"""Version of the file format."""

FloatArray = npt.NDArray[np.float32]

_FOREIGN = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    KeyError,
    NotImplementedError,
    TypeError,
    # NumPy's reader of headers lets this one through.
    tokenize.TokenError,
)
_ARRAYS = ("select_LCE", "follow_LCC", "weight_WLC", "factor_WLE")
_FIRST_ENTRY = b"fitted_routing.npy"

_RUN_WINDOWS = 16
"""Windows in a row that are repeated together, on average, where more are drawn than were fitted."""

_SINKHORN_ROUNDS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRouting:
    """Hidden token classes of every layer: what they select, how they follow each other, how frequent they
    are.

    Parameters
    ----------
    header
        Shape, model and layers; without domains.
    window_tokens, traffic_windows
        Tokens per window, and windows of the traffic that was fitted.
    select_LCE
        Probability that a token of a class selects an expert, ``[layers, classes, experts]``; sums to top-k.
    follow_LCC
        Joint probability of a token's classes in consecutive layers, ``[layers - 1, classes, classes]``.
    weight_WLC
        How frequent classes are in each window, or in every n-th one of the traffic.
    factor_WLE
        By what factor each window's weights of experts deviate from what its classes explain.

    Raises
    ------
    InputError
        If shapes disagree or numbers are no probabilities.
    """

    header: TraceHeader
    window_tokens: int
    traffic_windows: int
    select_LCE: FloatArray
    follow_LCC: FloatArray
    weight_WLC: FloatArray
    factor_WLE: FloatArray

    def __post_init__(self) -> None:
        layers, experts = self.header.num_layers, self.header.num_experts
        if self.select_LCE.ndim != 3 or self.weight_WLC.ndim != 3 or self.window_tokens < 1:
            raise InputError("a fitted router has classes by layer, and windows of at least one token")
        if self.traffic_windows < len(self.weight_WLC):
            raise InputError(f"{len(self.weight_WLC)} windows are kept of {self.traffic_windows}")
        classes, windows = self.select_LCE.shape[1], len(self.weight_WLC)
        shapes = {
            "select_LCE": (layers, classes, experts),
            "follow_LCC": (layers - 1, classes, classes),
            "weight_WLC": (windows, layers, classes),
            "factor_WLE": (windows, layers, experts),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or (0 in shape and name != "follow_LCC"):
                raise InputError(f"{name} has shape {array.shape}, not {shape}")
            if not (np.isfinite(array).all() and (array >= 0).all()):
                raise InputError(f"{name} holds numbers that are negative or not finite")
            view = np.ascontiguousarray(array, dtype=np.float32).view()
            view.setflags(write=False)
            object.__setattr__(self, name, view)
        if float(self.select_LCE.max()) > 1 or not np.allclose(
            self.select_LCE.sum(axis=2), self.header.top_k, rtol=1e-3
        ):
            raise InputError("select_LCE holds no probabilities that sum to top-k")
        if not (self.weight_WLC.sum(axis=2) > 0).all() or not (self.factor_WLE > 0).all():
            raise InputError("a window has no class or an expert of factor 0")

    @property
    def num_windows(self) -> int:
        """Windows that are kept."""
        return len(self.weight_WLC)

    def save(self, path: str | Path) -> None:
        """Write a file that `load` reads, whole or not at all.

        Raises
        ------
        InputError
            If the file cannot be written.
        """
        about = {"format": FORMAT, "window_tokens": self.window_tokens, **asdict(self.header)}
        about["traffic_windows"] = self.traffic_windows
        with writing_whole(Path(path)) as file:
            np.savez_compressed(
                file,
                fitted_routing=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
                **{name: getattr(self, name) for name in _ARRAYS},
            )

    @staticmethod
    def sniff(path: str | Path) -> bool:
        """Tell whether a file is what `save` writes, complete or not."""
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            head = file.read(30)
            return head.startswith(b"PK\x03\x04") and file.read(len(_FIRST_ENTRY)) == _FIRST_ENTRY

    @classmethod
    def load(cls, path: str | Path) -> FittedRouting:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If it is no such file, or damaged.
        """
        path = Path(path)
        with reading(path, *_FOREIGN):
            with zipfile.ZipFile(path) as archive:
                check_size(sum(info.file_size for info in archive.infolist()), path.stat().st_size)
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(arrays["fitted_routing"].tobytes())
                content: dict[str, Any] = {name: arrays[name] for name in _ARRAYS}
            if not isinstance(about, dict) or about.pop("format", None) != FORMAT:
                raise InputError(f"is no fitted router ({FORMAT})")
            content |= {key: int(about.pop(key)) for key in ("window_tokens", "traffic_windows")}
            for key in ("moe_layer_ids", "domain_names"):
                about[key] = None if about[key] is None else tuple(about[key])
            return cls(header=TraceHeader(**about), **content)

    def source(self, num_tokens: int | None = None, *, seed: int) -> FittedSource:
        """Return a synthetic trace, by default as long as the one that was fitted."""
        tokens = self.traffic_windows * self.window_tokens if num_tokens is None else num_tokens
        return FittedSource(self, num_tokens=tokens, seed=seed)


class FittedSource(DrawnSource):
    """A synthetic trace of a fitted router.

    Windows follow the fitted ones in their order, so that bursts and drift come back; of fewer, every n-th is
    taken; where more are wanted, runs of windows are repeated in random order (the stationary bootstrap:
    Politis and Romano, JASA 89, 1994).

    Parameters
    ----------
    routing
        The router.
    num_tokens
        Tokens in all.
    seed
        Seed; the same router, length and seed give the same trace.

    Raises
    ------
    InputError
        If there is no token.
    """

    def __init__(self, routing: FittedRouting, *, num_tokens: int, seed: int) -> None:
        super().__init__(routing.header, num_tokens, routing.window_tokens, self._window)
        self._routing = routing
        self._seed = seed
        self._fitted_window_W = _path(-(-num_tokens // routing.window_tokens), routing, seed)
        select_LCE = np.minimum(routing.select_LCE.astype(np.float64), 1 - 1e-6)
        # Draws one after the other are a race of exponential clocks: who rings before time 1 is selected.
        self._weight_LCE = -np.log1p(-select_LCE)

    def _window(self, block: int, tokens: int) -> Trace:
        from traces.synthesize.kernels import alias_tables, draw_tokens

        routing, header = self._routing, self.header
        window = int(self._fitted_window_W[block])
        weight_LCE = self._weight_LCE * routing.factor_WLE[window][:, None, :]
        layers, classes, experts = weight_LCE.shape
        keep, other = alias_tables(weight_LCE.reshape(-1, experts))
        first_C, follow_LCC = _chain(routing, window)
        experts_TLK = np.empty((tokens, layers, header.top_k), dtype=header.dtype)
        draw_tokens(
            block_generator(self._seed, block),
            first_C,
            follow_LCC,
            weight_LCE,
            keep.reshape(layers, classes, experts),
            other.reshape(layers, classes, experts),
            experts_TLK,
        )
        return Trace.trusted(
            experts_TLK=experts_TLK,
            num_experts=header.num_experts,
            model_name=header.model_name,
            moe_layer_ids=header.moe_layer_ids,
        )


def _path(num_windows: int, routing: FittedRouting, seed: int) -> npt.NDArray[np.int64]:
    """Return which fitted window each window is drawn from."""
    fitted, traffic = routing.num_windows, routing.traffic_windows
    if num_windows <= traffic:
        return np.arange(num_windows) * fitted // num_windows
    rng = block_generator(seed, 0, stream=0)
    jump_W = rng.random(num_windows) < 1 / _RUN_WINDOWS
    jump_W[:traffic] = False
    jump_W[traffic] = True
    began_W = np.maximum.accumulate(np.where(jump_W, np.arange(num_windows), 0))
    start_W = rng.integers(traffic, size=num_windows)
    start_W[0] = 0
    place_W = (start_W[began_W] + np.arange(num_windows) - began_W) % traffic
    return np.asarray(place_W * fitted // traffic)


def _chain(routing: FittedRouting, window: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return running sums of a window's class probabilities: of the first layer, and of each next class."""
    weight_LC = routing.weight_WLC[window].astype(np.float64)
    weight_LC /= weight_LC.sum(axis=1, keepdims=True)
    joint_LCC = np.maximum(routing.follow_LCC.astype(np.float64), 1e-12)
    for _ in range(_SINKHORN_ROUNDS):
        joint_LCC *= (weight_LC[:-1] / joint_LCC.sum(axis=2))[:, :, None]
        joint_LCC *= (weight_LC[1:] / joint_LCC.sum(axis=1))[:, None, :]
    follow_LCC = np.cumsum(joint_LCC, axis=2)
    follow_LCC /= np.maximum(follow_LCC[:, :, -1:], 1e-300)
    return np.cumsum(weight_LC[0]), follow_LCC
