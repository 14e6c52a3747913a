"""Records any model whose routers are modules: they are found by name, and their output by its shape.

Shape letters: T tokens of one forward pass, K top-k, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import attrgetter
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from placement.errors import InputError
from placement.runtime.families.protocol import MoELayer
from placement.runtime.families.unwrap import WRAPPER_NAMES, unwrapped

__all__ = ["GenericFamily"]

_NUM_EXPERTS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "n_experts",
    "config.num_moe_experts",
    "config.num_experts",
    "config.n_routed_experts",
    "config.num_local_experts",
)
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "k", "config.moe_router_topk", "config.num_experts_per_tok")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenericFamily:
    """Routers found by the names of their modules; for recording only.

    What a router returns may be, alone or in a tuple or mapping: integer ids ``[tokens, k]``; a bool map
    ``[tokens, experts]``; or scores of all experts ``[tokens, experts]``, of which the `top_k` largest are
    taken - right for plain top-k, wrong for routers that limit groups or add a bias afterwards.

    Parameters
    ----------
    router
        Patterns of module names, as the shell's (``layers.*.mlp.gate``); a pattern also matches the end of
        a name. Wrappers' names (``module``, ``_orig_mod`` ...) are left out first.
    read
        ``ids``, ``map`` or ``scores``; ``auto`` takes the first of these that is there, scores only where
        `top_k` is given here.
    output
        Position (or key) of that tensor in the router's output; `None` finds it.
    num_experts, top_k
        `None` asks each router's own attributes.
    sequence_first
        Whether activations are ``[places, rows, width]``, as in Megatron, not ``[rows, places, width]``.
    router_class
        Name of the routers' class; modules of other classes do not match. Empty for any.
    model_type
        What messages call it.
    """

    router: str | tuple[str, ...]
    read: Literal["auto", "ids", "map", "scores"] = "auto"
    output: int | str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    sequence_first: bool = False
    router_class: str = ""
    model_type: str = "generic"

    @property
    def record_only(self) -> str:
        """Why no placement can be applied."""
        return "only its routers are known, not its experts"

    @property
    def may_lack_experts(self) -> bool:
        """A map may hold fewer than top-k experts where capacity is limited."""
        return True

    def matches(self, model: nn.Module) -> bool:
        """Whether the model has routers like these."""
        return bool(self._routers(unwrapped(model)))

    def decoder(self, model: nn.Module) -> nn.Module:
        """Return the model itself, without wrappers."""
        return unwrapped(model)

    def moe_layers(self, model: nn.Module) -> tuple[MoELayer, ...]:
        """Routers in the order of the layer numbers in their names; see `ModelFamily.moe_layers`."""
        found = self._routers(unwrapped(model))
        if not found:
            self._no_match(model)
        numbered = [
            (_layer_number(name, router, place), name) for place, (name, router) in enumerate(found.items())
        ]
        twice = [name for index, name in numbered if [one for one, _ in numbered].count(index) > 1]
        if twice:
            raise InputError(
                f"two routers of one layer match: {', '.join(twice[:3])}; give a narrower pattern"
            )
        return tuple(self._layer(index, name, found[name]) for index, name in sorted(numbered))

    def _routers(self, model: nn.Module) -> dict[str, nn.Module]:
        """Routers by name; of a wrapper and what it wraps, the inner one."""
        return {name: part for name, part in _named(model) if self._matches(name, part)}

    def _matches(self, name: str, part: nn.Module) -> bool:
        if self.router_class and type(part).__name__ != self.router_class:
            return False
        patterns = (self.router,) if isinstance(self.router, str) else self.router
        return any(fnmatchcase(name, one) or fnmatchcase(name, f"*.{one}") for one in patterns)

    def _no_match(self, model: nn.Module) -> NoReturn:
        ends = ("gate", "router", "wg", "gating")
        likely = [name for name, _ in _named(unwrapped(model)) if name.rpartition(".")[2] in ends]
        hint = (
            f"modules named like routers: {', '.join(likely[:3])}"
            if likely
            else "no module is named like one"
        )
        of_class = f" of class {self.router_class}" if self.router_class else ""
        raise InputError(f"no module{of_class} of {type(model).__name__} matches {self.router!r}; {hint}")

    def _layer(self, index: int, name: str, router: nn.Module) -> MoELayer:
        weight = getattr(router, "weight", None)
        rows = len(weight) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
        num_experts = self.num_experts or _attribute(router, _NUM_EXPERTS) or rows
        top_k = self.top_k or _attribute(router, _TOP_K)
        for what, number in (("num_experts", num_experts), ("top_k", top_k)):
            if number is None:
                raise InputError(f"router {name} ({type(router).__name__}) does not tell its {what}; give it")
        return MoELayer(
            decoder_layer=index, router=router, experts=router, num_experts=num_experts or 0, top_k=top_k or 0
        )

    def read_top_k(self, router_output: Any, layer: MoELayer) -> torch.Tensor:
        """Top-k expert ids in whatever the router returned, ``[tokens, top-k]``."""
        found = _tensors(router_output, self.output)
        for kind in ("ids", "map", "scores") if self.read == "auto" else (self.read,):
            if kind == "scores" and self.read == "auto" and self.top_k is None:
                continue
            for tensor in found:
                if _is(kind, tensor, layer):
                    return _ids(kind, tensor.reshape(-1, tensor.shape[-1]), layer)
        shapes = ", ".join(f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in found)
        raise InputError(
            f"the router of layer {layer.decoder_layer} returned {shapes or 'no tensor'}: neither ids of "
            f"{layer.top_k} experts nor a map of {layer.num_experts}; give read= and output=, or top_k= "
            "where it returns scores"
        )

    def replace_top_k(
        self, router_output: Any, slot_TK: torch.Tensor, layer: MoELayer, num_slots: int
    ) -> NoReturn:
        """Refuse: see `record_only`."""
        raise InputError(f"no placement can be applied to a {self.model_type} model: {self.record_only}")


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules and their names without those of wrappers; what is wrapped comes after its wrapper."""
    for name, part in model.named_modules():
        yield ".".join(word for word in name.split(".") if word not in WRAPPER_NAMES), part


