"""The parts of a run, most important first: what each starts, what it needs, how long it may take."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.gpu.instances import EMULATED, REPLAYED, TINY

__all__ = ["PARTS", "SLOW_LINK", "Part", "parts_named"]

SLOW_LINK = {"NCCL_P2P_DISABLE": "1"}
"""NCCL through host memory: the stand-in for a slow link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One measurement, run by processes of its own.

    Parameters
    ----------
    name
        Of the part.
    worker
        What `worker` calls it, or the module that is run.
    ranks
        Processes that torchrun starts, one a GPU; 0 for one process on every GPU, each with its share of the
        instances; 1 for one process.
    timeout_s
        When it is stopped.
    budget_s
        When it begins nothing new.
    instances
        Prepared instances that it measures.
    transport
        What the link is called.
    writes_layers
        Whether it leaves the measured layers of its transport.
    options
        Further arguments.
    environment
        Variables to set.
    """

    name: str
    worker: str
    ranks: int
    timeout_s: float
    budget_s: float = 0.0
    instances: tuple[str, ...] = ()
    transport: str = ""
    writes_layers: bool = False
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


# Real routing first; what an instance leaves of its time goes to those behind it.
_REPLAYED = tuple(one.name for one in REPLAYED)
# The link decides little about the others: their shares of experts and exchange lie between these.
_REPLAYED_SLOWLY = ("olmoe-2", "dsv3-slice-2", "gpt-oss-20b-2")
_COMPUTE_BOUND = ("olmoe-2", "gpt-oss-20b-2", "dsv3-slice-2", "phi-3.5-moe-2", "mixtral-8x7b-2")
_TRAINED = ("--training",)

PARTS = (
    Part(name="smoke", worker="smoke", ranks=2, timeout_s=120),
    Part(
        name="replay-nvlink",
        worker="replay",
        ranks=2,
        timeout_s=240,
        budget_s=150,
        instances=_REPLAYED,
        transport="nvlink",
        writes_layers=True,
    ),
    Part(
        name="replay-prefill",
        worker="replay",
        ranks=2,
        timeout_s=190,
        budget_s=130,
        instances=_COMPUTE_BOUND,
        transport="nvlink",
        options=("--tile", "4", "--without-lp", "--exchanges", "dedup"),
    ),
    Part(name="calibrate-nvlink", worker="calibrate", ranks=2, timeout_s=150, transport="nvlink"),
    Part(
        name="emulate",
        worker="emulate",
        ranks=0,
        timeout_s=200,
        budget_s=140,
        instances=tuple(one.name for one in EMULATED),
    ),
    Part(name="recorder", worker="benchmarks.gpu.recorder", ranks=1, timeout_s=190, budget_s=140),
    Part(
        name="migration",
        worker="migration",
        ranks=2,
        timeout_s=150,
        instances=("olmoe-2", "gpt-oss-20b-2"),
    ),
    Part(
        name="replay-shm",
        worker="replay",
        ranks=2,
        timeout_s=110,
        budget_s=50,
        instances=_REPLAYED_SLOWLY,
        transport="shm",
        writes_layers=True,
        environment=SLOW_LINK,
    ),
    Part(
        name="whole-nvlink",
        worker="whole",
        ranks=2,
        timeout_s=90,
        budget_s=35,
        instances=("olmoe-2", "gpt-oss-20b-2"),
        transport="nvlink",
        options=_TRAINED,
    ),
    Part(
        name="training-nvlink",
        worker="replay",
        ranks=2,
        timeout_s=120,
        budget_s=50,
        instances=("olmoe-2", "dsv3-slice-2"),
        transport="nvlink",
        options=(*_TRAINED, "--exchanges", "dedup"),
    ),
    Part(
        name="calibrate-shm",
        worker="calibrate",
        ranks=2,
        timeout_s=150,
        transport="shm",
        environment=SLOW_LINK,
    ),
)


def parts_named(names: list[str] | None, *, tiny: bool, quick: bool) -> tuple[Part, ...]:
    """Return the parts of a run, in order; tiny ones measure the tiny instances."""
    from dataclasses import replace

    chosen = [part for part in PARTS if names is None or part.name in names]
    if quick:
        chosen = [replace(part, budget_s=part.budget_s / 3) for part in chosen]
    return tuple(_tiny(part) if tiny else part for part in chosen)


def _tiny(part: Part) -> Part:
    from dataclasses import replace

    of_kind = tuple(one.name for one in TINY if one.emulated == (part.worker == "emulate"))
    return replace(part, instances=of_kind if part.instances else (), budget_s=min(part.budget_s, 4.0))
