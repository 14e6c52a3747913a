"""What ranks save together is what transformers saves of the whole model: the same names, the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loading_checks as checks
import numpy as np
import pytest
import torch
from ranks import Ranks
from safetensors.torch import load_file

from placement.errors import InputError
from placement.plan import EMPTY, Placement
from placement.runtime.checkpoint import load_checkpoint
from placement.runtime.families.generic import GenericFamily
from placement.runtime.families.registry import family_named, moe_layers_of, supported_families
from placement.runtime.parallel.loading import load_expert_parallel
from placement.runtime.parallel.mesh import Mesh
from placement.runtime.parallel.model import expert_parallel
from placement.runtime.parallel.saving import save_expert_parallel

UNKNOWN_LAYOUT = "mistral_large4_text"
FAMILIES = [
    name
    for name in supported_families()
    if not isinstance(family_named(name), GenericFamily) and not family_named(name).record_only
]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, each in one file only."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not set(tensors) & set(found)
        found |= tensors
    return found


def assert_same(actual: Path, expected: Path) -> None:
    """Both hold the same tensors, bit for bit, of the same types."""
    one, other = tensors_of(actual), tensors_of(expected)
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name].dtype != other[name].dtype] == []
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def alone(num_layers: int) -> Placement:
    """One device with all experts in another order, and an empty slot."""
    map_LS = np.tile([3, 1, EMPTY, 0, 2, 5, 4], (num_layers, 1))
    return Placement(
        physical_to_logical_map_LS=map_LS,
        device_of_slot_S=np.zeros(7, dtype=np.int64),
        num_experts=checks.EXPERTS,
        num_devices=1,
    )


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != UNKNOWN_LAYOUT])
def test_every_family_is_saved_as_transformers_does(family: str, tmp_path: Path) -> None:
    """From a model of another order of slots come the original's files, but for their number."""
    model = checks.saved(family, tmp_path / "whole")
    parallel = expert_parallel(model, alone(len(moe_layers_of(model))), Mesh.single())
    save_expert_parallel(parallel, tmp_path / "spread")
    assert_same(tmp_path / "spread", tmp_path / "whole")
    others = {path.name for path in (tmp_path / "whole").iterdir() if path.suffix == ".json"}
    assert {path.name for path in (tmp_path / "spread").iterdir() if path.suffix == ".json"} == {
        *others,
        "model.safetensors.index.json",
    }
    assert (tmp_path / "spread" / "config.json").read_text() == (
        tmp_path / "whole" / "config.json"
    ).read_text()


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_what_was_quantised_is_saved_plain(method: str, tmp_path: Path) -> None:
    """And loads as any checkpoint."""
    checks.saved_quantised(method, tmp_path / "quantised")
    parallel = load_expert_parallel(tmp_path / "quantised", alone(2), Mesh.single())
    save_expert_parallel(parallel, tmp_path / "plain")
    restored = load_checkpoint(tmp_path / "plain")
    again = expert_parallel(restored, alone(2), Mesh.single())
    expected, actual = parallel.model.state_dict(), again.model.state_dict()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


def test_a_layout_without_rules_is_refused(tmp_path: Path) -> None:
    """Nothing is left behind."""
    model = checks.saved(UNKNOWN_LAYOUT, tmp_path / "whole")
    parallel = expert_parallel(model, alone(2), Mesh.single())
    with pytest.raises(InputError, match="follows no known layout of experts; the model cannot be saved"):
        save_expert_parallel(parallel, tmp_path / "spread")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_ranks_save_what_they_loaded(family: str, tmp_path: Path, group_of: Callable[[int], Ranks]) -> None:
    """Three ranks, one without experts, replicas and empty slots: transformers reads the whole model."""
    model = checks.saved(family, tmp_path / "whole")
    group_of(3).run(checks.load_and_save, tmp_path / "whole", checks.uneven(2), tmp_path / "spread")
    assert_same(tmp_path / "spread", tmp_path / "whole")
    assert torch.equal(checks.run(load_checkpoint(tmp_path / "spread")), checks.run(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spread", "whole"]


def test_what_fsdp_has_sharded_is_saved_whole(tmp_path: Path, group_of: Callable[[int], Ranks]) -> None:
    """Experts by placement, the rest gathered."""
    checks.saved("mixtral", tmp_path / "whole")
    group_of(2).run(checks.save_sharded, tmp_path / "whole", checks.reversed_halves(2), tmp_path / "spread")
    assert_same(tmp_path / "spread", tmp_path / "whole")


@pytest.mark.parametrize("full", [0, 1])
def test_a_rank_without_room_leaves_nothing(
    full: int, tmp_path: Path, group_of: Callable[[int], Ranks]
) -> None:
    """Every rank fails, and no folder appears."""
    checks.saved("mixtral", tmp_path / "whole")
    outcomes = group_of(2).outcomes(
        checks.save_with_a_full_disk, tmp_path / "whole", checks.reversed_halves(2), tmp_path / "spread", full
    )
    assert [isinstance(one, InputError) for one in outcomes] == [True, True]
    assert all("cannot be written (No space left on device)" in str(one) for one in outcomes)
    assert str(outcomes[1 - full]).startswith(f"rank {full}: ")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_folder_that_ranks_do_not_share_is_refused(
    tmp_path: Path, group_of: Callable[[int], Ranks]
) -> None:
    """As with a disk of each node's own."""
    checks.saved("mixtral", tmp_path / "whole")
    outcomes = group_of(2).outcomes(
        checks.save_where_others_do_not_see,
        tmp_path / "whole",
        checks.reversed_halves(2),
        tmp_path / "spread",
    )
    assert [isinstance(one, InputError) for one in outcomes] == [True, True]
    assert all("choose a folder that all ranks share" in str(one) for one in outcomes)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_a_folder_in_use_is_refused_by_every_rank(tmp_path: Path, group_of: Callable[[int], Ranks]) -> None:
    """The folder that was read, and one that is not empty."""
    checks.saved("mixtral", tmp_path / "whole")
    for target, message in ((tmp_path / "whole", "overlaps the folder"), (tmp_path, "overlaps the folder")):
        outcomes = group_of(2).outcomes(
            checks.load_and_save, tmp_path / "whole", checks.reversed_halves(2), target
        )
        assert [isinstance(one, InputError) for one in outcomes] == [True, True]
        assert message in str(outcomes[1])