def _layer_number(name: str, router: nn.Module, otherwise: int) -> int:
    known = getattr(router, "layer_number", None)  # Megatron's, from 1, over all pipeline stages
    if type(known) is int and known > 0:
        return known - 1
    return next((int(word) for word in name.split(".") if word.isdecimal()), otherwise)


def _attribute(router: nn.Module, paths: Iterable[str]) -> int | None:
    for path in paths:
        try:
            value = attrgetter(path)(router)
        except AttributeError:
            continue
        if type(value) is int and value > 0:
            return value
    return None


def _tensors(output: Any, at: int | str | None) -> list[torch.Tensor]:
    """Tensors of at least two dimensions in a router's output, in order."""
    if at is not None:
        output = (output[at],)
    elif isinstance(output, Mapping):
        output = tuple(output.values())
    elif not isinstance(output, (tuple, list)):
        output = (output,)
    return [part for part in output if isinstance(part, torch.Tensor) and part.ndim >= 2]


def _is(kind: str, tensor: torch.Tensor, layer: MoELayer) -> bool:
    if kind == "scores":
        return tensor.is_floating_point() and tensor.shape[-1] == layer.num_experts
    if kind == "map":
        return tensor.dtype == torch.bool and tensor.shape[-1] == layer.num_experts
    integer = not tensor.is_floating_point() and not tensor.is_complex() and tensor.dtype != torch.bool
    return integer and tensor.shape[-1] == layer.top_k


def _ids(kind: str, tensor: torch.Tensor, layer: MoELayer) -> torch.Tensor:
    if kind == "scores":
        return tensor.topk(layer.top_k, dim=1).indices
    if kind == "ids":
        return tensor.masked_fill(tensor < 0, layer.num_experts)
    index_TK = tensor.to(torch.uint8).topk(layer.top_k, dim=1).indices
    return index_TK.masked_fill(tensor.sum(dim=1, keepdim=True) != layer.top_k, layer.num_experts)
