"""What belongs to one expert: weights, gradients and the state of common optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.migration.rows import layer_rows
from placement.runtime.migration.staging import Staging


def trained(optimizer_type: type[torch.optim.Optimizer], parameter: nn.Parameter) -> torch.optim.Optimizer:
    optimizer = optimizer_type([parameter], lr=0.1)  # type: ignore[call-arg]
    parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("optimizer_type", "names"),
    [
        (torch.optim.AdamW, ["up", "up.exp_avg", "up.exp_avg_sq"]),
        (torch.optim.RMSprop, ["up", "up.square_avg"]),
        (torch.optim.Adagrad, ["up", "up.sum"]),
        (torch.optim.SGD, ["up"]),
        (torch.optim.Adafactor, ["up", "up.col_var", "up.row_var"]),
    ],
)
def test_state_of_common_optimizers(optimizer_type: type[torch.optim.Optimizer], names: list[str]) -> None:
    """Row-aligned tensors move, step counts stay."""
    parameter = nn.Parameter(torch.randn(3, 4, 5))
    rows = layer_rows({"up": parameter}, optimizers=[trained(optimizer_type, parameter)])
    assert list(rows.tensor_bytes) == names
    with_gradient = layer_rows({"up": parameter}, gradients=True)
    assert with_gradient.tensor_bytes == {"up": 80, "up.grad": 80}


def test_a_row_is_copied_whole() -> None:
    """One row's bytes, through a waiting buffer, into another row; the third stays."""
    up = nn.Parameter(torch.arange(3 * 6, dtype=torch.float32).reshape(3, 2, 3))
    bias = nn.Parameter(torch.arange(3, dtype=torch.bfloat16).reshape(3, 1))
    before = up.detach().clone()
    rows = layer_rows({"up": up, "bias": bias}, gradients=True)
    (buffer,) = Staging(torch.device("cpu")).take([rows.staged_bytes])
    parts = rows.parts(buffer)
    assert (rows.staged_bytes, [len(part) for part in parts]) == (2 * 32 + 2 * 16, [24, 24, 2, 2])
    version = rows.version
    with torch.no_grad():
        rows.read(2, parts)
        rows.write(0, parts)
        rows.clear(2)
    assert torch.equal(up, torch.stack([before[2], before[1], torch.zeros(2, 3)]))
    assert bias.flatten().tolist() == [2, 1, 0]
    assert rows.version > version


def test_a_row_in_another_order_of_memory() -> None:
    """A transposed tensor's rows are taken as they lie in memory."""
    transposed = nn.Parameter(torch.randn(3, 4, 5).transpose(1, 2))
    rows = layer_rows({"down": transposed})
    before = transposed.detach().clone()
    with torch.no_grad():
        rows.write(1, rows.row(0))
    assert torch.equal(transposed[1], before[0])
    assert torch.equal(transposed[2], before[2])
    assert rows.layout != layer_rows({"down": nn.Parameter(before.contiguous())}).layout


def test_a_device_without_slots() -> None:
    """No rows, but the same layout as everybody."""
    empty, full = (layer_rows({"up": nn.Parameter(torch.zeros(size, 4, 5))}) for size in (0, 2))
    assert empty.layout == full.layout
    assert empty.staged_bytes == full.staged_bytes == 80


def test_what_cannot_be_told_apart_is_named() -> None:
    """State over all experts, sharded tensors, gaps."""
    parameter = nn.Parameter(torch.randn(3, 4, 5))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["preconditioner"] = torch.zeros(3, 3)
    with pytest.raises(
        InputError, match=r"preconditioner of up in the state of SGD is \[3, 3\] for a .*layer 7"
    ):
        layer_rows({"up": parameter}, optimizers=[optimizer], where="the experts of decoder layer 7")
    with pytest.raises(InputError, match="down of the experts has gaps within its rows"):
        layer_rows({"down": nn.Parameter(torch.randn(3, 4, 6)[:, :, ::2])})
    with pytest.raises(InputError, match="up of the experts is a Sharded"):
        layer_rows({"up": nn.Parameter(torch.randn(3, 4).as_subclass(Sharded))})


class Sharded(torch.Tensor):
    """Stands for a tensor of which this process has a part only."""
