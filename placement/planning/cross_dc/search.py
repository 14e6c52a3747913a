"""Local search on one layer: relieve the data centre that takes longest, one move at a time.

A move fetches a copy, drops one that serves nobody else, or sends one data centre's tokens for an expert to
another holder. It touches three data centres at most; the move is taken whose slowest touched data centre is
fastest, if that is faster than the slowest was. The sorted times fall with every move, so the search ends.

Shape letters: C data centres (twice: who asks, who serves), E experts, M moves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.planning.cross_dc.even import pass_weights
from placement.planning.cross_dc.traffic import CrossTraffic, Decision, link_use

__all__ = ["MOST_MOVES", "improved"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOST_MOVES = 2000
"""Moves after which the search of one layer ends; sample traces need at most a few hundred."""

LEAST_GAIN = 1e-9
"""Relative gain below which a move counts as rounding."""

# Rows of what a move changes in a data centre's link: copies and tokens, each in and out, and their messages.
_COPY_IN, _COPY_OUT, _TOKEN_IN, _TOKEN_OUT = range(4)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Moves:
    """Moves of tokens of `centre_M` for `expert_M` from one server to another.

    `copies_M` is 1 where the asker fetches a copy, -1 where it drops one, 0 where tokens are sent elsewhere.
    """

    centre_M: IntArray
    expert_M: IntArray
    server_M: IntArray
    copies_M: IntArray

    @property
    def count(self) -> int:
        return int(self.centre_M.size)

    @classmethod
    def of(cls, centre: npt.ArrayLike, expert: npt.ArrayLike, server: npt.ArrayLike, copies: int) -> _Moves:
        arrays = np.broadcast_arrays(centre, expert, server, copies)
        return cls(**dict(zip(("centre_M", "expert_M", "server_M", "copies_M"), arrays, strict=True)))

    @classmethod
    def joined(cls, parts: list[_Moves]) -> _Moves:
        return cls(
            **{
                name: np.concatenate([getattr(part, name) for part in parts])
                for name in ("centre_M", "expert_M", "server_M", "copies_M")
            }
        )


class _State:
    """One layer's decision with the loads of all links, kept up to date."""

    def __init__(self, traffic: CrossTraffic, decision: Decision) -> None:
        self.traffic = traffic
        self.tokens_CE = traffic.tokens_LCE[0]
        self.home_E = traffic.home_LE[0]
        self.serve_CE = decision.serve_LCE[0].copy()
        self.copy_CE = decision.copy_LCE[0].copy()
        self.centre_C = np.arange(traffic.num_centres)
        use = link_use(traffic, decision)
        self.copies_CC = use.copies_LCC[0].copy()
        self.senders_CC = np.zeros_like(self.copies_CC)
        centre, expert = np.nonzero(self.tokens_CE > 0)
        server = self.serve_CE[centre, expert]
        np.add.at(self.senders_CC, (centre, server), centre != server)
        tokens_CC = use.tokens_LCC[0]
        self.amount_4C = np.array(
            [self.copies_CC.sum(1), self.copies_CC.sum(0), tokens_CC.sum(0), tokens_CC.sum(1)]
        )
        copying, sending = self.copies_CC > 0, self.senders_CC > 0
        self.peers_4C = np.array(
            [copying.sum(1), copying.sum(0), sending.sum(0), sending.sum(1)], dtype=float
        )
        # Other data centres' cells that each holder serves: what keeps a copy from being dropped.
        self.guests_CE = np.zeros(self.tokens_CE.shape, dtype=np.int64)
        asker, expert = np.nonzero(self.serve_CE != self.centre_C[:, None])
        np.add.at(self.guests_CE, (self.serve_CE[asker, expert], expert), 1)

    def time(self, centres: IntArray | slice, amount: FloatArray, peers: FloatArray) -> FloatArray:
        """Return the times of data centres from loads ``[4, ...]``."""
        traffic = self.traffic
        copy_s, token_s = traffic.copy_s_C[centres], traffic.token_s_C[centres]
        copies = amount[:2] * copy_s + traffic.latency_s * peers[:2]
        tokens = amount[2:] * token_s + traffic.latency_s * peers[2:]
        gather, exchange = copies.max(axis=0), tokens.max(axis=0)
        weights = pass_weights(traffic.training)
        ready = sum(np.maximum(weight * traffic.pre_expert_s_L[0], gather) for weight in weights)
        return np.asarray(ready + 2 * len(weights) * exchange)

    def all_times(self) -> FloatArray:
        return self.time(slice(None), self.amount_4C, self.peers_4C)

    def moves_around(self, slow: int) -> _Moves:
        """Return the moves that change what the slow data centre fetches, sends, serves or hands out."""
        room_C = self.copy_CE.sum(axis=1) < self.traffic.most_copies
        parts: list[_Moves] = []
        mine = self.home_E == slow
        if room_C[slow]:
            remote = np.nonzero(self.serve_CE[slow] != slow)[0]
            parts.append(_Moves.of(slow, remote, slow, 1))
        idle = np.nonzero(self.copy_CE[slow] & (self.guests_CE[slow] == 0))[0]
        parts.append(_Moves.of(slow, idle, self.home_E[idle], -1))
        asker, expert = np.nonzero((self.serve_CE == slow) & (self.centre_C[:, None] != slow))
        with_room = room_C[asker]
        parts.append(_Moves.of(asker[with_room], expert[with_room], asker[with_room], 1))
        owner, owned = np.nonzero(self.copy_CE & mine & (self.guests_CE == 0))
        parts.append(_Moves.of(owner, owned, slow, -1))
        parts.append(self._elsewhere(asker, expert))
        return _Moves.joined(parts)

    def _elsewhere(self, asker_M: IntArray, expert_M: IntArray) -> _Moves:
        """Return the moves of tokens to the data centre that holds a copy and is fastest now."""
        time_C = self.all_times()
        holders_CE = self.copy_CE | (self.centre_C[:, None] == self.home_E)
        best_E = np.where(holders_CE, time_C[:, None], np.inf).argmin(axis=0)
        server_M = best_E[expert_M]
        new = server_M != self.serve_CE[asker_M, expert_M]
        return _Moves.of(asker_M[new], expert_M[new], server_M[new], 0)

    def outcome_M(self, moves: _Moves) -> FloatArray:
        """Return the time of the slowest touched data centre after each move."""
        touched, amount, peers = self._changed(moves)
        return np.asarray(self.time(touched, amount, peers).max(axis=0))

    def _changed(self, moves: _Moves) -> tuple[IntArray, FloatArray, FloatArray]:
        """Return who is touched ``[4, M]`` and their new loads ``[4, 4, M]``.

        The touched are asker, old server, new server and home. Where two of them are one data centre, both
        entries hold its whole change.
        """
        c, e = moves.centre_M, moves.expert_M
        old, new, home = self.serve_CE[c, e], moves.server_M, self.home_E[e]
        tokens = self.tokens_CE[c, e]
        touched = np.stack([c, old, new, home])
        leaves, arrives = old != c, new != c
        some = tokens > 0
        last = leaves & some & (self.senders_CC[c, old] == 1)
        first = arrives & some & (self.senders_CC[c, new] == 0)
        copies = moves.copies_M
        opened = (copies == 1) & (self.copies_CC[c, home] == 0)
        closed = (copies == -1) & (self.copies_CC[c, home] == 1)
        talks = opened.astype(float) - closed
        amount = self.amount_4C[:, touched].astype(float)
        peers = self.peers_4C[:, touched].astype(float)
        for place, share in enumerate((c, old, new, home)):
            amount[_COPY_IN, place] += np.where(share == c, copies, 0)
            peers[_COPY_IN, place] += np.where(share == c, talks, 0)
            amount[_COPY_OUT, place] += np.where(share == home, copies, 0)
            peers[_COPY_OUT, place] += np.where(share == home, talks, 0)
            amount[_TOKEN_OUT, place] += np.where(share == c, tokens * (arrives.astype(float) - leaves), 0)
            peers[_TOKEN_OUT, place] += np.where(share == c, first.astype(float) - last, 0)
            amount[_TOKEN_IN, place] += np.where((share == new) & arrives, tokens, 0)
            amount[_TOKEN_IN, place] -= np.where((share == old) & leaves, tokens, 0)
            peers[_TOKEN_IN, place] += np.where(share == new, first, 0)
            peers[_TOKEN_IN, place] -= np.where(share == old, last, 0)
        return touched, amount, peers

    def apply(self, moves: _Moves, which: int) -> None:
        one = _Moves(
            centre_M=moves.centre_M[which : which + 1],
            expert_M=moves.expert_M[which : which + 1],
            server_M=moves.server_M[which : which + 1],
            copies_M=moves.copies_M[which : which + 1],
        )
        touched, amount, peers = self._changed(one)
        self.amount_4C[:, touched[:, 0]] = amount[:, :, 0]
        self.peers_4C[:, touched[:, 0]] = peers[:, :, 0]
        c, e, new = int(one.centre_M[0]), int(one.expert_M[0]), int(one.server_M[0])
        old, home, copies = int(self.serve_CE[c, e]), int(self.home_E[e]), int(one.copies_M[0])
        some = int(self.tokens_CE[c, e] > 0)
        if old != c:
            self.senders_CC[c, old] -= some
            self.guests_CE[old, e] -= 1
        if new != c:
            self.senders_CC[c, new] += some
            self.guests_CE[new, e] += 1
        self.copies_CC[c, home] += copies
        self.copy_CE[c, e] = copies == 1 or (copies == 0 and bool(self.copy_CE[c, e]))
        self.serve_CE[c, e] = new

    def decision(self) -> Decision:
        return Decision(serve_LCE=self.serve_CE[None], copy_LCE=self.copy_CE[None])


def improved(layer: CrossTraffic, decision: Decision, *, most_moves: int = MOST_MOVES) -> Decision:
    """Return a decision for one layer that is as fast or faster.

    Parameters
    ----------
    layer
        Traffic of one layer (`CrossTraffic.layer`).
    decision
        Where to start; must hold and fit.
    most_moves
        Moves after which to end.
    """
    state = _State(layer, decision)
    for _ in range(most_moves):
        time_C = state.all_times()
        slow = int(time_C.argmax())
        moves = state.moves_around(slow)
        if moves.count == 0:
            break
        outcome_M = state.outcome_M(moves)
        best = int(outcome_M.argmin())
        if outcome_M[best] >= time_C[slow] * (1 - LEAST_GAIN):
            break
        state.apply(moves, best)
    return state.decision()
