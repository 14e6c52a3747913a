"""Checkpoints and folders that must be refused: one line each, and nothing is left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tensor_files import digests, permutation, write_checkpoint, write_tensors

from placement.checkpoint import permute_checkpoint, restore_checkpoint
from placement.checkpoint.provenance import FILE_NAME
from placement.errors import InputError

Array = npt.NDArray[Any]
E = 4
OLD = [2, 0, 3, 1]
INDEX = "model.safetensors.index.json"


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


def layer(number: int = 0, *, num_experts: int = E) -> dict[str, Array]:
    """Return a layer with a tensor per expert and a router."""
    experts = {
        f"model.layers.{number}.mlp.experts.{expert}.up_proj.weight": zeros(2, 3)
        for expert in range(num_experts)
    }
    return {**experts, f"model.layers.{number}.mlp.gate.weight": zeros(num_experts, 3)}


def refused(source: Path, out: Path, **options: Any) -> str:
    """Return the message; nothing was written, not even under a hidden name."""
    before = digests(out.parent)
    with pytest.raises(InputError) as caught:
        permute_checkpoint(source, out, options.pop("order", permutation(OLD)), **options)
    assert digests(out.parent) == before
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
    assert "\n" not in str(caught.value)
    return str(caught.value)


SPLIT = [{k: v for k, v in layer().items() if ("experts.1." in k) == odd} for odd in (False, True)]


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def twice(folder: Path) -> None:
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    write_tensors(folder / "model-00002-of-00002.safetensors", {**SPLIT[1], name: zeros(2, 3)})


def rewrite_index(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"].update(changes.pop("weight_map", {}))
        (folder / INDEX).write_text(json.dumps({**index, **changes}))

    return change


def text(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text(content)

    return change


GATE = "model.layers.0.mlp.gate.weight"
DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("a truncated file", cut, "00002-of-00002.safetensors: is truncated"),
    ("a missing file", remove_shard, r"names 'model-00002-of-00002.safetensors', which is not in the folder"),
    ("a tensor in two files", twice, "is in model-00001-of-00002.safetensors and in model-00002"),
    (
        "a tensor in no file",
        rewrite_index(weight_map={"ghost": "model-00001-of-00002.safetensors"}),
        "'ghost'",
    ),
    (
        "a tensor in another file",
        rewrite_index(weight_map={GATE: "model-00002-of-00002.safetensors"}),
        "it is in",
    ),
    (
        "a path outside",
        rewrite_index(weight_map={GATE: "../x.safetensors"}),
        "no safetensors file of the folder",
    ),
    ("a folder as file", rewrite_index(weight_map={GATE: ".."}), "no safetensors file of the folder"),
    ("a number as file", rewrite_index(weight_map={GATE: 3}), "no safetensors file of the folder"),
    ("no weight map", rewrite_index(weight_map=None) and text(INDEX, "{}"), "has no weight_map"),
    ("an index of a list", text(INDEX, "[]"), "is not JSON"),
    (
        "an index that names a tensor twice",
        text(INDEX, '{"weight_map":{"a":"b.safetensors","a":"b.safetensors"}}'),
        "'a' is given twice",
    ),
    ("an index that is no JSON", text(INDEX, "{"), "is not JSON"),
    ("an index that is cut", text(INDEX, '{"weight_map":{"a":"b.safetensors"}'), "is not JSON"),
    (
        "an index of two maps",
        text(INDEX, '{"weight_map":{"a":"b.safetensors"},"weight_map":{}}'),
        "given twice",
    ),
    ("an index of text", text(INDEX, '{"weight_map":"a"}'), "is not JSON"),
    ("a deep index", text(INDEX, "[" * 100_000), "is not JSON"),
    ("a configuration that is no JSON", text("config.json", "{"), "config.json: is not JSON"),
    ("a configuration of a list", text("config.json", "[]"), "not an object"),
    ("groups in words", text("config.json", '{"n_group": "8"}'), "n_group is '8'"),
    ("another number of experts", text("config.json", '{"num_experts": 8}'), "config.json says 8"),
    (
        "a quantisation by expert",
        text("config.json", '{"quantization_config": {"ignore": ["model.layers.0.mlp.experts.3.up_proj"]}}'),
        "treats experts differently by their number ('model.layers.0.mlp.experts.3.up_proj')",
    ),
    (
        "a quantisation file by expert",
        text("hf_quant_config.json", '{"quantization": {"layers": {"mlp.experts.3": "FP8"}}}'),
        "hf_quant_config.json: treats experts differently",
    ),
    (
        "experts that are quantised differently",
        text(
            "config.json",
            json.dumps(
                {"num_experts": E, "layers": {f"mlp.experts.{e}.up_proj": {"bits": 4 + e} for e in range(E)}}
            ),
        ),
        "treats experts differently",
    ),
    ("groups of an unknown kind", text("config.json", '{"experts_per_group": 2}'), "experts_per_group = 2"),
]


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """The message names the file, and nothing is written."""
    source = write_checkpoint(tmp_path / "a", SPLIT)
    damage(source)
    said = refused(source, tmp_path / "b")
    assert message in said
    assert said.startswith(str(source))


def without(name: str) -> dict[str, Array]:
    return {key: value for key, value in layer().items() if name not in key}


MISFITS: list[tuple[str, dict[str, Array], str]] = [
    ("too few experts", layer(num_experts=3), "expert 3 is missing"),
    ("too many experts", layer(num_experts=5), "has experts up to 4, the placement is for 4"),
    ("a missing expert", without("experts.2."), "expert 2 is missing"),
    ("no router", without("gate"), "no router of a known layout"),
    ("another router", {**layer(), GATE: zeros(5, 3)}, "has 5 rows"),
    ("no experts", {"model.layers.0.mlp.up_proj.weight": zeros(2, 2)}, "no experts of a known layout"),
    ("no layers", {"weight": zeros(2)}, "(stacks of layers: none)"),
    ("another layer", layer(3), "has no experts there, its 1 MoE layers are 3"),
    ("a layer more", {**layer(0), **layer(1)}, "has experts in decoder layer 1"),
    (
        "two stacks",
        {**layer(), **{f"b.{k}": v for k, v in layer().items()}},
        "2 stacks of layers have experts",
    ),
    (
        "a router of unknown quantisation",
        {**layer(), "model.layers.0.mlp.gate.qzeros": zeros(1, 1)},
        "'model.layers.0.mlp.gate.qzeros' (F32 [1, 1]) belongs to a MoE block",
    ),
    (
        "block scales over rows of the router",
        {**layer(), "model.layers.0.mlp.gate.weight_scale_inv": zeros(2, 3)},
        "has 2 rows",
    ),
    (
        "an unknown tensor with an axis of experts",
        {**layer(), "model.layers.0.mlp.temperature": zeros(3, E)},
        "'model.layers.0.mlp.temperature' (F32 [3, 4]) belongs to a MoE block",
    ),
    (
        "an unknown tensor of the experts",
        {**layer(), "model.layers.0.mlp.experts.lookup": zeros(7)},
        "'model.layers.0.mlp.experts.lookup'",
    ),
    ("experts outside of layers", {**layer(), "decoder.experts.w1": zeros(E, 2)}, "names no decoder layer"),
    (
        "ids that are no integers",
        {**layer(), "model.layers.0.mlp.gate.tid2eid": zeros(9, 2)},
        "no expert ids",
    ),
    (
        "experts that do not divide",
        {**layer(), "model.layers.0.mlp.experts.mlp.w1": zeros(6, 2)},
        "does not divide into 4 experts",
    ),
]


@pytest.mark.parametrize(("tensors", "message"), [m[1:] for m in MISFITS], ids=[m[0] for m in MISFITS])
def test_a_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, tensors: dict[str, Array], message: str
) -> None:
    """Nothing of a MoE block is ever left unpermuted in silence."""
    source = write_checkpoint(tmp_path / "a", [tensors])
    assert message in refused(source, tmp_path / "b")


def test_a_quantisation_that_lists_all_experts_alike_is_fine(tmp_path: Path) -> None:
    """Module by module, or by a pattern: no expert is treated otherwise than the others."""
    names = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(E)]
    config = {
        "num_experts": E,
        "quantization_config": {
            "ignore": ["lm_head", r"re:.*mlp\.experts\.[0-9]+\..*", *names],
            "layers": {name: {"bits": 4} for name in names},
        },
    }
    source = write_checkpoint(tmp_path / "a", [layer()], config=config)
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    assert (tmp_path / "b" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_an_unknown_stack_is_refused(tmp_path: Path) -> None:
    """The message lists what there is."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    assert "stacks with experts: model.layers" in refused(source, tmp_path / "b", stack="decoder.layers")


