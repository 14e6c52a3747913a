"""Looks into one uploaded file, as a process of its own with bounds: ``python -m service.inspect``.

What strangers send is opened here and nowhere else in the API: a file that makes a parser loop, swell or
crash takes this process along, and nothing else. The request comes as JSON on stdin; the reply, the file's
format and summary or what is wrong with it, is the last line on stdout. What is larger goes to a file that
the request names.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError, PlacementError
from service.lifeline import end_with_parent

if TYPE_CHECKING:
    from placement.model import ModelShape
    from traces.counts import ExpertCounts
    from traces.source import TraceSource

__all__ = ["main"]

CHUNK_BYTES = 1 << 20
MOST_NAME = 200

Reply = dict[str, Any]


def main() -> None:
    """Do what stdin asks for."""
    request = json.load(sys.stdin)
    end_with_parent(request["parent"])
    _bound(request["limits"])
    try:
        reply = _TASKS[request["task"]](Path(request["path"]), request)
    except PlacementError as exc:
        reply = {"error": _told(str(exc), request["path"])}
    except MemoryError:
        reply = {"error": "needs more memory to be opened than an upload may take"}
    sys.stdout.write(f"\n{json.dumps(reply)}\n")


def _bound(limits: Mapping[str, int]) -> None:
    for name, kind in (
        ("memory_bytes", resource.RLIMIT_AS),
        ("cpu_s", resource.RLIMIT_CPU),
        ("file_bytes", resource.RLIMIT_FSIZE),
        ("core_bytes", resource.RLIMIT_CORE),
    ):
        most = limits.get(name, 0)
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def _told(message: str, path: str) -> str:
    """Return a message without our paths, and with the names that callers know options by."""
    text = message.replace(f"{path}: ", "").replace(path, "the file")
    for option in ("model", "devices"):
        text = text.replace(f"--{option}", f"?{option}=")
    return " ".join(text.split())


def _trace(path: Path, request: Mapping[str, Any]) -> Reply:
    """Open a trace, and return what its header says."""
    from service.archives import archive_kind, is_dataset_archive, unpack
    from traces.readers import ReadOptions, open_trace

    options = ReadOptions(model=_preset(request["model"]))
    if not is_dataset_archive(path):
        name = _sniffed(path)
        return _about(name, open_trace(path, format=name, options=options))
    folder = Path(request["folder"])
    opened = unpack(path, folder, max_bytes=request["limits"]["unpacked_bytes"])
    try:
        reply = _about(_sniffed(opened) or "dataset", open_trace(opened, options=options))
    except InputError as exc:
        raise InputError(str(exc).replace(str(opened), "the archive's data set")) from exc
    reply["summary"]["archive"] = archive_kind(path)
    return reply


def _sniffed(path: Path) -> str | None:
    from traces.readers import READERS

    return next((name for name, reader in READERS.items() if reader.sniff(path)), None)


def _about(name: str | None, traffic: TraceSource | ExpertCounts) -> Reply:
    from traces.counts import ExpertCounts

    header = traffic if isinstance(traffic, ExpertCounts) else traffic.header
    layer_ids = header.moe_layer_ids
    return {
        "format": name,
        "summary": {
            "num_layers": header.num_layers,
            "num_experts": header.num_experts,
            "top_k": header.top_k,
            "num_tokens": int(traffic.num_tokens),
            "model_name": _printable(header.model_name),
            "moe_layer_ids": None if layer_ids is None else list(layer_ids),
            "counts_only": isinstance(traffic, ExpertCounts),
        },
    }


def _figures(path: Path, request: Mapping[str, Any]) -> Reply:
    """Write facts and figures of a trace as JSON."""
    from service.views.figures import json_of
    from service.views.traffic import traffic_document

    document = traffic_document(_opened(path, request))
    Path(request["out"]).write_bytes(json_of(document))
    return {}


def _loads(path: Path, request: Mapping[str, Any]) -> Reply:
    """Write the mean load of a trace's windows, ``[layers, experts]``, as an ``.npy`` file."""
    import numpy as np

    from traces.overview import overview_of

    np.save(request["out"], overview_of(_opened(path, request)).load_LE)
    return {}


def _opened(path: Path, request: Mapping[str, Any]) -> TraceSource | ExpertCounts:
    """Open a trace that was taken before; a model of another name than our presets says nothing new."""
    from placement.model import preset_model
    from service.archives import is_dataset_archive, unpack
    from traces.readers import ReadOptions, open_trace

    try:
        model = None if request["model"] is None else preset_model(request["model"])
    except InputError:
        model = None
    if is_dataset_archive(path):
        path = unpack(path, Path(request["folder"]), max_bytes=request["limits"]["unpacked_bytes"])
    return open_trace(path, options=ReadOptions(model=model))


def _placement(path: Path, request: Mapping[str, Any]) -> Reply:
    """Read a placement of any format, and write our own form of it unless it is that already."""
    from placement.cli.placements import load_placement
    from placement.io import dump_json, placement_to_dict, write_text
    from traces.importers.torch_file import is_torch_file

    found = load_placement(path, model=_preset(request["model"]), num_devices=request["devices"])
    name = "sglang-dump" if is_torch_file(path) else _document_format(path)
    is_ours = name == "native"
    if not is_ours:
        write_text(request["out"], dump_json(placement_to_dict(found)) + "\n")
    return {
        "format": name,
        "is_ours": is_ours,
        "summary": {
            "num_layers": found.num_layers,
            "num_experts": found.num_experts,
            "num_devices": found.num_devices,
            "num_slots": len(found.device_of_slot_S),
            "model_name": _printable(found.model_name),
            "received_as": name,
        },
    }


def _document_format(path: Path) -> str:
    from placement.formats.document import read_document
    from placement.formats.files import find_format

    name = find_format(read_document(path))
    # Ours is JSON; the same entries as YAML are written anew.
    is_json = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"
    return name if name != "native" or is_json else "native-yaml"


def _zstd(path: Path, request: Mapping[str, Any]) -> Reply:
    """Decompress a file into another, up to a size."""
    import pyarrow as pa

    left = request["limits"]["unpacked_bytes"]
    try:
        with (
            path.open("rb") as raw,
            pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream,
            open(request["out"], "wb") as out,
        ):
            while chunk := stream.read(CHUNK_BYTES):
                left -= len(chunk)
                if left < 0:
                    return {"too_large": True}
                out.write(chunk)
    except (OSError, pa.ArrowException) as exc:
        raise InputError(f"the body is no zstd data as its Content-Encoding says: {exc}") from exc
    return {}


def _preset(name: str | None) -> ModelShape | None:
    """Return the model of a name; unlike on the command line it never is a file."""
    from placement.model import preset_model

    return None if name is None else preset_model(name)


def _printable(text: str | None) -> str | None:
    """Return a text from a file as one that every database takes."""
    if text is None:
        return None
    return "".join(letter for letter in text if letter.isprintable())[:MOST_NAME]


_TASKS: Mapping[str, Callable[[Path, Mapping[str, Any]], Reply]] = {
    "trace": _trace,
    "figures": _figures,
    "loads": _loads,
    "placement": _placement,
    "zstd": _zstd,
}


if __name__ == "__main__":
    main()
