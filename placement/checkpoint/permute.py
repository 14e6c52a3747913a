"""Writes a checkpoint with its experts in another order: the same function, other experts on each device.

Two kinds of tensors depend on the order. A tensor of one expert gets the name of another and its bytes stay
where they are in their file: the index says anew which file holds which name, and no loader cares for the
order of names. A tensor of all experts, and the router's, get their rows in the new order. Everything else is
copied. Memory does not grow with the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from placement.checkpoint.config import ModelFacts, read_facts
from placement.checkpoint.folder import check_room, writing_folder
from placement.checkpoint.groups import check_groups
from placement.checkpoint.plan import make_plan
from placement.checkpoint.provenance import compose, provenance_name, read_provenance, write_provenance
from placement.checkpoint.shards import find_shards
from placement.checkpoint.survey import Survey, survey_checkpoint
from placement.checkpoint.writer import CheckpointWriter, Progress
from placement.errors import InputError
from placement.formats.permutation import Permutation

__all__ = ["CheckpointReport", "Progress", "permute_checkpoint", "restore_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """What was written.

    Parameters
    ----------
    folder
        Where.
    num_files, num_bytes
        Safetensors files, and their bytes.
    num_tensors, num_renamed, num_reordered
        Tensors in all, with another name, with another order of rows.
    moe_layer_ids
        Decoder layers whose experts have a new order.
    layouts
        Layouts of tensors that were met.
    untouched
        Layers and stacks of layers with experts that keep their order: those for speculative decoding.
    left_out
        Files of the source that were not copied: other copies of the weights, hidden files.
    was_permuted
        Whether the source had been permuted before; the placement then is for its present numbers.
    """

    folder: Path
    num_files: int
    num_bytes: int
    num_tensors: int
    num_renamed: int
    num_reordered: int
    moe_layer_ids: tuple[int, ...]
    layouts: tuple[str, ...]
    untouched: tuple[str, ...]
    left_out: tuple[str, ...]
    was_permuted: bool


def permute_checkpoint(
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    permutation: Permutation,
    *,
    num_groups: int | None = None,
    stack: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> CheckpointReport:
    """Write a checkpoint whose new expert `n` is the old expert ``old_expert_of_new[layer, n]``.

    The model computes the same, up to the order in which floats are added and up to exact ties of router
    scores, which `topk` resolves by position.

    Parameters
    ----------
    source_dir
        Checkpoint in safetensors, in one file or many, with ``config.json`` where there is one.
    out_dir
        Folder that is made; it appears whole, at the end, or not at all.
    num_groups
        Groups that the router chooses among first, where there is no ``config.json`` to tell (1 for none).
    stack
        Stack of decoder layers (``thinker.model.layers``) that is meant, where several have experts. Each has
        its own account beside the weights, and is restored by its name.
    progress
        Is told the bytes written so far, and those to write in all.
    overwrite
        Whether `out_dir` may be replaced if it holds a checkpoint that this function wrote.

    Raises
    ------
    InputError
        If the checkpoint is damaged, of a layout that is not known, or another model's; if the permutation
        would change the model; if the folder cannot be written.
    """
    source = Path(source_dir)
    shards = find_shards(source)
    facts = _routing(source, num_groups)
    survey = survey_checkpoint(shards, stack=stack)
    with _naming(source):
        plan = make_plan(survey, permutation, facts)
        check_groups(permutation, facts)
        earlier = read_provenance(source, stack)
        total = compose(earlier, permutation)
    out = Path(out_dir)
    with writing_folder(out, source=source, overwrite=overwrite) as growing:
        writer = CheckpointWriter(
            plan=plan, shards=shards, folder=growing, leave=provenance_name(stack), progress=progress
        )
        check_room(out, writer.total_bytes)
        writer.write()
        write_provenance(growing, total, stack)
    return CheckpointReport(
        folder=out,
        num_files=len(shards.files),
        num_bytes=survey.num_bytes,
        num_tensors=survey.num_tensors,
        num_renamed=writer.num_renamed,
        num_reordered=writer.num_reordered,
        moe_layer_ids=permutation.moe_layer_ids,
        layouts=survey.layouts,
        untouched=_untouched(survey, permutation),
        left_out=shards.left_out,
        was_permuted=earlier is not None,
    )


def restore_checkpoint(
    source_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    stack: str | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> CheckpointReport:
    """Write the original of a permuted checkpoint: experts and files as they were before.

    Parameters
    ----------
    source_dir
        Folder that `permute_checkpoint` wrote.
    out_dir, stack, progress, overwrite
        As for `permute_checkpoint`.

    Raises
    ------
    InputError
        If the checkpoint was not permuted, or as for `permute_checkpoint`.
    """
    done = read_provenance(Path(source_dir), stack)
    if done is None:
        raise InputError(
            f"{Path(source_dir)}: has no {provenance_name(stack)}, so its experts are in their original order"
        )
    # What was exact one way is exact the other way, so what nothing tells need not be told again.
    known = read_facts(Path(source_dir)).unclear is None
    return permute_checkpoint(
        source_dir,
        out_dir,
        done.inverse(),
        num_groups=None if known else 1,
        stack=stack,
        progress=progress,
        overwrite=overwrite,
    )


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Start every message with the folder, unless it begins with a place already."""
    try:
        yield
    except InputError as exc:
        raise InputError(str(exc) if str(exc).startswith(str(source)) else f"{source}: {exc}") from exc


def _routing(source: Path, num_groups: int | None) -> ModelFacts:
    """Read what the configuration says; where it does not say, groups must be told."""
    facts = read_facts(source)
    if num_groups is None and facts.unclear is None:
        return facts
    if num_groups is None:
        raise InputError(
            f"{source}: {facts.unclear}, so it is not known whether the router chooses among groups of "
            "experts; tell the number of groups (1 for none)"
        )
    if num_groups < 1:
        raise InputError(f"{num_groups} groups of experts; it must be 1 or more")
    if facts.limits_groups and num_groups != facts.num_groups:
        raise InputError(
            f"{source}: config.json has {facts.num_groups} groups of experts, not {num_groups}; leave it "
            "to that"
        )
    # How many groups a token uses is not told; any number below all of them asks for the same.
    return replace(facts, num_groups=num_groups, top_groups=1)


def _untouched(survey: Survey, permutation: Permutation) -> tuple[str, ...]:
    layers = sorted(set(survey.layers) - set(permutation.moe_layer_ids))
    return (*(f"{survey.stem}.{layer}" for layer in layers), *survey.elsewhere)
