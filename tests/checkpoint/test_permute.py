"""Permuted checkpoints, element by element: what moves, what is renamed, what stays, and the way back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tensor_files import digests, permutation, read_tensors, write_checkpoint

from placement.checkpoint import permute_checkpoint, restore_checkpoint
from placement.checkpoint.copying import Copier
from placement.checkpoint.plan import Reorder
from placement.checkpoint.provenance import FILE_NAME
from placement.formats.permutation_file import read_permutation

Array = npt.NDArray[Any]
E = 4
OLD = [2, 0, 3, 1]
NEW = [1, 3, 0, 2]


def numbers(*shape: int, start: int = 0) -> Array:
    """Return an array whose elements all differ."""
    return np.arange(start, start + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def layer_tensors(layer: int, *, router_rows: int = E) -> dict[str, Array]:
    """Return one layer with a tensor per expert and matrix."""
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight": numbers(
            2, 3, start=100 * expert + 10 * i
        )
        for i, matrix in enumerate(("gate_proj", "up_proj", "down_proj"))
        for expert in range(E)
    }
    return {
        f"model.layers.{layer}.input_layernorm.weight": numbers(3),
        **experts,
        f"model.layers.{layer}.mlp.gate.weight": numbers(router_rows, 3, start=1000 + layer),
    }


def test_experts_take_new_names_and_the_router_new_rows(tmp_path: Path) -> None:
    """New expert n is old expert old[n]: its matrices, and its row of the router."""
    source = write_checkpoint(tmp_path / "a", [{"model.norm.weight": numbers(5), **layer_tensors(0)}])
    report = permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    before, after = read_tensors(source), load_file(tmp_path / "b" / "model.safetensors")
    for new, old in enumerate(OLD):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{{}}.{matrix}.weight"
            np.testing.assert_array_equal(after[name.format(new)], before[name.format(old)])
        router = "model.layers.0.mlp.gate.weight"
        np.testing.assert_array_equal(after[router][new], before[router][old])
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        np.testing.assert_array_equal(after[name], before[name])
    assert (report.num_tensors, report.num_renamed, report.num_reordered) == (15, 12, 1)
    assert report.moe_layer_ids == (0,)


@pytest.mark.parametrize(
    ("experts", "router"),
    [
        (
            "decoder.layers.0.mlp.experts.local_experts.{}.linear_fc1.weight",
            "decoder.layers.0.mlp.router.weight",
        ),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight{}", "decoder.layers.0.mlp.router.weight"),
        (
            "h.0.mlp.deepspeed_moe.experts.deepspeed_experts.{}.fc.weight",
            "h.0.mlp.deepspeed_moe.gate.wg.weight",
        ),
        ("layers.0.ffn.experts.{}.w1.weight", "layers.0.ffn.gate.weight"),
    ],
)
def test_numbers_of_experts_change_wherever_they_stand(tmp_path: Path, experts: str, router: str) -> None:
    """Megatron's two forms, DeepSpeed's, DeepSeek's own; bytes stay, names move."""
    tensors = {experts.format(e): numbers(2, 3, start=10 * e) for e in range(E)} | {router: numbers(E, 3)}
    source = write_checkpoint(tmp_path / "a", [tensors])
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    after = read_tensors(tmp_path / "b")
    assert set(after) == set(tensors)
    for new, old in enumerate(OLD):
        np.testing.assert_array_equal(after[experts.format(new)], tensors[experts.format(old)])
    np.testing.assert_array_equal(after[router], tensors[router][OLD])


STACKED: list[tuple[str, Array, Callable[[Array], Array]]] = [
    ("mlp.experts.gate_up_proj", numbers(E, 3, 2), lambda a: a[OLD]),
    ("mlp.experts.gate_up_proj_bias", numbers(E, 5), lambda a: a[OLD]),
    ("mlp.experts.down_proj_blocks", np.arange(E * 24, dtype=np.uint8).reshape(E, 3, 2, 4), lambda a: a[OLD]),
    ("mlp.experts.down_proj_scales", np.arange(E * 6, dtype=np.uint8).reshape(E, 3, 2), lambda a: a[OLD]),
    ("mlp.experts.down_proj.input_scale", numbers(1), lambda a: a),
    ("mlp.router.bias", numbers(E), lambda a: a[OLD]),
    ("mlp.moe_statics.e_score_correction_bias", numbers(1, E), lambda a: a[:, OLD]),
    ("mlp.experts.mlp.w1", numbers(E * 3, 2), lambda a: a.reshape(E, 3, 2)[OLD].reshape(a.shape)),
    ("mlp.experts.weight1", numbers(3, E * 2), lambda a: a.reshape(E, -1)[OLD].reshape(a.shape)),
    (
        "mlp.gate.tid2eid",
        np.array([[0, 1], [2, 3], [-1, 4]], np.int64),
        lambda a: np.array([[NEW[0], NEW[1]], [NEW[2], NEW[3]], [-1, 4]]),
    ),
    ("mlp.shared_experts.up_proj.weight", numbers(E, E), lambda a: a),
]


