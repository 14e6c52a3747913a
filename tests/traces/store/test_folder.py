"""Tests of data sets behind URLs: the same as in a folder, and what cannot be opened takes one line."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import numpy as np
import pytest

from placement.errors import InputError
from traces.readers import open_trace, read_trace
from traces.source import read_all
from traces.store import (
    DatasetSource,
    DatasetWriter,
    FragmentError,
    clear_dataset,
    merge_datasets,
    read_dataset,
    write_dataset,
)
from traces.store.folder import LocalFolder, UrlFolder, open_folder
from traces.synthesize import synthesize
from traces.trace import Trace


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/a%20set"
    return f"memory://{uuid.uuid4().hex}/set"


def small_trace(seed: int = 0) -> Trace:
    return synthesize(num_tokens=30, num_layers=2, num_experts=8, top_k=2, sequence_tokens=10, seed=seed)


def test_a_data_set_lives_behind_a_url(url: str) -> None:
    """Written, opened, streamed, read, refused, overwritten, cleared."""
    trace = small_trace()
    write_dataset(trace, url, fragment_tokens=12)
    assert read_dataset(url).digest == trace.digest
    assert read_trace(url).digest == trace.digest
    source = open_trace(url)
    assert isinstance(source, DatasetSource)
    assert [block.num_tokens for block in source.blocks(5, 30, max_tokens=10)] == [10, 10, 5]
    assert source.digest == DatasetSource(url).digest
    with pytest.raises(InputError, match="already; choose another output or overwrite"):
        write_dataset(trace, url)
    write_dataset(small_trace(1), url, overwrite=True)
    assert read_dataset(url).digest == small_trace(1).digest
    clear_dataset(url)
    with pytest.raises(InputError, match=r"set: (is a folder without a manifest|does not exist)"):
        DatasetSource(url)


def test_ranks_record_into_a_url(url: str) -> None:
    """Manifests come last, appending goes on, and there is no spool."""
    for rank in range(2):
        with DatasetWriter(url, num_layers=2, num_experts=8, top_k=2, rank=rank, spool=False) as out:
            out.append(small_trace(rank).experts_TLK)
    with DatasetWriter(url, num_layers=2, num_experts=8, top_k=2, rank=1, append=True, spool=False) as out:
        out.append(small_trace(2).experts_TLK)
    expected = np.concatenate([small_trace(seed).experts_TLK for seed in range(3)])
    np.testing.assert_array_equal(read_dataset(url).experts_TLK, expected)
    assert len(open_folder(url).names() or ()) == 5


def test_data_sets_are_merged_across_places(url: str, tmp_path: Path) -> None:
    """From a folder and a URL into a URL, and back into a folder."""
    write_dataset(small_trace(), tmp_path / "a")
    write_dataset(small_trace(1), url)
    merge_datasets([tmp_path / "a", url], f"{url}-both")
    merge_datasets([f"{url}-both", url], tmp_path / "all")
    expected = np.concatenate([small_trace(seed).experts_TLK for seed in (0, 1, 1)])
    np.testing.assert_array_equal(read_dataset(tmp_path / "all").experts_TLK, expected)
    merge_datasets([url, url], f"{url}-twice")
    assert read_all(DatasetSource(f"{url}-twice")).num_tokens == 60
    with pytest.raises(InputError, match="is one of the data sets to merge"):
        merge_datasets([url], url)


def test_damage_behind_a_url_is_named(url: str) -> None:
    """A truncated, an altered and a missing fragment."""
    write_dataset(small_trace(), url, fragment_tokens=12)
    folder, name = open_folder(url), "rank00000-00001.parquet"
    content = folder.read(name)
    for damaged in (content[:-5], content[:40] + b"?" + content[41:]):
        folder.write(name, [damaged])
        with pytest.raises(FragmentError, match=r"rank00000-00001\.parquet: is truncated or altered"):
            read_dataset(url)
    folder.remove(name)
    with pytest.raises(FragmentError, match=r"set/rank00000-00001\.parquet: is named by the manifest"):
        read_dataset(url)


def test_files_lie_in_plain_folders() -> None:
    """``file://`` is the folder itself, with its atomic renames and spools; the rest goes through fsspec."""
    assert isinstance(open_folder("file:///tmp/x"), LocalFolder)
    assert str(open_folder("file:///tmp/x%20y")) == "/tmp/x y"
    assert isinstance(open_folder("memory://x"), UrlFolder)


def test_spools_need_a_local_folder() -> None:
    """Asked for where nothing can be appended to, they are refused."""
    with pytest.raises(InputError, match="cannot hold a spool; record into a local folder"):
        DatasetWriter(f"memory://{uuid.uuid4().hex}", num_layers=2, num_experts=8, top_k=2, spool=True)


def test_unknown_kinds_of_urls_are_refused() -> None:
    """A typing error is named."""
    with pytest.raises(InputError, match=r"^s4://bucket/set: cannot be opened .*s4.*; check the URL$"):
        DatasetSource("s4://bucket/set")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package of an object store one line says which one to install."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"^s3://bucket/set: cannot be opened here .*s3fs") as caught:
        DatasetSource("s3://bucket/set")
    assert "\n" not in str(caught.value)


def test_what_stores_raise_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the stores' own libraries, which are no `OSError`, are translated."""

    class BotoCoreError(Exception):
        """What botocore raises without credentials."""

    class Module:
        pass

    module = Module()
    module.BotoCoreError = BotoCoreError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "botocore.exceptions", module)  # type: ignore[arg-type]

    def refuse(*_: object, **__: object) -> None:
        raise BotoCoreError("Unable to locate\ncredentials")

    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "ls", refuse)
    with pytest.raises(InputError, match=r"^memory://x/y: cannot be read \(Unable to locate credentials\)"):
        DatasetSource("memory://x/y")
    with pytest.raises(
        InputError, match=r"^memory://x/y: cannot be written \(Unable to locate credentials\)"
    ):
        write_dataset(small_trace(), "memory://x/y")
