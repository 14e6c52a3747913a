"""What a calibration measures: how many tokens, rows and bytes, how often, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["DEFAULT_MODELS", "Pace", "Sizes"]

DEFAULT_MODELS = ("mixtral-8x7b", "olmoe-1b-7b", "qwen3-30b-a3b", "deepseek-v3")
"""Models that are measured where none is named: few large experts to many small ones."""

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How often one thing is timed.

    Parameters
    ----------
    warmups
        Calls before the first that is timed.
    least, most
        Timed calls.
    budget_ms
        Time for them, in between.
    longest_ms
        A call that takes longer ends its curve: it and larger ones are left out.
    """

    warmups: int = 3
    least: int = 5
    most: int = 40
    budget_ms: float = 250.0
    longest_ms: float = 2000.0

    def repeats(self, one_ms: float) -> int:
        """Return how many calls of so many milliseconds to time; 0 for none."""
        if one_ms > self.longest_ms:
            return 0
        return max(self.least, min(self.most, int(self.budget_ms / max(one_ms, 1e-6))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured.

    Parameters
    ----------
    tokens_per_expert
        Points of the expert curves, ascending.
    active_shares
        Shares of a rank's experts that have tokens, the rest has none.
    uneven_tokens
        Mean tokens per expert of the uneven loads.
    uneven_exponents
        Their skews: the load of the i-th expert falls as ``i ** -exponent``.
    expert_bytes
        Limit of a rank's expert weights; a model with more is measured with half its experts, and so on.
    activation_bytes
        Limit of the rows in front of, inside and behind the experts.
    exchange_MiB
        Points of the all-to-all curves: bytes that one rank sends, ascending.
    pairs
        Points of the row handling, in token-expert pairs, ascending.
    top_k
        Pairs of a token there.
    hbm_bytes
        Copied to measure the memory's bandwidth.
    flush_bytes
        Read before every timed call, so that nothing is left in the cache; 0 for none.
    launches
        Kernels launched in a row to measure what one launch costs the host.
    shrink
        Hidden sizes are divided by this, for machines that are no match for the real ones.
    pace
        How often each is timed.
    """

    tokens_per_expert: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
    active_shares: tuple[float, ...] = (1.0, 0.5, 0.25)
    uneven_tokens: tuple[int, ...] = (16, 128, 512, 1024)
    uneven_exponents: tuple[float, ...] = (0.5, 1.0)
    expert_bytes: int = 4 << 30
    activation_bytes: int = 12 << 30
    exchange_MiB: tuple[float, ...] = (0.0625, 0.25, 1, 4, 16, 64, 256)
    pairs: tuple[int, ...] = (64, 512, 4096, 16384, 32768, 65536, 131072)
    top_k: int = 8
    hbm_bytes: int = 1 << 30
    flush_bytes: int = 1 << 30
    launches: int = 500
    shrink: int = 1
    pace: Pace = Pace()

    def within(self, free_bytes: int) -> Sizes:
        """Return sizes for GPUs with so much memory free; these where that is 0, for unknown."""
        if not free_bytes:
            return self
        return replace(
            self,
            expert_bytes=min(self.expert_bytes, free_bytes // 4),
            activation_bytes=min(self.activation_bytes, free_bytes // 4),
            hbm_bytes=min(self.hbm_bytes, free_bytes // 8),
            flush_bytes=min(self.flush_bytes, free_bytes // 8),
        )

    @classmethod
    def for_gpu(cls, *, quick: bool) -> Sizes:
        """Return what is measured on GPUs; `quick` within a minute."""
        if not quick:
            return cls()
        return cls(
            tokens_per_expert=(1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096),
            active_shares=(1.0, 0.25),
            uneven_tokens=(128, 1024),
            uneven_exponents=(1.0,),
            pairs=(512, 8192, 65536),
            pace=Pace(most=12, budget_ms=60.0, longest_ms=500.0),
        )

    @classmethod
    def for_cpu(cls, *, quick: bool) -> Sizes:
        """Return what is measured without a GPU: narrow shapes, to try the way and not the machine."""
        return cls(
            tokens_per_expert=(1, 16, 64) if quick else (1, 4, 16, 64, 256),
            active_shares=(1.0, 0.25),
            uneven_tokens=(16,),
            uneven_exponents=(1.0,),
            expert_bytes=64 * MIB,
            activation_bytes=256 * MIB,
            exchange_MiB=(0.0625, 1, 4) if quick else (0.0625, 0.25, 1, 4, 16),
            pairs=(512, 4096),
            hbm_bytes=64 * MIB,
            flush_bytes=0,
            launches=100,
            shrink=8,
            pace=Pace(warmups=1, least=3, most=10, budget_ms=50.0, longest_ms=500.0),
        )
