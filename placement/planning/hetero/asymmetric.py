"""Asymmetric expert assignment (Asym-EA), Algorithm 1 of HeterMoE (arXiv 2504.03871), as printed.

Each expert device offloads whole chunks of experts to attention devices, layer by layer, whenever the idle
time that attention devices have gathered pays for a chunk. The print's T_squeeze multiplies the expert
devices' time with n1 (what an attention device acquires) and the attention devices' with n2 (what an expert
device offloads); by the meaning of the symbols they are swapped. Where M = N both are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["AsymmetricOffload", "asymmetric_offload"]

SLACK = 1e-9
"""Relative slack of a comparison of sums of times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AsymmetricOffload:
    """What Algorithm 1 answers.

    Parameters
    ----------
    offload_L
        Experts that each expert device offloads in each layer, o_l; None where the algorithm is undefined.
    reason
        Why it is undefined; empty where it is not.
    """

    offload_L: tuple[int, ...] | None
    reason: str = ""


def asymmetric_offload(
    *,
    num_layers: int,
    num_experts: int,
    num_attention: int,
    num_expert_devices: int,
    attention_s: float,
    attention_expert_s: float,
    expert_s: float,
    least_offload: int = 0,
    most_offload: int | None = None,
    as_printed: bool = True,
) -> AsymmetricOffload:
    """Run Algorithm 1.

    Parameters
    ----------
    num_experts, num_layers, num_attention, num_expert_devices
        n, L, M and N.
    attention_s, expert_s
        T_A^Attn and T_E^Exp: attention, and all experts, of one layer and micro-batch on their devices.
    attention_expert_s
        T_E^Attn: the same experts, as many per device as expert devices hold, on attention devices.
    least_offload
        n_min: experts, over all layers, that do not fit on an expert device.
    most_offload
        n_max: experts, over all layers, for which attention devices have room, per expert device; None for
        any number.
    as_printed
        Whether T_squeeze is as printed, or by the meaning of its symbols.

    Returns
    -------
    AsymmetricOffload
        With at most as many experts offloaded in a layer as an expert device holds, which the print leaves
        out.
    """
    n, M, N = num_experts, num_attention, num_expert_devices
    if M % N and N % M:
        return AsymmetricOffload(offload_L=None, reason=f"neither of {M} and {N} divides the other")
    if n % N:
        return AsymmetricOffload(offload_L=None, reason=f"{n} experts do not divide among {N} devices")
    n1 = max(1, N // M)
    n2 = n1 * M // N
    acquired, offloaded = (n2, n1) if as_printed else (n1, n2)
    squeeze = (expert_s * offloaded + attention_expert_s * acquired) * N / n
    gather = expert_s - attention_s
    if gather <= 0:
        if least_offload:
            return AsymmetricOffload(
                offload_L=None, reason="attention devices have no idle time, but experts must move"
            )
        return AsymmetricOffload(offload_L=(0,) * num_layers)
    most = num_layers * n // N if most_offload is None else most_offload
    if math.ceil(least_offload / n2) > most // n2:
        return AsymmetricOffload(offload_L=None, reason=f"{least_offload} experts must move, {most} may")
    alpha = min((most // n2) * squeeze / (num_layers * gather), 1.0)
    beta = max(math.ceil(least_offload / n2) * squeeze / (num_layers * gather), 1.0)
    gathered, offload = 0.0, []
    for _ in range(num_layers):
        gathered += alpha * beta * gather
        # Sums of thirds and the like must not miss a chunk by a rounding error.
        chunks = min(math.floor(gathered / squeeze * (1 + SLACK)), n // N // n2)
        gathered -= chunks * squeeze
        offload.append(chunks * n2)
    return AsymmetricOffload(offload_L=tuple(offload))
