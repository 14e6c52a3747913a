"""The files of a checkpoint folder: which hold the weights to permute, which come along, which must not.

A folder may hold its weights more than once (``consolidated.safetensors``, ``original/``, ``*.bin``). Engines
that preferred those would read experts under their old numbers: they stay behind, and the report names them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from placement.checkpoint.header import quoted
from placement.checkpoint.index import read_index
from placement.errors import InputError

__all__ = ["Shards", "find_shards"]

_INDEX = ".safetensors.index.json"
_MAIN = "model.safetensors"
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5"),
    *(".msgpack", ".npz", ".npy", ".tflite", ".distcp", ".ot", ".zip", ".tar", ".gz", ".pkl", ".pickle"),
)
_OTHER_INDEX = ".index.json"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """What a checkpoint folder consists of.

    Parameters
    ----------
    folder
        The folder.
    files
        Names of the safetensors files of the model, in order.
    index
        Name of the index file; None where there is none.
    weight_map
        File of each tensor by the index; empty without one.
    others
        Names of the files that go along as they are, folders included in them (``tokenizer/vocab.txt``).
    left_out
        Names of what does not: other copies of the weights, hidden files and folders.
    """

    folder: Path
    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def find_shards(folder: Path) -> Shards:
    """List a checkpoint folder.

    The model is what ``model.safetensors.index.json`` names, else ``model.safetensors``, else what the only
    other index names, else every safetensors file of the folder.

    Raises
    ------
    InputError
        If it is no folder, holds no safetensors, the index is malformed or names a file that is missing or
        outside the folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; name the folder of a checkpoint")
    try:
        names = sorted(path.name for path in folder.iterdir() if path.is_file())
    except OSError as exc:
        raise InputError(f"{folder}: cannot be read ({exc.strerror}); check its permissions") from exc
    index, files = _model_files(folder, names)
    weight_map: dict[str, str] = {}
    if index is not None:
        weight_map = read_index(folder / index)
        files = tuple(sorted(set(weight_map.values())))
        missing = [name for name in files if name not in names]
        if missing:
            raise InputError(
                f"{folder / index}: names {quoted(missing[0])}, which is not in the folder "
                f"({len(missing)} of {len(files)} files are missing); get the checkpoint again"
            )
    own = {*files, *([index] if index else [])}
    others: list[str] = []
    left_out: list[str] = []
    for name, comes_along in _rest(folder, own):
        (others if comes_along else left_out).append(name)
    return Shards(
        folder=folder,
        files=files,
        index=index,
        weight_map=weight_map,
        others=tuple(others),
        left_out=tuple(left_out),
    )


def _model_files(folder: Path, names: list[str]) -> tuple[str | None, tuple[str, ...]]:
    indices = [name for name in names if name.endswith(_INDEX)]
    tensors = tuple(name for name in names if name.endswith(".safetensors"))
    if f"model{_INDEX}" in indices:
        return f"model{_INDEX}", ()
    if _MAIN in tensors:
        return None, (_MAIN,)
    if len(indices) > 1:
        raise InputError(
            f"{folder}: has {len(indices)} indices ({indices[0]}, {indices[1]}); keep one of them"
        )
    if indices:
        return indices[0], ()
    if not tensors:
        raise InputError(f"{folder}: holds no safetensors file; convert the checkpoint to safetensors first")
    return None, tensors


def _rest(folder: Path, own: set[str], below: str = "") -> Iterator[tuple[str, bool]]:
    """Yield every other file with whether it comes along; a folder that does not is named as a whole."""
    for path in sorted((folder / below).iterdir()):
        name = f"{below}{path.name}"
        if name in own:
            continue
        if path.is_symlink() and path.is_dir():
            yield f"{name}/", False
        elif path.is_dir():
            if path.name.startswith("."):
                yield f"{name}/", False
            else:
                yield from _rest(folder, own, f"{name}/")
        elif path.is_file():
            yield name, not (path.name.startswith(".") or _holds_weights(path.name))
        else:
            yield name, False


def _holds_weights(name: str) -> bool:
    lower = name.lower()
    return lower.endswith(_WEIGHTS) or lower.endswith(_OTHER_INDEX)
