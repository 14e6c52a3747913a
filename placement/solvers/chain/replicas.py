"""Fills spare slots with the replicas that keep most tokens where they are.

Layers are improved in turn, last to first, each exactly: what its tokens did before the layer does not
depend on it, and what they will do after it is known for every device that they may be on. Sweeps repeat
until none changes a layer; then random changes to some layers are undone unless they led to fewer hops.

Shape letters: L layers, E experts, S slots, D devices, T tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.plan import EMPTY
from placement.problem import PlacementProblem
from placement.solvers.chain.kernels import improve_layer, pull_back, summarise_layer, walk_layers
from placement.stopping import StoppingCriterion

__all__ = ["Walk"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MAX_TOKENS = 65_536
"""Tokens that are walked; more say little about which replicas help."""

MAX_SWEEPS = 30


class Walk:
    """The tokens of a problem on their way through the layers.

    Parameters
    ----------
    problem
        A stay-put problem.
    limit_L
        Load that a device may carry in each layer.
    stop
        Asked between layers.
    """

    def __init__(self, problem: PlacementProblem, limit_L: FloatArray, stop: StoppingCriterion) -> None:
        profile = problem.profile
        assert profile.experts_TLK is not None
        step = -(-profile.num_sampled_tokens // MAX_TOKENS)
        self.problem, self.limit_L, self.stop = problem, limit_L, stop
        self.expert_LT = np.ascontiguousarray(profile.experts_TLK[::step, :, 0].T.astype(np.int64))
        self.weight_T = np.array(profile.token_weight_T[::step])
        unknown_T = np.full(profile.num_sampled_tokens, -1, dtype=np.int64)
        self.home_T = np.array((unknown_T if profile.home_T is None else profile.home_T)[::step])
        self.load_LE = profile.load_WLE.sum(axis=0)
        self.device_S = np.array(problem.device_of_slot_S)
        self.control = np.zeros(1, dtype=np.int64)

    @property
    def work(self) -> int:
        """Steps of tokens that one sweep takes."""
        return int(self.expert_LT.size * (1 + self.problem.num_devices))

    def hops(self, expert_LS: IntArray) -> float:
        """Count the hops of all tokens."""
        here_LT, after_T = self._walk(expert_LS)
        moved_LT = np.diff(np.vstack([here_LT, after_T]), axis=0)[1:] != 0
        return float((moved_LT * self.weight_T).sum())

    def excess(self, expert_LS: IntArray) -> float:
        """Sum what devices carry beyond the limit, as a share of it, over all layers."""
        held_LED = self._held(expert_LS)
        share_LE = self.load_LE / held_LED.sum(axis=2)
        load_LD = np.einsum("le,led->ld", share_LE, held_LED)
        return float(np.maximum(load_LD / self.limit_L[:, None] - 1.0, 0.0).sum())

    def settle(self, expert_LS: IntArray) -> IntArray:
        """Sweep until no layer changes; return the experts of the slots then."""
        expert_LS = expert_LS.copy()
        for _ in range(MAX_SWEEPS):
            if not self._sweep(expert_LS):
                break
        return expert_LS

    def search(self, expert_LS: IntArray, *, kicks: int, random: np.random.Generator) -> IntArray:
        """Settle, then change some layers at random and settle again, `kicks` times; keep the best."""
        best_LS = self.settle(expert_LS)
        best = self._rank(best_LS)
        for _ in range(kicks):
            if self.stop():
                break
            found_LS = self.settle(self._kicked(best_LS, random))
            rank = self._rank(found_LS)
            if rank < best:
                best, best_LS = rank, found_LS
        return best_LS

    def _rank(self, expert_LS: IntArray) -> tuple[float, float]:
        return self.excess(expert_LS), self.hops(expert_LS)

    def _kicked(self, expert_LS: IntArray, random: np.random.Generator) -> IntArray:
        """Drop about half of the replicas of a few consecutive layers, and exchange some of what is left."""
        kicked_LS = expert_LS.copy()
        first = int(random.integers(expert_LS.shape[0]))
        for expert_S in kicked_LS[first : first + int(random.integers(1, 4))]:
            for slot in random.permutation(expert_S.size):
                several = (expert_S == expert_S[slot]).sum() > 1
                if expert_S[slot] >= 0 and several and random.random() < 0.5:
                    expert_S[slot] = EMPTY
            for _ in range(int(random.integers(3))):
                self._exchange(expert_S, *random.integers(expert_S.size, size=2))
        return kicked_LS

    def _exchange(self, expert_S: IntArray, a: int, b: int) -> None:
        """Let two slots change places unless a device would hold an expert twice."""
        for expert, slot in ((expert_S[a], b), (expert_S[b], a)):
            there = self.device_S == self.device_S[slot]
            if expert != EMPTY and (expert_S[there] == expert).any():
                return
        expert_S[a], expert_S[b] = expert_S[b], expert_S[a]

    def _held(self, expert_LS: IntArray) -> npt.NDArray[np.bool_]:
        problem = self.problem
        held_LED = np.zeros((problem.num_layers, problem.num_experts, problem.num_devices), dtype=np.bool_)
        layer, slot = np.nonzero(expert_LS >= 0)
        held_LED[layer, expert_LS[layer, slot], self.device_S[slot]] = True
        return held_LED

    def _walk(self, expert_LS: IntArray) -> tuple[IntArray, IntArray]:
        """Where tokens are before each layer, and after the last."""
        held_LED = self._held(expert_LS)
        here_LT = np.empty_like(self.expert_LT)
        walk_layers(self.expert_LT.T, self.home_T, held_LED, here_LT)
        here_T, expert_T = here_LT[-1], self.expert_LT[-1]
        stays_T = (here_T >= 0) & held_LED[-1, expert_T, here_T]
        return here_LT, np.where(stays_T, here_T, held_LED[-1].argmax(axis=1)[expert_T])

    def _sweep(self, expert_LS: IntArray) -> bool:
        """Improve every layer once, last to first; return whether any changed."""
        here_LT, _ = self._walk(expert_LS)
        ahead_TD = np.zeros((self.expert_LT.shape[1], self.problem.num_devices), dtype=np.int64)
        changed = False
        for layer in reversed(range(expert_LS.shape[0])):
            if self.stop():
                return False
            expert_T = self.expert_LT[layer]
            hops_EHD = summarise_layer(
                expert_T, here_LT[layer], ahead_TD, self.weight_T, self.problem.num_experts, layer > 0
            )
            changed |= improve_layer(
                hops_EHD,
                expert_LS[layer],
                self.device_S,
                self.load_LE[layer],
                self.limit_L[layer],
                self.control,
            )
            pull_back(expert_T, self._held(expert_LS)[layer], ahead_TD)
        return changed
