"""Manifests: what each rank recorded, which fragments hold it, and how to tell that they are whole.

A rank's manifest ``manifest.rankNNNNN.json`` is the only file that says what belongs to a data set. It names
the fragments in recorded order with the digest of each one's footer; the footer holds the checksums of the
rows before it. So a data set is opened, and its identity known, without reading a fragment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from placement.errors import InputError
from traces.source import TraceHeader

__all__ = [
    "FORMAT",
    "FRAGMENT_NAME",
    "MANIFEST_NAME",
    "MAX_RANK",
    "SPOOL_NAME",
    "Fragment",
    "FragmentError",
    "Manifest",
    "RankShare",
    "common_header",
    "digest_of",
    "fragment_name",
    "manifest_name",
    "spool_name",
]

FORMAT = "moe-trace/2"
"""Version of the data set format, in every manifest that is written."""

_READABLE = ("moe-trace/1", FORMAT)

MANIFEST_NAME = re.compile(r"manifest\.rank(\d{5})\.json")
FRAGMENT_NAME = re.compile(r"rank(\d{5})-\d{5,}\.parquet")
SPOOL_NAME = re.compile(r"rank(\d{5})\.spool\.arrow")
MAX_RANK = 99_999

_COLUMNS = ("sequence", "position", "rank", "domain")


def manifest_name(rank: int) -> str:
    """Return the file name of a rank's manifest."""
    return f"manifest.rank{rank:05}.json"


def fragment_name(rank: int, number: int) -> str:
    """Return the file name of a rank's fragment."""
    return f"rank{rank:05}-{number:05}.parquet"


def spool_name(rank: int) -> str:
    """Return the file name of a rank's spool."""
    return f"rank{rank:05}.spool.arrow"


