"""The integer program of one layer: which experts each data centre prefetches, and who serves the rest.

For data centre c and expert e homed at h: y = 1 if c prefetches e, z the part of c's tokens that go home and
x[d] the part that another holder d serves, ``y + z + sum x = 1`` and ``x[c, e, d] <= y[d, e]``; all are
whole. The objective is the cost of `traffic`, side by side and pass by pass; with latency, ``v >= y`` and
``w >= z, x`` count the peers.

Shape letters: C data centres, E experts, P passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.planning.cross_dc.even import pass_weights
from placement.planning.cross_dc.traffic import CrossTraffic, Decision
from placement.solvers.milp import MilpBuilder, MilpResult, solve_milp

__all__ = ["LayerProgram", "solve_layer_program"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerProgram:
    """What the program gave.

    Parameters
    ----------
    decision
        Its best decision; None where there was none within the limits.
    bound_s
        Its lower bound of the layer's time, seconds; minus infinity where unknown.
    """

    decision: Decision | None
    bound_s: float


class _Program:
    """Variables and rows of one layer."""

    def __init__(self, layer: CrossTraffic) -> None:
        self.layer = layer
        self.builder = MilpBuilder()
        self.centres, self.experts = layer.num_centres, layer.num_experts
        self.home_E = layer.home_LE[0]
        self.tokens_CE = layer.tokens_LCE[0]
        self.at_home_CE = np.arange(self.centres)[:, None] == self.home_E
        self._add_variables()
        self._add_assignment()
        self._add_times()

    def _add_variables(self) -> None:
        builder, centres, experts = self.builder, self.centres, self.experts
        weights = pass_weights(self.layer.training)
        self.time = builder.add_variables(1, objective=1.0)
        pre_s = float(self.layer.pre_expert_s_L[0])
        least_PC = np.repeat(np.array(weights)[:, None] * pre_s, centres, axis=1)
        self.ready_PC = builder.add_variables((len(weights), centres), lower=least_PC)
        self.exchange_C = builder.add_variables(centres)
        self.copy_CE = builder.add_variables((centres, experts), upper=~self.at_home_CE, integer=True)
        # Part of the tokens of the first that the second serves: home and other holders, never itself.
        itself = np.eye(centres, dtype=np.bool_)[:, :, None] | self.at_home_CE[:, None, :]
        self.serve_CCE = builder.add_variables((centres, centres, experts), upper=~itself, integer=True)
        if self.layer.latency_s > 0:
            self.talks_CC = builder.add_variables((centres, centres), upper=1.0)
            self.fetches_CC = builder.add_variables((centres, centres), upper=1.0)

    def _add_assignment(self) -> None:
        builder, centres, experts = self.builder, self.centres, self.experts
        remote_c, remote_e = np.nonzero(~self.at_home_CE)
        served = self.serve_CCE[remote_c, :, remote_e]
        builder.add_rows(
            (self.copy_CE[remote_c, remote_e][:, None], 1.0), (served, 1.0), lower=1.0, upper=1.0
        )
        asker, server, expert = np.nonzero(
            ~self.at_home_CE[:, None, :]
            & ~self.at_home_CE[None, :, :]
            & ~np.eye(centres, dtype=np.bool_)[:, :, None]
        )
        if asker.size:
            builder.add_rows(
                (self.serve_CCE[asker, server, expert][:, None], 1.0),
                (self.copy_CE[server, expert][:, None], -1.0),
                upper=0.0,
            )
        if self.layer.most_copies < experts:
            builder.add_rows((self.copy_CE, 1.0), upper=float(self.layer.most_copies))

    def _add_times(self) -> None:
        layer, builder = self.layer, self.builder
        passes = self.ready_PC.shape[0]
        for c in range(self.centres):
            builder.add_rows(
                (self.time, 1.0),
                (self.ready_PC[:, c], -1.0),
                (self.exchange_C[c : c + 1], -2.0 * passes),
                lower=0.0,
            )
            handed = self.copy_CE[:, self.home_E == c].ravel()
            for copies, axis in ((self.copy_CE[c], 0), (handed, 1)):
                for ready in self.ready_PC[:, c]:
                    self._side(ready, copies, float(layer.copy_s_C[c]), "fetches_CC", c, axis)
            token_s_CE = float(layer.token_s_C[c]) * self.tokens_CE
            sent_N = np.tile(token_s_CE[c], self.centres)
            exchange = self.exchange_C[c]
            self._side(exchange, self.serve_CCE[c].ravel(), sent_N, "talks_CC", c, 0)
            self._side(exchange, self.serve_CCE[:, c].ravel(), token_s_CE.ravel(), "talks_CC", c, 1)
        if layer.latency_s > 0:
            self._add_peers()

    def _side(
        self, total: np.int64, columns: IntArray, seconds: npt.ArrayLike, peers: str, centre: int, axis: int
    ) -> None:
        """Let a total be at least one side of a link: what travels, and a latency for each peer."""
        if not columns.size:
            return
        terms: list[tuple[npt.ArrayLike, npt.ArrayLike]] = [
            (np.array([total]), 1.0),
            (columns, -np.asarray(seconds)),
        ]
        if self.layer.latency_s > 0:
            peer_CC = getattr(self, peers)
            row = peer_CC[centre] if axis == 0 else peer_CC[:, centre]
            terms.append((row, -self.layer.latency_s))
        self.builder.add_rows(*terms, lower=0.0)

    def _add_peers(self) -> None:
        asker, server, expert = np.nonzero(
            (self.tokens_CE > 0)[:, None, :]
            & ~np.eye(self.centres, dtype=np.bool_)[:, :, None]
            & ~self.at_home_CE[:, None, :]
        )
        self._at_least(self.talks_CC[asker, server], self.serve_CCE[asker, server, expert])
        centre, expert = np.nonzero(~self.at_home_CE)
        self._at_least(self.fetches_CC[centre, self.home_E[expert]], self.copy_CE[centre, expert])

    def _at_least(self, more: IntArray, less: IntArray) -> None:
        if more.size:
            self.builder.add_rows((more[:, None], 1.0), (less[:, None], -1.0), lower=0.0)

    def start_V(self, decision: Decision) -> npt.NDArray[np.float64]:
        """Return a decision as a point; times are left to the solver's own completion."""
        start_V = np.zeros(self.builder.build().num_variables)
        start_V[self.copy_CE] = decision.copy_LCE[0]
        server = np.arange(self.centres)[None, :, None]
        itself = np.arange(self.centres)[:, None, None] == server
        start_V[self.serve_CCE] = (decision.serve_LCE[0][:, None, :] == server) & ~itself
        return start_V

    def decision(self, value_V: npt.NDArray[np.float64]) -> Decision:
        """Return the decision of a point: a copy at hand always serves its own data centre."""
        copy_CE = (value_V[self.copy_CE] > 0.5) & ~self.at_home_CE
        serve_CE = value_V[self.serve_CCE].argmax(axis=1)
        itself = np.arange(self.centres)[:, None]
        serve_CE = np.where(copy_CE | self.at_home_CE, itself, serve_CE)
        return Decision(serve_LCE=serve_CE[None], copy_LCE=copy_CE[None])


def solve_layer_program(
    layer: CrossTraffic, *, start: Decision, node_limit: int, relative_gap: float
) -> LayerProgram:
    """Solve one layer's program to a gap or a number of nodes.

    Parameters
    ----------
    layer
        Traffic of one layer (`CrossTraffic.layer`).
    start
        A decision to start from.
    node_limit, relative_gap
        Where to end.
    """
    program = _Program(layer)
    result: MilpResult = solve_milp(
        program.builder.build(start_V=program.start_V(start)),
        node_limit=node_limit,
        relative_gap=relative_gap,
        in_process=True,
    )
    found = None if result.value_V is None else program.decision(result.value_V)
    return LayerProgram(decision=found, bound_s=result.bound)
