"""The bundled samples are there, and names find them."""

from pathlib import Path

import pytest

from placement.errors import InputError
from placement.runtime import requirement
from placement.runtime.requirement import require_torch
from placement.runtime.samples import resolve_model, sample_models, sample_texts


def test_the_sample_model_is_bundled() -> None:
    """byte16 has a configuration and weights."""
    folder = sample_models()["byte16"]
    assert (folder / "model.safetensors").stat().st_size > 5_000_000
    assert resolve_model("byte16") == folder


def test_the_sample_texts_are_bundled() -> None:
    """Ten domains, 150 to 300 kB of UTF-8 in all."""
    contents = [file.read_text(encoding="utf-8") for file in sample_texts()]
    assert len(contents) == 10
    assert 150_000 < sum(len(content.encode()) for content in contents) < 300_000


def test_a_folder_wins_over_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called byte16 is what the caller sees, so it is what is meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "byte16").mkdir()
    assert resolve_model("byte16") == Path("byte16")


def test_an_unknown_model_is_refused() -> None:
    """The message lists the samples."""
    with pytest.raises(InputError, match=r"no checkpoint folder bite16 .*byte16"):
        resolve_model("bite16")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, the message says how to get it."""
    monkeypatch.setattr(requirement, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(InputError, match=r"needs torch; install with: pip install 'moe-placement\[torch\]'"):
        require_torch()


def test_packages_that_are_there_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All four packages are looked for, and nothing is raised when all are found."""
    asked: list[str] = []

    def find(name: str) -> object:
        asked.append(name)
        return object()

    monkeypatch.setattr(requirement, "find_spec", find)
    require_torch()
    assert asked == ["torch", "transformers", "safetensors", "tokenizers"]