class FragmentError(InputError):
    """A fragment is missing, truncated, altered or not what its manifest says; the others may be sound.

    Attributes
    ----------
    fragment
        File name within the data set.
    """

    def __init__(self, message: str, *, fragment: str) -> None:
        super().__init__(message)
        self.fragment = fragment


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShare:
    """The tokens of one rank in a fragment.

    Parameters
    ----------
    stored
        Rank in the fragment's rank column; `None` where it has none.
    shown
        Rank that readers see: data sets are merged without writing their fragments anew.
    tokens
        Tokens of that rank.
    """

    stored: int | None
    shown: int | None
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """One Parquet file of a data set, as its manifest describes it.

    Parameters
    ----------
    file
        Name within the folder.
    tokens, bytes
        Sizes.
    sha256
        Of the footer, which holds the checksums of all rows; in format 1 of the whole file.
    footer_bytes
        Length of the end of the file that `sha256` is of; `None` in format 1.
    recorded
        Columns that the tokens have beside their expert ids; `None` where only the fragment knows.
    ranks
        Whose tokens it holds; `None` where only the fragment knows.
    sequence_offset
        What readers add to sequence numbers.
    domain_of
        Domain of the data set for each domain number in the fragment; `None` if they are the same.
    """

    file: str
    tokens: int
    bytes: int
    sha256: str
    footer_bytes: int | None = None
    recorded: tuple[str, ...] | None = None
    ranks: tuple[RankShare, ...] | None = None
    sequence_offset: int = 0
    domain_of: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        if self.footer_bytes is None:
            return {"file": self.file, "tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha256}
        content: dict[str, Any] = {
            "file": self.file,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "footer_bytes": self.footer_bytes,
            "footer_sha256": self.sha256,
            "columns": None if self.recorded is None else list(self.recorded),
            "ranks": None if self.ranks is None else [_share_to_json(share) for share in self.ranks],
        }
        if self.sequence_offset:
            content["sequence_offset"] = self.sequence_offset
        if self.domain_of is not None:
            content["domain_of"] = list(self.domain_of)
        return content


def _share_to_json(share: RankShare) -> list[int | None]:
    plain = [share.stored, share.tokens]
    return plain if share.shown == share.stored else [*plain, share.shown]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What one rank recorded.

    Parameters
    ----------
    header
        Shape, model and domains.
    rank
        The rank that wrote it.
    fragments
        Its fragments in recorded order.
    provenance
        Who made it, when, of what; free text that nothing is decided by.
    """

    header: TraceHeader
    rank: int
    fragments: tuple[Fragment, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of all fragments."""
        return sum(fragment.tokens for fragment in self.fragments)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that `json.dumps` accepts."""
        header = dataclasses.asdict(self.header)
        model = {"name": header.pop("model_name"), "moe_layer_ids": header.pop("moe_layer_ids")}
        fragments = [fragment.to_json() for fragment in self.fragments]
        about = {"rank": self.rank, "provenance": dict(self.provenance)}
        return {"format": FORMAT, "model": model, **header, **about, "fragments": fragments}

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return (json.dumps(self.to_json(), indent=1) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes, *, name: str) -> Manifest:
        """Read the file's content.

        Raises
        ------
        InputError
            If it is no manifest of a known format, an entry is missing or makes no sense, or it is not of
            the rank that the file's name says. The message does not name the file.
        """
        try:
            manifest = cls._from_json(json.loads(content.decode()))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as exc:
            raise InputError(f"is no JSON ({exc}); restore it from a copy") from exc
        except KeyError as exc:
            raise InputError(f"lacks the entry {exc}") from exc
        except InputError:
            raise
        except (TypeError, ValueError) as exc:
            raise InputError(f"has an entry of the wrong type ({exc})") from exc
        if name != manifest_name(manifest.rank):
            raise InputError(f"is the manifest of rank {manifest.rank}, as its content says")
        return manifest

    @classmethod
    def _from_json(cls, content: Any) -> Manifest:
        found = content.get("format") if isinstance(content, dict) else None
        if found not in _READABLE:
            raise InputError(f"is of format {found!r}, not {FORMAT!r} or older")
        layer_ids = content["model"]["moe_layer_ids"]
        header = TraceHeader(
            num_layers=_count(content["num_layers"]),
            num_experts=_count(content["num_experts"]),
            top_k=_count(content["top_k"]),
            model_name=_text(content["model"]["name"]),
            moe_layer_ids=None if layer_ids is None else tuple(int(layer) for layer in layer_ids),
            domain_names=tuple(str(name) for name in content["domain_names"]),
        )
        rank = int(content["rank"])
        fragments = tuple(
            _fragment(_named(entry, rank), len(header.domain_names)) for entry in content["fragments"]
        )
        files = [fragment.file for fragment in fragments]
        if len(set(files)) < len(files):
            raise InputError("names a fragment twice; restore it from a copy")
        provenance = content.get("provenance", {})
        return cls(header=header, rank=rank, fragments=fragments, provenance=dict(provenance))


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise InputError(f"gives {value!r} where a {'positive ' if least else ''}number belongs")
    return value


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise InputError(f"gives {value!r} where a name belongs")
    return value


def _named(entry: Any, rank: int) -> Any:
    # A fragment lies in the folder itself: a manifest from elsewhere must not make us open other files.
    match = FRAGMENT_NAME.fullmatch(str(entry["file"]))
    if match is None or int(match[1]) != rank:
        raise InputError(f"names {entry['file']!r}, which is no fragment of rank {rank}")
    return entry


def _fragment_1(entry: Any) -> Fragment:
    return Fragment(
        file=entry["file"],
        tokens=_count(entry["tokens"]),
        bytes=_count(entry["bytes"]),
        sha256=str(entry["sha256"]),
    )


def _fragment(entry: Any, num_domains: int) -> Fragment:
    if "footer_bytes" not in entry:
        # Written by format 1, and perhaps appended to since.
        return _fragment_1(entry)
    columns, shares, domains = entry["columns"], entry["ranks"], entry.get("domain_of")
    fragment = Fragment(
        file=entry["file"],
        tokens=_count(entry["tokens"]),
        bytes=_count(entry["bytes"]),
        sha256=str(entry["footer_sha256"]),
        footer_bytes=_count(entry["footer_bytes"]),
        recorded=None if columns is None else tuple(str(name) for name in columns),
        ranks=None if shares is None else tuple(_share(*share) for share in shares),
        sequence_offset=_count(entry.get("sequence_offset", 0), 0),
        domain_of=None if domains is None else tuple(_count(domain, 0) for domain in domains),
    )
    unknown = set(fragment.recorded or ()) - set(_COLUMNS)
    if unknown:
        raise InputError(f"says that {fragment.file} has the unknown column {min(unknown)!r}")
    if fragment.ranks is not None and sum(share.tokens for share in fragment.ranks) != fragment.tokens:
        raise InputError(f"gives {fragment.file} {fragment.tokens} tokens and its ranks others")
    if fragment.footer_bytes is not None and fragment.footer_bytes > fragment.bytes:
        raise InputError(f"gives {fragment.file} a footer longer than the file")
    if fragment.domain_of is not None and max(fragment.domain_of, default=0) >= max(num_domains, 1):
        raise InputError(f"gives {fragment.file} a domain beyond the {num_domains} that have names")
    return fragment


def _share(stored: Any, tokens: Any, *shown: Any) -> RankShare:
    given = None if stored is None else _count(stored, 0)
    return RankShare(stored=given, shown=_count(shown[0], 0) if shown else given, tokens=_count(tokens))


def common_header(manifests: Sequence[Manifest]) -> TraceHeader:
    """Return the header that all manifests of a data set share.

    Raises
    ------
    InputError
        If two differ; both are named.
    """
    first = manifests[0]
    for other in manifests[1:]:
        difference = first.header.difference(other.header)
        if difference:
            raise InputError(
                f"ranks {first.rank} and {other.rank} are of different recordings ({difference}); "
                "keep the files of one"
            )
    return first.header


def digest_of(manifests: Sequence[Manifest]) -> str:
    """Return ``"sha256:..."`` of header and fragment checksums: the identity of the stored data set."""
    content = {
        "header": dataclasses.asdict(common_header(manifests)),
        "ranks": [[manifest.rank, *map(_identity, manifest.fragments)] for manifest in manifests],
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _identity(fragment: Fragment) -> list[Any]:
    shown = None if fragment.ranks is None else [_share_to_json(share) for share in fragment.ranks]
    return [fragment.sha256, fragment.tokens, shown, fragment.sequence_offset, fragment.domain_of]