def test_without_a_configuration_groups_must_be_told(tmp_path: Path) -> None:
    """Whether groups matter cannot be seen in the weights."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    (source / "config.json").unlink()
    assert "has no config.json" in refused(source, tmp_path / "b")
    assert "0 groups of experts" in refused(source, tmp_path / "b", num_groups=0)
    permute_checkpoint(source, tmp_path / "b", permutation(OLD), num_groups=1)
    restore_checkpoint(tmp_path / "b", tmp_path / "c")
    assert digests(tmp_path / "c") == digests(source)


def test_groups_that_contradict_the_configuration_are_refused(tmp_path: Path) -> None:
    """The configuration is what the engine will follow."""
    source = write_checkpoint(tmp_path / "a", [layer()], config={"n_group": 2, "topk_group": 1})
    assert "config.json has 2 groups" in refused(source, tmp_path / "b", num_groups=1)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    """No folder, no safetensors, two indices."""
    (tmp_path / "a").mkdir()
    assert "is no folder" in refused(tmp_path / "none", tmp_path / "b")
    assert "holds no safetensors file" in refused(tmp_path / "a", tmp_path / "b")
    for name in ("x", "y"):
        (tmp_path / "a" / f"{name}.safetensors.index.json").write_text("{}")
    assert "has 2 indices" in refused(tmp_path / "a", tmp_path / "b")


def test_an_original_has_nothing_to_restore(tmp_path: Path) -> None:
    """Only a permuted checkpoint can be undone."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    with pytest.raises(InputError, match="in their original order"):
        restore_checkpoint(source, tmp_path / "b")