@pytest.mark.parametrize(("name", "array", "expected"), STACKED, ids=[row[0] for row in STACKED])
def test_tensors_of_all_experts(
    tmp_path: Path, name: str, array: Array, expected: Callable[[Array], Array]
) -> None:
    """Rows, columns, runs and ids follow the experts; what all experts share stays."""
    tensors = {f"model.layers.0.{name}": array, "model.layers.0.mlp.router.weight": numbers(E, 3)}
    tensors["model.layers.0.mlp.experts.up_proj"] = numbers(E, 2, 2)
    source = write_checkpoint(tmp_path / "a", [tensors])
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    after = read_tensors(tmp_path / "b")
    np.testing.assert_array_equal(after[f"model.layers.0.{name}"], expected(array))
    restore_checkpoint(tmp_path / "b", tmp_path / "c")
    assert digests(tmp_path / "c") == digests(source)


def test_rows_beyond_the_experts_stay(tmp_path: Path) -> None:
    """Experts without weights follow the others in the router, and keep their places."""
    source = write_checkpoint(
        tmp_path / "a", [layer_tensors(0, router_rows=E + 2)], config={"zero_expert_num": 2}
    )
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    name = "model.layers.0.mlp.gate.weight"
    np.testing.assert_array_equal(
        read_tensors(tmp_path / "b")[name], read_tensors(source)[name][[*OLD, E, E + 1]]
    )


def sharded(folder: Path) -> Path:
    """Write two layers over three files, the experts of a layer in different ones."""
    tensors = {**layer_tensors(1), **layer_tensors(2), "lm_head.weight": numbers(7)}
    names = sorted(tensors)
    files = [{name: tensors[name] for name in names[i::3]} for i in range(3)]
    return write_checkpoint(folder, files, config={"num_hidden_layers": 3})


def test_shards_keep_their_bytes_and_the_index_finds_the_names(tmp_path: Path) -> None:
    """Files change in their headers alone (and router rows); every name is where the index says."""
    source = sharded(tmp_path / "a")
    report = permute_checkpoint(source, tmp_path / "b", permutation(OLD, [3, 2, 1, 0], layers=[1, 2]))
    before, after = read_tensors(source), read_tensors(tmp_path / "b")
    for layer, old_of_new in ((1, OLD), (2, [3, 2, 1, 0])):
        for new, old in enumerate(old_of_new):
            name = f"model.layers.{layer}.mlp.experts.{{}}.up_proj.weight"
            np.testing.assert_array_equal(after[name.format(new)], before[name.format(old)])
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "b" / file)
    assert index["metadata"] == {"total_size": 1}
    assert list(index["weight_map"]) == sorted(before)
    assert (report.num_files, report.num_renamed, report.num_reordered) == (3, 24, 2)


def test_undoing_restores_the_folder_byte_for_byte(tmp_path: Path) -> None:
    """The inverse permutation gives every file back, and takes its own away."""
    source = sharded(tmp_path / "a")
    (source / "tokenizer").mkdir()
    (source / "tokenizer" / "merges.txt").write_text("a b")
    given_ = permutation(OLD, [3, 2, 1, 0], layers=[1, 2], num_devices=2)
    permute_checkpoint(source, tmp_path / "b", given_)
    assert digests(tmp_path / "b") != digests(source)
    permute_checkpoint(tmp_path / "b", tmp_path / "c", given_.inverse())
    assert digests(tmp_path / "c") == digests(source)
    restore_checkpoint(tmp_path / "b", tmp_path / "d")
    assert digests(tmp_path / "d") == digests(source)


