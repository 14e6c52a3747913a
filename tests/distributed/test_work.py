"""Work folders: what is done is known again, and nothing else is taken for done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from placement.errors import InputError
from traces.distributed.work import MANIFEST, WorkFolder

IDENTITY = {"trace": "sha256:0", "window_tokens": 512}


def work(folder: Path, **changed: object) -> WorkFolder:
    """Open a work folder."""
    return WorkFolder(folder, kind="test", identity={**IDENTITY, **changed})


def test_what_is_done_is_found_again(tmp_path: Path) -> None:
    """Entries keep their file, checksum and facts over runs; what was forgotten is gone with its file."""
    folder = tmp_path / "deep" / "work"
    with work(folder) as first:
        (folder / "a.bin").write_bytes(b"abc")
        first.record("a", file=folder / "a.bin", note=1)
        first.record("b", note=2)
        (folder / "c.bin").write_bytes(b"c")
        first.record("c", file=folder / "c.bin")
        first.forget("c")
    assert not (folder / "c.bin").exists()
    with work(folder) as second:
        assert second.entry("a") == {
            "note": 1,
            "file": "a.bin",
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        }
        assert second.entry("b") == {"note": 2}
        assert second.entry("c") is None
        assert second.entry("never") is None


@pytest.mark.parametrize("damage", [b"", b"abd", b"abcd", None])
def test_a_changed_file_is_not_done(damage: bytes | None, tmp_path: Path) -> None:
    """Truncated, altered, longer or missing: the task has to run again."""
    file = tmp_path / "a.bin"
    with work(tmp_path) as folder:
        file.write_bytes(b"abc")
        folder.record("a", file=file)
    file.unlink() if damage is None else file.write_bytes(damage)
    with work(tmp_path) as folder:
        assert folder.entry("a") is None


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    """Other options, another kind of run, or a folder with other things in it."""
    with work(tmp_path):
        pass
    with pytest.raises(InputError, match="another run: window_tokens was 512 and is 256 now"):
        work(tmp_path, window_tokens=256)
    with pytest.raises(InputError, match="another run: seed was None and is 3 now"):
        work(tmp_path, seed=3)
    with pytest.raises(InputError, match="of a 'moe-placement-test/1' run"):
        WorkFolder(tmp_path, kind="other", identity=IDENTITY)
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").touch()
    with pytest.raises(InputError, match="is not empty, and no work folder"):
        work(other)
    assert [path.name for path in other.iterdir()] == ["precious.txt"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second is told, and the folder is free again once the first is done."""
    with work(tmp_path), pytest.raises(InputError, match="another process works in it"):
        work(tmp_path)
    with work(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "identity": {}, "done": 5}'])
def test_a_damaged_manifest_is_one_line(content: str, tmp_path: Path) -> None:
    """Whatever the file holds, the error names it and the folder is not kept locked."""
    (tmp_path / MANIFEST).write_text(content)
    for _ in range(2):
        with pytest.raises(InputError, match=f"{MANIFEST}: "):
            work(tmp_path)


def test_the_manifest_is_json_and_says_all(tmp_path: Path) -> None:
    """Others may read it."""
    with work(tmp_path) as folder:
        folder.record("a", note=1)
    assert json.loads((tmp_path / MANIFEST).read_text()) == {
        "format": "moe-placement-test/1",
        "identity": IDENTITY,
        "done": {"a": {"note": 1}},
    }
