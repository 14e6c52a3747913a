"""Safetensors files byte by byte, and small checkpoints whose every element is known, for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.formats.permutation import Permutation

__all__ = ["digests", "permutation", "read_tensors", "write_checkpoint", "write_raw", "write_tensors"]

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32, "U8": np.uint8}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}

Tensors = Mapping[str, npt.NDArray[Any]]


def write_raw(path: Path, header: object, data: bytes) -> Path:
    """Write a file with any header at all: an object, or the very bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_tensors(path: Path, tensors: Tensors, *, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a file as the safetensors library does: compact header, padded to 8 bytes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at, parts = 0, []
    for name, array in tensors.items():
        part = np.ascontiguousarray(array).tobytes()
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + len(part)],
        }
        at += len(part)
        parts.append(part)
    text = json.dumps(header, separators=(",", ":")).encode()
    return write_raw(path, text + b" " * (-len(text) % 8), b"".join(parts))


def read_tensors(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """Read all tensors of a folder, by a reader of its own."""
    found: dict[str, npt.NDArray[Any]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert name not in found
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            array = np.frombuffer(content[begin:end], DTYPES[entry["dtype"]])
            found[name] = array.reshape(entry["shape"])
    return found


def write_checkpoint(
    folder: Path, files: Sequence[Tensors], *, config: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint: one file, or several with an index, and a configuration (empty by default)."""
    folder.mkdir(parents=True)
    if len(files) == 1:
        write_tensors(folder / "model.safetensors", files[0], metadata={"format": "pt"})
    else:
        names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
        for name, tensors in zip(names, files, strict=True):
            write_tensors(folder / name, tensors, metadata={"format": "pt"})
        weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(dict(config or {}), indent=2) + "\n")
    return folder


def permutation(
    *rows: Sequence[int], layers: Sequence[int] | None = None, num_devices: int = 1
) -> Permutation:
    """Build a permutation from the old expert of each new position."""
    return Permutation(
        old_expert_of_new_LE=np.array(rows),
        moe_layer_ids=tuple(range(len(rows)) if layers is None else layers),
        num_devices=num_devices,
    )


def digests(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by its path in the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