def test_permutations_add_up(tmp_path: Path) -> None:
    """The file beside the weights leads from the original to what is there."""
    source = write_checkpoint(tmp_path / "a", [layer_tensors(0)])
    first, second = permutation(OLD, num_devices=2), permutation([1, 0, 3, 2], num_devices=2)
    assert not permute_checkpoint(source, tmp_path / "b", first).was_permuted
    assert permute_checkpoint(tmp_path / "b", tmp_path / "c", second).was_permuted
    total = read_permutation(tmp_path / "c" / FILE_NAME)
    assert total.old_expert_of_new_LE.tolist() == [[OLD[1], OLD[0], OLD[3], OLD[2]]]
    permute_checkpoint(source, tmp_path / "d", total)
    assert digests(tmp_path / "d") == digests(tmp_path / "c")


def test_nothing_to_do_copies_the_folder(tmp_path: Path) -> None:
    """The identity leaves no trace."""
    source = sharded(tmp_path / "a")
    identity = [0, 1, 2, 3]
    report = permute_checkpoint(source, tmp_path / "b", permutation(identity, identity, layers=[1, 2]))
    assert digests(tmp_path / "b") == digests(source)
    assert (report.num_renamed, report.num_reordered) == (0, 0)


def test_other_copies_of_the_weights_stay_behind(tmp_path: Path) -> None:
    """An engine that read them would find experts under their old numbers; the report names them."""
    source = write_checkpoint(tmp_path / "a", [layer_tensors(0)])
    for name in ("consolidated.safetensors", "pytorch_model.bin", ".cache", "pytorch_model.bin.index.json"):
        (source / name).write_bytes(b"?")
    for folder in ("original", ".git"):
        (source / folder).mkdir()
        (source / folder / "model.pth").write_bytes(b"?")
    (source / "tokenizer.json").write_text("{}")
    report = permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    assert report.left_out == (
        ".cache",
        ".git/",
        "consolidated.safetensors",
        "original/model.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    assert set(digests(tmp_path / "b")) == {"config.json", FILE_NAME, "model.safetensors", "tokenizer.json"}


def test_linked_files_are_copied(tmp_path: Path) -> None:
    """A download cache holds links; the new folder holds files."""
    source = write_checkpoint(tmp_path / "blobs", [layer_tensors(0)])
    (tmp_path / "snapshot").mkdir()
    for path in source.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    permute_checkpoint(tmp_path / "snapshot", tmp_path / "c", permutation(OLD))
    assert digests(tmp_path / "c") == digests(tmp_path / "b")
    assert not any(path.is_symlink() for path in (tmp_path / "c").iterdir())


def test_layers_for_speculative_decoding_stay(tmp_path: Path) -> None:
    """Behind the decoder's layers, or in a stack of their own: router and experts together as they were."""
    mtp = {name.replace("model.layers.9", "mtp.layers.0"): t for name, t in layer_tensors(9).items()}
    source = write_checkpoint(
        tmp_path / "a",
        [{**layer_tensors(0), **layer_tensors(1), **mtp}],
        config={"num_hidden_layers": 1},
    )
    report = permute_checkpoint(source, tmp_path / "b", permutation(OLD))
    before, after = read_tensors(source), read_tensors(tmp_path / "b")
    for name in [*layer_tensors(1), *mtp]:
        np.testing.assert_array_equal(after[name], before[name])
    assert report.untouched == ("model.layers.1", "mtp.layers")


def test_one_of_several_stacks_can_be_meant(tmp_path: Path) -> None:
    """Two decoders with experts: the one that is named is permuted."""
    talker = {f"talker.{name}": t for name, t in layer_tensors(0).items()}
    source = write_checkpoint(tmp_path / "a", [{**layer_tensors(0), **talker}])
    report = permute_checkpoint(source, tmp_path / "b", permutation(OLD), stack="talker.model.layers")
    after = read_tensors(tmp_path / "b")
    router = "model.layers.0.mlp.gate.weight"
    np.testing.assert_array_equal(after[router], talker[f"talker.{router}"])
    np.testing.assert_array_equal(after[f"talker.{router}"], talker[f"talker.{router}"][OLD])
    assert report.untouched == ("model.layers",)


def test_stacks_are_permuted_one_after_the_other(tmp_path: Path) -> None:
    """Each has its own account of what was done, and its own way back."""
    talker = {f"talker.{name}": t for name, t in layer_tensors(0).items()}
    source = write_checkpoint(tmp_path / "a", [{**layer_tensors(0), **talker}])
    first, second = "model.layers", "talker.model.layers"
    permute_checkpoint(source, tmp_path / "b", permutation(OLD), stack=first)
    permute_checkpoint(tmp_path / "b", tmp_path / "c", permutation([3, 2, 1, 0]), stack=second)
    after, router = read_tensors(tmp_path / "c"), "model.layers.0.mlp.gate.weight"
    np.testing.assert_array_equal(after[router], talker[f"talker.{router}"][OLD])
    np.testing.assert_array_equal(after[f"talker.{router}"], talker[f"talker.{router}"][[3, 2, 1, 0]])
    restore_checkpoint(tmp_path / "c", tmp_path / "d", stack=first)
    restore_checkpoint(tmp_path / "d", tmp_path / "e", stack=second)
    assert digests(tmp_path / "e") == digests(source)


def test_an_index_keeps_its_line_ends_and_other_members(tmp_path: Path) -> None:
    """Only the files of names change in it."""
    source = sharded(tmp_path / "a")
    index = source / "model.safetensors.index.json"
    index.write_bytes(
        index.read_bytes().replace(b"\n}\n", b',\n"more": [1, {"weight_map": 2}] }').replace(b"\n", b"\r\n")
    )
    permute_checkpoint(source, tmp_path / "b", permutation(OLD, OLD, layers=[1, 2]))
    after = (tmp_path / "b" / index.name).read_bytes()
    assert len(after) == len(index.read_bytes())
    assert after.count(b"\r\n") == index.read_bytes().count(b"\r\n") > 20
    restore_checkpoint(tmp_path / "b", tmp_path / "c")
    assert digests(tmp_path / "c") == digests(source)


def test_progress_counts_all_bytes(tmp_path: Path) -> None:
    """It grows and ends at the total."""
    seen: list[tuple[int, int]] = []
    permute_checkpoint(
        sharded(tmp_path / "a"),
        tmp_path / "b",
        permutation(OLD, OLD, layers=[1, 2]),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


@given(
    outer=st.integers(1, 5),
    inner=st.integers(1, 40),
    order=st.permutations(range(6)),
    buffer_bytes=st.integers(1, 400),
    in_kernel=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_rows_are_reordered_through_any_buffer(
    tmp_path_factory: Any, outer: int, inner: int, order: list[int], buffer_bytes: int, in_kernel: bool
) -> None:
    """However small the buffer is, the middle axis comes out in the new order."""
    array = np.random.default_rng(0).integers(0, 256, (outer, 6, inner), dtype=np.uint8)
    folder = tmp_path_factory.mktemp("rows")
    (folder / "in").write_bytes(b"head" + array.tobytes())
    steps: list[int] = []
    with (folder / "in").open("rb") as source, (folder / "out").open("wb", buffering=0) as target:
        copier = Copier(source.fileno(), target.fileno(), advance=steps.append, buffer_bytes=buffer_bytes)
        copier._in_kernel = in_kernel
        copier.reorder(4, Reorder(old_of_new_E=np.array(order), outer=outer, inner_bytes=inner))
    assert (folder / "out").read_bytes() == array[:, order].tobytes()
    assert sum(steps) == array.size


def test_no_read_is_larger_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by the buffer, not by a tensor or a file."""
    (tmp_path / "in").write_bytes(bytes(range(256)) * 40)
    sizes: list[int] = []
    pread = os.pread

    def watched(descriptor: int, count: int, begin: int) -> bytes:
        sizes.append(count)
        return pread(descriptor, count, begin)

    monkeypatch.setattr(os, "pread", watched)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb", buffering=0) as target:
        copier = Copier(source.fileno(), target.fileno(), advance=lambda done: None, buffer_bytes=1000)
        copier._in_kernel = False
        copier.copy(0, 256 * 20)
        copier.reorder(256 * 20, Reorder(old_of_new_E=np.array([1, 0]), outer=1, inner_bytes=256 * 10))
    content = bytes(range(256)) * 10
    assert (tmp_path / "out").read_bytes() == content * 4
    assert max(sizes) == 1000


def test_the_copy_falls_back_where_the_kernel_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between some file systems bytes must pass through the process; the result is the same."""
    source = sharded(tmp_path / "a")
    given_ = permutation(OLD, OLD, layers=[1, 2])
    permute_checkpoint(source, tmp_path / "b", given_)

    def refused(*args: object, **kwargs: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refused)
    permute_checkpoint(source, tmp_path / "c", given_)
    monkeypatch.setattr(os, "copy_file_range", lambda *args, **kwargs: 0)
    permute_checkpoint(source, tmp_path / "d", given_)
    assert digests(tmp_path / "b") == digests(tmp_path / "c") == digests(tmp_path / "d")
