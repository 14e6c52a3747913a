"""What a checkpoint holds of experts: every header is read once, and what depends on their order is noted.

Headers are not kept: of 140,000 tensors only the names stay, and for each layer what its experts consist of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from placement.checkpoint.header import TensorEntry, quoted, read_header
from placement.checkpoint.layouts import Kind, Match, Part, match_tensor, sounds_like_experts
from placement.checkpoint.shards import Shards
from placement.errors import InputError

__all__ = ["LayerSurvey", "Survey", "survey_checkpoint"]

_SPECULATIVE = frozenset({"mtp", "mtp_layers", "nextn"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSurvey:
    """The experts and the router of one decoder layer.

    Parameters
    ----------
    numbered
        For tensors of one expert each: which experts have it, as bits, by name with ``*`` for the number.
    stacked
        Tensors of all experts and of the router: entry and match.
    unknown
        Tensors that follow no rule, with what follows the layer's number in their names.
    """

    numbered: dict[str, int] = field(default_factory=dict)
    stacked: list[tuple[TensorEntry, Match]] = field(default_factory=list)
    unknown: list[tuple[TensorEntry, str]] = field(default_factory=list)

    @property
    def has_experts(self) -> bool:
        """Whether it is a MoE layer."""
        return bool(self.numbered) or any(_part(match) is Part.EXPERTS for _, match in self.stacked)

    @property
    def has_router(self) -> bool:
        """Whether it has what chooses experts, beyond a bias."""
        return any(_part(match) is Part.ROUTER and len(entry.shape) > 1 for entry, match in self.stacked)

    @property
    def blocks(self) -> set[str]:
        """Names of the MoE blocks."""
        return {match.block for _, match in self.stacked} | {
            name.partition("experts.")[0][:-1] for name in self.numbered
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """All that is to be known of a checkpoint before anything is written.

    Parameters
    ----------
    stem
        Stack of decoder layers that the experts are in (``model.layers``).
    layers
        Its MoE layers by their number.
    layouts
        Rules that were met, by what they are called.
    elsewhere
        Other stacks with experts, such as layers for speculative decoding; they stay as they are.
    num_tensors, num_bytes
        Of all files; bytes with the headers.
    """

    stem: str
    layers: Mapping[int, LayerSurvey]
    layouts: tuple[str, ...]
    elsewhere: tuple[str, ...]
    num_tensors: int
    num_bytes: int


def survey_checkpoint(shards: Shards, *, stack: str | None = None) -> Survey:
    """Read all headers of a checkpoint and note what its experts consist of.

    Parameters
    ----------
    stack
        Stack of decoder layers to look at, where several have experts.

    Raises
    ------
    InputError
        If a file is damaged, a tensor is in two files or in none, no experts are found, or they are in
        several stacks of layers.
    """
    stacks: dict[str, dict[int, LayerSurvey]] = {}
    layouts: dict[str, None] = {}
    num_bytes = 0
    names: dict[str, str] = {}
    for file, entry in _entries(shards):
        num_bytes += entry.num_bytes
        _add_name(names, entry.name, file, shards)
        match = match_tensor(entry.name)
        if match is None:
            _check_outside(entry.name, shards)
            continue
        _note(stacks.setdefault(match.stem, {}).setdefault(match.layer, LayerSurvey()), entry, match)
        if match.rule is not None and match.rule.part is not Part.OTHER:
            layouts[match.rule.layout] = None
    missing = next((name for name in shards.weight_map if name not in names), None)
    if missing is not None:
        raise InputError(
            f"{shards.folder / str(shards.index)}: names tensor {quoted(missing)} in "
            f"{shards.weight_map[missing]}, which does not hold it; get the checkpoint again"
        )
    moe = {
        name: {number: layer for number, layer in sorted(layers.items()) if layer.has_experts}
        for name, layers in stacks.items()
    }
    moe = {name: layers for name, layers in moe.items() if layers}
    stem = _choose(moe, stacks, stack, shards)
    return Survey(
        stem=stem,
        layers=moe[stem],
        layouts=tuple(sorted(layouts)),
        elsewhere=tuple(sorted(set(moe) - {stem})),
        num_tensors=len(names),
        num_bytes=num_bytes,
    )


def _entries(shards: Shards) -> Iterator[tuple[str, TensorEntry]]:
    for file in shards.files:
        for entry in read_header(shards.folder / file).tensors:
            yield file, entry


def _add_name(names: dict[str, str], name: str, file: str, shards: Shards) -> None:
    if name in names:
        raise InputError(
            f"{shards.folder}: tensor {quoted(name)} is in {names[name]} and in {file}; remove one of them"
        )
    names[name] = file
    if shards.weight_map.get(name, file) != file:
        raise InputError(
            f"{shards.folder / str(shards.index)}: looks for tensor {quoted(name)} in "
            f"{shards.weight_map[name]}, it is in {file}; get the checkpoint again"
        )


def _check_outside(name: str, shards: Shards) -> None:
    if sounds_like_experts(name):
        raise InputError(
            f"{shards.folder}: tensor {quoted(name)} speaks of experts and names no decoder layer; no known "
            "layout does, so it cannot be permuted"
        )


def _note(layer: LayerSurvey, entry: TensorEntry, match: Match) -> None:
    if match.rule is None:
        # Attention and norms of every layer pass here; a name is kept where it may have to be refused.
        layer.unknown.append((entry, match.rest))
    elif match.rule.kind is Kind.NUMBERED:
        layer.numbered[match.rest] = layer.numbered.get(match.rest, 0) | 1 << match.expert
    elif match.rule.kind is not Kind.KEPT:
        layer.stacked.append((entry, match))


def _part(match: Match) -> Part:
    return Part.OTHER if match.rule is None else match.rule.part


def _choose(
    moe: Mapping[str, object], stacks: Mapping[str, object], stack: str | None, shards: Shards
) -> str:
    if stack is not None:
        if stack in moe:
            return stack
        known = ", ".join(sorted(moe)) or "none"
        raise InputError(
            f"{shards.folder}: no experts in layers called {quoted(stack)}; stacks with experts: {known}"
        )
    found = sorted(name for name in moe if _SPECULATIVE.isdisjoint(name.split(".")))
    if not found:
        seen = ", ".join(sorted(stacks)[:3]) or "none"
        raise InputError(
            f"{shards.folder}: no experts of a known layout found (stacks of layers: {seen}); it is no "
            "Mixture-of-Experts checkpoint, or its layout has no rule yet"
        )
    if len(found) > 1:
        raise InputError(
            f"{shards.folder}: {len(found)} stacks of layers have experts ({', '.join(found)}); name the one "
            "that the placement is for"
        )
    return found[0]