def test_a_damaged_account_is_refused(tmp_path: Path) -> None:
    """What was done before must be known to say what was done in all."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    (source / FILE_NAME).write_text("{}")
    assert FILE_NAME in refused(source, tmp_path / "b")


def test_an_account_of_another_model_is_refused(tmp_path: Path) -> None:
    """Permutations add up over the same layers and experts only."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    other = write_checkpoint(tmp_path / "c", [{**layer(0), **layer(1)}])
    shutil.copy(tmp_path / "b" / FILE_NAME, other)
    assert "was permuted before in 1 layers" in refused(other, tmp_path / "d", order=permutation(OLD, OLD))


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    """Only what this command wrote is replaced, and only when asked."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("years of work")
    assert "is not empty" in refused(source, tmp_path / "b")
    assert "nothing shows that this command wrote it" in refused(source, tmp_path / "b", overwrite=True)
    (tmp_path / "f").write_text("")
    assert "is a file" in refused(source, tmp_path / "f", overwrite=True)
    (tmp_path / "l").symlink_to(tmp_path / "b")
    assert "is a link" in refused(source, tmp_path / "l", overwrite=True)
    assert "overlaps the folder that is read" in refused(source, source, overwrite=True)
    assert "overlaps the folder that is read" in refused(source, source / "in")
    with pytest.raises(InputError, match=f"there is no folder {tmp_path / 'none'}"):
        permute_checkpoint(source, tmp_path / "none" / "b", permutation(OLD))


def test_a_checkpoint_that_was_written_is_replaced_when_asked(tmp_path: Path) -> None:
    """The new one takes the place of the old one, whole; an empty folder is as good as none."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    (tmp_path / "b").mkdir()
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    (tmp_path / "b" / "stale").write_text("")
    permute_checkpoint(source, tmp_path / "b", permutation([1, 0, 2, 3]), overwrite=True)
    permute_checkpoint(source, tmp_path / "c", permutation([1, 0, 2, 3]))
    assert digests(tmp_path / "b") == digests(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the weights, with an older checkpoint in the place that stays."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))

    def full(*args: object, **kwargs: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full)
    said = refused(source, tmp_path / "b", overwrite=True)
    assert "cannot be written (No space left on device); make room" in said
    monkeypatch.undo()
    monkeypatch.setattr(os, "write", full)
    assert "No space left on device" in refused(source, tmp_path / "c")
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in refused(source, tmp_path / "c")


def test_a_disk_without_room_is_found_out_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is begun that cannot end."""
    source = write_checkpoint(tmp_path / "a", [layer()])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert "0.0 GiB are free there" in refused(source, tmp_path / "b")


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of writing takes the unfinished folder away."""
    source = write_checkpoint(tmp_path / "a", [layer()])

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        permute_checkpoint(source, tmp_path / "b", permutation(OLD), progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path: Path) -> None:
    """A source that is being replaced does not become half a checkpoint."""
    source = write_checkpoint(tmp_path / "a", [layer()])

    def shrink(done: int, total: int) -> None:
        os.truncate(source / "model.safetensors", 400)

    with pytest.raises(InputError, match="became shorter while it was read"):
        permute_checkpoint(source, tmp_path / "b", permutation(OLD), progress=shrink)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
