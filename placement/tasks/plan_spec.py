"""Reads what is to be planned: a YAML file, what it names, and the routing that it is planned for.

Shape letters: T tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from placement._fields import Fields, load_yaml, read_text
from placement.errors import InputError

if TYPE_CHECKING:
    from placement.calibration import Calibration
    from placement.model import ModelShape
    from placement.planning.transformer import TransformerShape
    from placement.tasks.problem import TraceOrigin
    from placement.topology import Topology

__all__ = ["PlanSpec", "PlanTraffic", "read_spec", "read_traffic"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSpec:
    """A file that says what to plan.

    Parameters
    ----------
    values
        The file's mapping, as parsed.
    source
        The file's name, the start of every message.
    folder
        Folder of the file: what it names relatively is found from there.
    """

    values: Mapping[str, Any]
    source: str
    folder: Path

    def fields(self, *, known: Collection[str], required: Collection[str] = ()) -> Fields:
        """Return a reader of the top level; a key that is not known is an error."""
        return Fields(self.values, source=self.source, known=known, required=required)

    def found(self, name: str) -> str:
        """Return a file that the spec names, from its folder; what does not exist there stays as it is."""
        beside = self.folder / name
        return os.fspath(beside) if beside.exists() else name

    def topology(self, value: object, *, key: str = "topology") -> Topology:
        """Return a topology: a shorthand, the name of a YAML file, or the mapping of one.

        Raises
        ------
        InputError
            If it is none.
        """
        from placement.topology import Topology, parse_topology

        if isinstance(value, str):
            return parse_topology(self.found(value))
        values = {"name": Path(self.source).stem, **value} if isinstance(value, Mapping) else value
        return Topology.from_dict(values, source=f"{self.source}: {key}")

    def model(self, value: object, *, key: str = "model") -> ModelShape:
        """Return a model's shape: a preset's name, a checkpoint, or the mapping of a model file.

        Raises
        ------
        InputError
            If it is none.
        """
        from placement.model import model_from_fields, resolve_model

        if isinstance(value, str):
            return resolve_model(self.found(value))
        return model_from_fields(value, name=Path(self.source).stem, source=f"{self.source}: {key}")

    def transformer(self, value: object, *, key: str = "transformer", model: ModelShape) -> TransformerShape:
        """Return a model with its attention: a mapping of the fields of `TransformerShape` beside ``moe``.

        Raises
        ------
        InputError
            If a field is unknown or out of range, or the number of heads is missing.
        """
        from placement.planning.transformer import TransformerShape

        known = ("num_attention_heads", "attention_params", "dense_hidden_size", "vocabulary_size")
        given = Fields(value, source=self.source, place=key, known=known, required=known[:1])
        numbers = {name: given.integer(name, minimum=0) for name in known if name in given}
        return TransformerShape(moe=model, **{name: n for name, n in numbers.items() if n is not None})

    def calibration(self, value: object, *, key: str = "calibration") -> Calibration:
        """Return the calibration of a file that is named; the data sheet where nothing is.

        Raises
        ------
        InputError
            If it is no calibration file.
        """
        from placement.calibration import DataSheetCalibration, read_calibration

        if value is None:
            return DataSheetCalibration()
        if not isinstance(value, str):
            raise InputError(f"{self.source}: {key} must name a calibration file (JSON)")
        return read_calibration(Path(self.found(value)))


def read_spec(path: str | os.PathLike[str]) -> PlanSpec:
    """Read a file that says what to plan.

    Raises
    ------
    InputError
        If it cannot be read or holds no mapping.
    """
    source = os.fspath(path)
    values = load_yaml(read_text(path, what="plan file"), source=source)
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: must hold a mapping; examples/plans has one of each kind")
    return PlanSpec(values=values, source=source, folder=Path(path).parent)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanTraffic:
    """Routing, token by token, in recorded order.

    Parameters
    ----------
    experts_TLK
        Expert ids, ``[tokens, layers, k]``.
    num_experts
        Experts per layer.
    domain_T
        Kind of traffic of each token, ``[tokens]``, an index into `domain_names`; -1 where unknown.
    domain_names
        Names of the kinds of traffic; empty where the trace knows none.
    origin
        What else is known of the trace.
    """

    experts_TLK: npt.NDArray[np.unsignedinteger[Any]]
    num_experts: int
    domain_T: IntArray
    domain_names: tuple[str, ...]
    origin: TraceOrigin


def read_traffic(trace: str, *, source_format: str | None = None) -> PlanTraffic:
    """Read a trace whole; windows are cut from it by `traces.statistics.build_profile` on `trace` itself.

    Raises
    ------
    InputError
        If it cannot be read, or has expert counts only.
    """
    from placement.tasks.problem import TraceOrigin
    from traces.readers import read_trace

    read = read_trace(trace, format=source_format).interleave_ranks()
    domain_T = np.full(read.num_tokens, -1) if read.domain_T is None else read.domain_T
    return PlanTraffic(
        experts_TLK=read.experts_TLK,
        num_experts=read.num_experts,
        domain_T=np.asarray(domain_T, dtype=np.int64),
        domain_names=read.domain_names,
        origin=TraceOrigin(
            digest=read.digest,
            num_layers=read.num_layers,
            num_experts=read.num_experts,
            top_k=read.top_k,
            model_name=read.model_name,
            moe_layer_ids=read.moe_layer_ids,
        ),
    )
