"""The named instances: shapes of published models, the routing that they are given, and how it is cut.

Routing is real where a trace with the shape's experts and top-k is at hand, and drawn from a synthetic router
otherwise; every instance says which.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from placement.errors import InputError
from placement.model import ModelShape

__all__ = [
    "EMULATED",
    "REPLAYED",
    "SYNTHETIC",
    "TINY",
    "Instance",
    "Shape",
    "instance_from_dict",
    "instances",
]

SYNTHETIC = "synthetic"
"""In place of a trace's name: routing drawn by `traces.synthesize.synthesize` with its default knobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of one MoE layer.

    Parameters
    ----------
    name
        What tables call it.
    model_type
        Transformers' type of a model whose experts have this form.
    num_experts, top_k
        Routed experts, and how many a token selects.
    hidden_size, expert_hidden_size
        Width of a token, inner width of an expert.
    """

    name: str
    model_type: str
    num_experts: int
    top_k: int
    hidden_size: int
    expert_hidden_size: int

    def model(self, num_layers: int) -> ModelShape:
        """Return what the cost model needs to know, in bf16."""
        return ModelShape(
            name=self.name,
            num_layers=num_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            expert_hidden_size=self.expert_hidden_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One shape under one traffic on so many ranks.

    Parameters
    ----------
    name
        Unique; names its files.
    shape
        Sizes of the layer.
    traffic
        Name of a trace, or `SYNTHETIC`.
    note
        What a reader has to know of the traffic.
    num_ranks
        Devices of the placements.
    emulated
        Whether each rank's share is run in turn on one GPU, not replayed on `num_ranks` of them.
    window_tokens
        Consecutive tokens of a window; a window is split over the ranks in order.
    layers
        Layers of the trace that are fitted and measured.
    num_windows
        Held-out windows measured, evenly spaced.
    spare_slots
        Slots beyond one per expert, for the policies that have them.
    batches
        Emulated: name and tokens of each batch. A batch larger than the window is the window repeated (its
        counts multiplied); a smaller one takes every n-th of its tokens.
    """

    name: str
    shape: Shape
    traffic: str
    note: str
    num_ranks: int
    window_tokens: int
    layers: tuple[int, ...]
    num_windows: int
    spare_slots: int
    emulated: bool = False
    batches: dict[str, int] = field(default_factory=dict)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of a window that each rank holds."""
        return self.window_tokens // self.num_ranks

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


def instance_from_dict(values: dict[str, Any]) -> Instance:
    """Return the instance of a JSON form."""
    fields = {**values, "shape": Shape(**values["shape"]), "layers": tuple(values["layers"])}
    return Instance(**fields)


def _shape(name: str, model_type: str, experts: int, top_k: int, hidden: int, inner: int) -> Shape:
    return Shape(
        name=name,
        model_type=model_type,
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        expert_hidden_size=inner,
    )


_OLMOE = _shape("olmoe", "olmoe", 64, 8, 2048, 1024)
_GPT_OSS = _shape("gpt-oss-20b", "gpt_oss", 32, 4, 2880, 2880)
_DEEPSEEK = _shape("dsv3-slice", "deepseek_v3", 64, 8, 7168, 2048)
_QWEN3 = _shape("qwen3-30b-a3b", "qwen3_moe", 128, 8, 2048, 768)
_MIXTRAL = _shape("mixtral-8x7b", "mixtral", 8, 2, 4096, 14336)
# Phi-3.5-MoE's sizes: the published shape with byte16's 16 experts and top-2.
_PHI = _shape("phi-3.5-moe", "mixtral", 16, 2, 4096, 6400)
_TINY = _shape("tiny", "olmoe", 8, 2, 32, 16)

_OLMOE64 = "real routing of a 428 M-parameter OLMoE-shaped model"
_GPTOSS = "real routing of GPT-OSS-20B"
_BYTE16 = "real routing of a byte-level model of 16 experts, lent to Phi-3.5-MoE's sizes"
_DRAWN = "synthetic routing; no real trace of this model is at hand"


def _replayed(
    shape: Shape, traffic: str, note: str, layers: tuple[int, ...], *, window: int = 8192, spare: int = 4
) -> Instance:
    return Instance(
        name=f"{shape.name}-2",
        shape=shape,
        traffic=traffic,
        note=note,
        num_ranks=2,
        window_tokens=window,
        layers=layers,
        num_windows=15,
        spare_slots=spare,
    )


REPLAYED = (
    _replayed(_OLMOE, "olmoe64", _OLMOE64, (1, 5, 8, 14)),
    _replayed(_GPT_OSS, "gptoss20b_a", _GPTOSS, (2, 8, 14, 20)),
    _replayed(_PHI, "byte16", _BYTE16, (0, 2, 3, 5), spare=2),
    _replayed(_DEEPSEEK, "olmoe64", f"{_OLMOE64}, lent to a slice of DeepSeek-V3's sizes", (1, 5, 8, 14)),
    _replayed(_QWEN3, SYNTHETIC, _DRAWN, (0, 1, 2, 3)),
    _replayed(_MIXTRAL, SYNTHETIC, _DRAWN, (0, 1, 2, 3), spare=2),
)
"""Run by two ranks, one GPU each; 4,096 tokens a rank."""

_BATCHES = {"prefill-64k": 65_536, "prefill-16k": 16_384, "decode-512": 512}


def _emulated(
    shape: Shape, traffic: str, note: str, ranks: int, *, window: int, layers: tuple[int, ...]
) -> Instance:
    return Instance(
        name=f"{shape.name}-{ranks}",
        shape=shape,
        traffic=traffic,
        note=note,
        num_ranks=ranks,
        window_tokens=window,
        layers=layers,
        num_windows=12,
        spare_slots=ranks,
        emulated=True,
        batches=_BATCHES,
    )


_GPTOSS_LAYERS = tuple(range(24))
_OLMOE_LAYERS = tuple(range(16))

EMULATED = (
    _emulated(_GPT_OSS, "gptoss20b_a", _GPTOSS, 8, window=2048, layers=_GPTOSS_LAYERS),
    _emulated(_OLMOE, "olmoe64", _OLMOE64, 8, window=4096, layers=_OLMOE_LAYERS),
    _emulated(_GPT_OSS, "gptoss20b_a", _GPTOSS, 16, window=2048, layers=_GPTOSS_LAYERS),
    _emulated(_OLMOE, "olmoe64", _OLMOE64, 16, window=4096, layers=_OLMOE_LAYERS),
)
"""Each rank's share run in turn on one GPU."""

TINY = (
    Instance(
        name="tiny-2",
        shape=_TINY,
        traffic=SYNTHETIC,
        note=_DRAWN,
        num_ranks=2,
        window_tokens=64,
        layers=(0, 1),
        num_windows=2,
        spare_slots=2,
    ),
    Instance(
        name="tiny-4",
        shape=_TINY,
        traffic=SYNTHETIC,
        note=_DRAWN,
        num_ranks=4,
        window_tokens=64,
        layers=(0, 1),
        num_windows=2,
        spare_slots=4,
        emulated=True,
        batches={"prefill-256": 256, "decode-16": 16},
    ),
)
"""The same in miniature: every part runs on a CPU in seconds."""


def instances(names: list[str] | None = None, *, tiny: bool = False) -> tuple[Instance, ...]:
    """Return the instances of some names, or all.

    Raises
    ------
    InputError
        If there is none of a name.
    """
    known = TINY if tiny else (*REPLAYED, *EMULATED)
    if names is None:
        return known
    unknown = sorted(set(names) - {one.name for one in known})
    if unknown:
        raise InputError(f"no instance {unknown}; there are {[one.name for one in known]}")
    return tuple(one for one in known if one.name in names)
