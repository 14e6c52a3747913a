"""The rest of an expert-parallel model under data parallelism: its experts are left to the placement.

Each rank runs its own tokens, so that the parameters every rank holds (attention, routers, embeddings) are
trained as anywhere else: averaged by DistributedDataParallel, or sharded by FSDP2. Experts are on the ranks
that the placement names, and their gradients complete when backward returns: neither may touch them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from placement.errors import InputError
from placement.runtime.parallel.model import ParallelModel

__all__ = ["fully_shard_rest", "ignored_parameters", "parameter_groups", "wrap_ddp"]


def ignored_parameters(parallel: ParallelModel) -> set[nn.Parameter]:
    """Return what FSDP2 has to leave alone: ``fully_shard(part, ignored_params=...)``."""
    return set(parallel.expert_parameters().values())


def parameter_groups(parallel: ParallelModel) -> list[dict[str, Any]]:
    """Return the groups that an optimizer takes: experts apart from the rest.

    Under FSDP2 the rest are DTensors, and optimizers that update many tensors at once (``foreach``, the
    default on GPUs, and ``fused``) refuse to mix them with plain ones in one group.
    """
    experts = ignored_parameters(parallel)
    rest = [one for one in parallel.model.parameters() if one not in experts]
    return [{"params": rest}, {"params": list(parallel.expert_parameters().values())}]


def wrap_ddp(parallel: ParallelModel, **options: Any) -> nn.Module:
    """Return the model in a DistributedDataParallel that averages the gradients of all but the experts.

    The experts' gradients have to be of the mean loss as well (``Execution(gradients="mean")``, the default).
    `parallel` goes on to work, `clip_grad_norm_` included.

    Parameters
    ----------
    options
        Of DistributedDataParallel; the process group is that of the mesh.

    Raises
    ------
    InputError
        If the options name another process group.

    Returns
    -------
    torch.nn.Module
        What to run; the model itself where there is only one rank.
    """
    if options.get("process_group", parallel.mesh.group) is not parallel.mesh.group:
        raise InputError("the model's experts are spread over its mesh; leave out process_group")
    if parallel.mesh.group is None:
        return parallel.model
    # DistributedDataParallel offers no other way to leave parameters out.
    framework: Any = DistributedDataParallel  # untyped there
    framework._set_params_and_buffers_to_ignore_for_model(parallel.model, list(parallel.expert_parameters()))
    options["process_group"] = parallel.mesh.group
    wrapped: nn.Module = framework(parallel.model, **options)
    return wrapped


def fully_shard_rest(parallel: ParallelModel, parts: Iterable[nn.Module] = (), **options: Any) -> nn.Module:
    """Shard all but the experts over the ranks with FSDP2, in place; return the model.

    Give the optimizer `parameter_groups`.

    Parameters
    ----------
    parts
        Modules to gather one at a time, such as decoder layers; then the whole model.
    options
        Of `torch.distributed.fsdp.fully_shard`; ``mesh`` defaults to one of all ranks.
    """
    from torch.distributed.fsdp import fully_shard

    ignored = ignored_parameters(parallel)
    for part in (*parts, parallel.model):
        fully_shard(part, ignored_params=ignored, **options)
    return parallel.model
