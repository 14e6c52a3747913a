"""The bundled sample model and sample texts, and how a name on the command line finds a checkpoint."""

from __future__ import annotations

from pathlib import Path

from placement.errors import InputError

__all__ = ["resolve_model", "sample_models", "sample_texts"]

_SAMPLES = Path(__file__).resolve().parent.parent / "samples"


def sample_models() -> dict[str, Path]:
    """Bundled checkpoints by name."""
    return {config.parent.name: config.parent for config in sorted(_SAMPLES.glob("*/config.json"))}


def sample_texts() -> tuple[Path, ...]:
    """Bundled text files, one domain each, in name order."""
    return tuple(sorted((_SAMPLES / "text").glob("*.txt")))


def resolve_model(model: str | Path) -> Path:
    """Return the checkpoint folder that a path or the name of a bundled sample means.

    An existing folder wins over a sample of the same name.

    Raises
    ------
    InputError
        If it is neither.
    """
    path = Path(model)
    if path.is_dir():
        return path
    samples = sample_models()
    if str(model) in samples:
        return samples[str(model)]
    raise InputError(
        f"no checkpoint folder {path} (and no bundled sample of that name; there is {', '.join(samples)})"
    )
