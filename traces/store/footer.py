"""What a fragment's footer tells of its rows: checksums, loads, sequences and domains.

Shape letters: L MoE layers, E experts.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.errors import InputError
from traces.source import TraceHeader
from traces.store.manifest import Fragment
from traces.trace import IntArray

__all__ = ["FOOTER_KEY", "FragmentContent"]

FOOTER_KEY = b"moe-trace"
"""Key of the entry in the metadata of the Parquet file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentContent:
    """What a fragment's footer tells of its rows.

    Parameters
    ----------
    row_groups
        Tokens, bytes and CRC-32 of each row group, in the order of the file, from its first byte on.
    load_LE
        Token-expert pairs, ``[layers, experts]``.
    sequences
        Least and greatest sequence number as stored, and how many there are; `None` without sequences.
    domain_tokens
        Tokens of each domain as stored; empty where no token has one.
    """

    row_groups: tuple[tuple[int, int, int], ...]
    load_LE: IntArray
    sequences: tuple[int, int, int] | None
    domain_tokens: tuple[int, ...]

    def to_bytes(self) -> bytes:
        """Return the footer's entry."""
        load = zlib.compress(self.load_LE.astype("<u4").tobytes())
        content = {
            "row_groups": [list(group) for group in self.row_groups],
            "load": base64.b64encode(load).decode(),
            "sequences": None if self.sequences is None else list(self.sequences),
            "domain_tokens": list(self.domain_tokens),
        }
        return json.dumps(content, separators=(",", ":")).encode()

    @classmethod
    def parse(cls, text: bytes | None, header: TraceHeader, fragment: Fragment) -> FragmentContent:
        """Read the footer's entry.

        Raises
        ------
        InputError
            If it is missing or makes no sense.
        """
        shape = (header.num_layers, header.num_experts)
        try:
            content = json.loads(text or b"")
            packed = zlib.decompressobj().decompress(
                base64.b64decode(content["load"]), 4 * shape[0] * shape[1]
            )
            parsed = cls(
                row_groups=tuple((int(t), int(b), int(crc)) for t, b, crc in content["row_groups"]),
                load_LE=np.frombuffer(packed, dtype="<u4").reshape(shape).astype(np.int64),
                sequences=None if content["sequences"] is None else _three(*content["sequences"]),
                domain_tokens=tuple(int(tokens) for tokens in content["domain_tokens"]),
            )
        except (KeyError, TypeError, ValueError, RecursionError, zlib.error, binascii.Error) as exc:
            raise InputError(f"lacks the record of its rows ({exc}); restore it from a copy") from exc
        sizes = [tokens for tokens, _, _ in parsed.row_groups], [size for _, size, _ in parsed.row_groups]
        if min((0, *sizes[0], *sizes[1])) < 0 or sum(sizes[0]) != fragment.tokens:
            raise InputError(
                f"holds {sum(sizes[0])} tokens, the manifest says {fragment.tokens}; restore it from a copy"
            )
        return parsed


def _three(least: Any, greatest: Any, count: Any) -> tuple[int, int, int]:
    return int(least), int(greatest), int(count)
