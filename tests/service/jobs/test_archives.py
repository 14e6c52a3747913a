"""Archives from strangers: what is plain comes out, and nothing else does."""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from placement.errors import InputError
from service.archives import archive_kind, is_dataset_archive, unpack

MIB = 1 << 20


def tar(path: Path, *entries: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w") -> Path:
    """Write a tar of files given by name and content, and of entries given as such."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    return path


def zipped(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    """Write a zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """Return an entry of a tar that is no plain file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def found(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FILES = (("set/manifest.rank00000.json", b"{}"), ("set/part/a.bin", b"x" * 3000), ("set/empty", b""))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("tar", lambda path: tar(path, *FILES)),
        ("tar.gz", lambda path: tar(path, *FILES, mode="w:gz")),
        ("zip", lambda path: zipped(path, *FILES)),
    ],
)
def test_folders_come_out_as_they_went_in(tmp_path: Path, kind: str, make: Callable[[Path], Path]) -> None:
    """Content and names survive; the one folder around everything is where the data set is."""
    path = make(tmp_path / "archive")
    target = tmp_path / "out"
    target.mkdir()
    assert archive_kind(path) == kind
    assert is_dataset_archive(path)
    folder = unpack(path, target, max_bytes=MIB)
    assert folder == target / "set"
    assert found(folder) == {name.removeprefix("set/"): content for name, content in FILES}


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    """Text, an empty file, lone gzip and a zip without a manifest are no data sets."""
    for name, content in (("text", b"hello"), ("empty", b""), ("lone.gz", gzip.compress(b"hello"))):
        (tmp_path / name).write_bytes(content)
        assert archive_kind(tmp_path / name) is None
        assert not is_dataset_archive(tmp_path / name)
        with pytest.raises(InputError, match="is no tar"):
            unpack(tmp_path / name, tmp_path, max_bytes=MIB)
    assert not is_dataset_archive(zipped(tmp_path / "arrays.npz", ("selected.npy", b"abc")))


@pytest.mark.parametrize(
    "name",
    ["../evil", "/evil", "a/../../evil", "a\\..\\evil", "c:evil", "a//b", "a\nb", "n" * 300, "a/" * 12 + "b"],
)
@pytest.mark.parametrize("make", [tar, zipped])
def test_no_name_leads_out(tmp_path: Path, name: str, make: Callable[..., Path]) -> None:
    """Names that are absolute, climb, or are not plain are refused, and nothing is written outside."""
    path = make(tmp_path / "archive", (name, b"evil"))
    target = tmp_path / "deep" / "out"
    target.mkdir(parents=True)
    with pytest.raises(InputError, match="a name that is not taken"):
        unpack(path, target, max_bytes=MIB)
    assert found(tmp_path) == {"archive": path.read_bytes()}


@pytest.mark.parametrize(
    "entry",
    [
        special("link", tarfile.SYMTYPE, "/etc/passwd"),
        special("link", tarfile.LNKTYPE, "other"),
        special("device", tarfile.CHRTYPE),
        special("pipe", tarfile.FIFOTYPE),
        special("sparse", tarfile.GNUTYPE_SPARSE),
    ],
    ids=["symlink", "hardlink", "device", "fifo", "sparse"],
)
def test_only_plain_files_come_out_of_a_tar(tmp_path: Path, entry: tarfile.TarInfo) -> None:
    """Links, devices and pipes are refused."""
    path = tar(tmp_path / "archive", entry)
    with pytest.raises(InputError, match=r"no plain file|damaged"):
        unpack(path, tmp_path / "out", max_bytes=MIB)
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    """A zip marks links by their mode."""
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = zipped(tmp_path / "archive", (link, b"/etc/passwd"))
    with pytest.raises(InputError, match="no plain file"):
        unpack(path, tmp_path / "out", max_bytes=MIB)


@pytest.mark.parametrize("second", ["a", "a/b"])
@pytest.mark.parametrize("make", [tar, zipped])
def test_an_entry_given_twice_is_refused(tmp_path: Path, second: str, make: Callable[..., Path]) -> None:
    """Neither may a later entry replace a file, nor may a file be a folder too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Duplicate name")
        path = make(tmp_path / "archive", ("a", b"1"), (second, b"2"))
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError, match="twice"):
        unpack(path, target, max_bytes=MIB)


def test_headers_without_end_are_damage(tmp_path: Path) -> None:
    """A thousand headers about one entry, each about the next, end in an error."""
    info = tarfile.TarInfo("x" * 150)
    name = info.tobuf(tarfile.GNU_FORMAT)[:1024]
    path = tmp_path / "archive"
    path.write_bytes(name * 900)
    with pytest.raises(InputError, match="damaged"):
        unpack(path, tmp_path / "out", max_bytes=MIB)


@pytest.mark.parametrize("mode", ["tar", "tar.gz", "zip"])
def test_a_bomb_stops_at_the_limit(tmp_path: Path, mode: str) -> None:
    """What comes out is counted, whatever the archive says."""
    bomb = ("zeros", bytes(8 * MIB))
    path = tmp_path / "archive"
    if mode == "zip":
        zipped(path, bomb)
    else:
        tar(path, bomb, mode="w:gz" if mode == "tar.gz" else "w")
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError, match="unpacks to more than 1,048,576 bytes"):
        unpack(path, target, max_bytes=MIB)
    assert sum(map(len, found(target).values())) <= MIB


def test_a_zip_that_lies_about_sizes_stops_too(tmp_path: Path) -> None:
    """A size of 10 in the headers does not let 8 MiB out."""
    path = zipped(tmp_path / "archive", ("zeros", bytes(8 * MIB)))
    path.write_bytes(path.read_bytes().replace((8 * MIB).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError, match=r"damaged|more than"):
        unpack(path, target, max_bytes=MIB)
    assert sum(map(len, found(target).values())) <= MIB


def test_the_ratio_is_bounded(tmp_path: Path) -> None:
    """Beyond 64 MiB no more may come out than so many times the archive."""
    path = tmp_path / "archive"
    tar(path, ("zeros", bytes(80 * MIB)), mode="w:gz")
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError, match="unpacks to more than"):
        unpack(path, target, max_bytes=1 << 40)


def test_many_entries_stop(tmp_path: Path) -> None:
    """The number of entries is bounded."""
    path = tar(tmp_path / "archive", *((f"f{number}", b"") for number in range(50)))
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError, match="more than 49 entries"):
        unpack(path, target, max_bytes=MIB, max_entries=49)


def test_a_name_of_megabytes_is_not_read(tmp_path: Path) -> None:
    """What a tar says about one entry is bounded: it would be held in memory."""
    info = tarfile.TarInfo("n" * (3 * MIB))
    path = tmp_path / "archive"
    with tarfile.open(path, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(info)
    with pytest.raises(InputError, match=r"bytes about one entry"):
        unpack(path, tmp_path / "out", max_bytes=1 << 30)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_tar_is_damaged(tmp_path: Path, mode: str) -> None:
    """The end within a file is an error, not a short file."""
    path = tar(tmp_path / "archive", ("a", bytes(range(256)) * 4000), mode=mode)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    target = tmp_path / "out"
    target.mkdir()
    with pytest.raises(InputError, match=r"damaged|truncated"):
        unpack(path, target, max_bytes=64 * MIB)


def test_a_truncated_zip_is_damaged(tmp_path: Path) -> None:
    """Without its directory a zip is nothing."""
    path = zipped(tmp_path / "archive", ("a", b"content" * 1000))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged"):
        unpack(path, tmp_path / "out", max_bytes=MIB)
