"""The policies compared: how each is fitted, with how many slots, and how it splits tokens over replicas."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CONTIGUOUS", "EPLB", "POLICIES", "Policy", "policies_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to place experts.

    Parameters
    ----------
    name
        Unique; ``+`` marks spare slots, ``/lp`` the split by linear programme, ``@`` the transport whose
        calibration it was fitted with.
    solver
        A solver's name.
    objective
        What it minimises, where it minimises anything.
    spare
        Whether it has the instance's spare slots.
    split
        How the runtime splits an expert's tokens over its replicas.
    transport
        Link whose calibration prices it; empty where no price is asked for.
    """

    name: str
    solver: str
    objective: str = "balance"
    spare: bool = False
    split: str = "even"
    transport: str = ""


CONTIGUOUS, EPLB = "contiguous", "eplb"


def _joint(transport: str) -> tuple[Policy, ...]:
    def policy(name: str, *, spare: bool, split: str = "even") -> Policy:
        return Policy(
            name=f"{name}@{transport}",
            solver="auto",
            objective="step-time",
            spare=spare,
            split=split,
            transport=transport,
        )

    return (
        policy("joint", spare=False),
        policy("joint+", spare=True),
        policy("joint+/lp", spare=True, split="lp"),
    )


POLICIES = (
    Policy(name=CONTIGUOUS, solver="contiguous"),
    Policy(name=EPLB, solver="eplb"),
    Policy(name="balance", solver="auto"),
    Policy(name="eplb+", solver="eplb", spare=True),
    Policy(name="balance+", solver="auto", spare=True),
    Policy(name="balance+/lp", solver="auto", spare=True, split="lp"),
    *_joint("nvlink"),
    *_joint("shm"),
)


def policies_of(transport: str) -> tuple[Policy, ...]:
    """Return the policies that are compared on a link, those fitted for another one left out."""
    return tuple(policy for policy in POLICIES if policy.transport in ("", transport))
