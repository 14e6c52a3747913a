"""Every reader on damaged input: one line that names the path, or the very same trace; never anything else.

Where a format has no checksum a changed byte may make another valid trace; that is all that is allowed there.
Where a reader leaves tokens out it says so.
"""

from __future__ import annotations

import io
import logging
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from placement.errors import InputError
from tests.traces.importers.samples import SAMPLES, Sample, SglangRecording, small_model, write_sglang_ranks
from tests.traces.importers.samples_passes import Recording, write_megatron, write_tensorrt_counts
from traces.counts import ExpertCounts
from traces.readers import READERS, ReadOptions, open_trace
from traces.source import MemorySource, read_all
from traces.statistics import RoutingStatistics, collect, save
from traces.synthesize import synthesize

Told = Callable[[], str]


def statistics(folder: Path) -> Sample:
    """Saved statistics, which stand in for a trace."""
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=1)
    save(collect(MemorySource(trace), window_tokens=10), folder / "trace.stats")
    return Sample(format="statistics", path=folder / "trace.stats", expected=trace)


EVERY: dict[str, Callable[[Path], Sample]] = {**SAMPLES, "statistics": statistics}

CHECKED = ("dataset", "statistics")
"""Samples whose format has checksums: what is read of them is what was written."""

PARTIAL = ("vllm-arrays",)
"""Folders of independent files: nobody knows how many there were."""

COUNTED_BY_NAME = ("tensorrt-llm-counts", "tensorrt-llm-raw", "megatron", "sglang-per-pass")
"""Files of ranks 0, 1, ... that nowhere say how many ranks there were: a missing last one cannot show."""


def content(sample: Sample, format: str | None = None) -> str:
    """Read all there is; return the digest."""
    opened = open_trace(sample.path, format=format, options=sample.options)
    if isinstance(opened, ExpertCounts):
        return opened.digest
    if isinstance(opened, RoutingStatistics):
        return opened.digest
    return read_all(opened).digest


def outcome(sample: Sample, format: str | None = None) -> str | None:
    """Read all there is; return the digest, or `None` after an error as it should be."""
    try:
        return content(sample, format)
    except InputError as exc:
        line = str(exc)
        assert str(sample.path) in line
        assert "\n" not in line
        assert len(line) < 1000
        return None


def files_of(sample: Sample) -> list[Path]:
    """Return the files of a sample."""
    if sample.path.is_file():
        return [sample.path]
    return sorted(path for path in sample.path.rglob("*") if path.is_file())


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    """What readers told since the last call."""

    def since() -> str:
        text = caplog.text
        caplog.clear()
        return text

    with caplog.at_level(logging.WARNING):
        yield since


def test_every_format_is_here() -> None:
    """Each reader has a sample, so that none escapes."""
    here = {"dataset", "statistics", *(name for name in READERS if any(name in each for each in SAMPLES))}
    assert {"sglang-tokens", *here} == set(READERS)


@pytest.mark.parametrize("name", EVERY)
def test_truncated_files(tmp_path: Path, name: str, told: Told) -> None:
    """Cut at every quarter, and by a single byte, file by file; the empty file among them."""
    sample = EVERY[name](tmp_path)
    whole = content(sample)
    told()
    for file in files_of(sample):
        stored = file.read_bytes()
        for size in (0, len(stored) // 4, len(stored) // 2, len(stored) * 3 // 4, len(stored) - 1):
            file.write_bytes(stored[:size])
            found = outcome(sample)
            said = told()
            assert found in (None, whole) or "was stopped" in said, (file.name, size)
        file.write_bytes(stored)


FOREIGN = {
    "picture": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64),
    "program": b"\x7fELF\x02\x01\x01" + bytes(200),
    "text": b"The experts were consulted, and none of them agreed.\n" * 20,
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "null": b"\x00" * 4096,
    "number": b"3.14159\n",
    "json": b'{"error": "unauthorized"}\n',
    "list": b"[[[1, 2], [3, 4]], null]\n",
    "lines": b'{"step": 1}\n' * 3,
    "noise": random.Random(0).randbytes(5000),
    "protocol": pickle.dumps({"topk": [1, 2, 3]}),
}


def zipped() -> bytes:
    """Return an archive of something else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    return buffer.getvalue()


@pytest.mark.parametrize("name", EVERY)
def test_foreign_files(tmp_path: Path, name: str, told: Told) -> None:
    """In place of each file something that is none; also where the user insists on the format."""
    sample = EVERY[name](tmp_path)
    for file in files_of(sample):
        stored = file.read_bytes()
        for foreign in (*FOREIGN.values(), zipped()):
            file.write_bytes(foreign)
            assert outcome(sample) is None or name in PARTIAL
            assert outcome(sample, sample.format) is None or name in PARTIAL
        file.write_bytes(stored)


@pytest.mark.parametrize("format", READERS)
def test_every_reader_refuses_every_other_format(tmp_path: Path, format: str) -> None:
    """Insisting on a format never makes one file another."""
    model = small_model()
    for name, write in EVERY.items():
        folder = tmp_path / name
        folder.mkdir()
        sample = write(folder)
        if sample.format != format:
            with pytest.raises(InputError) as failure:
                open_trace(sample.path, format=format, options=ReadOptions(model=model))
            assert str(sample.path) in str(failure.value)
            assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", EVERY)
def test_flipped_bytes(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """A byte changed anywhere: an error, or a valid trace; with checksums the same one."""
    sample = EVERY[name](tmp_path_factory.mktemp("whole"))
    whole = content(sample)
    files = [(file, file.read_bytes()) for file in files_of(sample)]

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        which=st.integers(0, len(files) - 1),
        place=st.floats(0, 1, exclude_max=True),
        change=st.integers(1, 255),
    )
    def flip(which: int, place: float, change: int) -> None:
        file, stored = files[which]
        damaged = bytearray(stored)
        damaged[int(place * len(stored))] ^= change
        file.write_bytes(bytes(damaged))
        try:
            found = outcome(sample)
        finally:
            file.write_bytes(stored)
        if name in CHECKED:
            assert found in (None, whole) or file.name.startswith("manifest")

    flip()


@pytest.mark.parametrize("name", EVERY)
def test_removed_files(tmp_path: Path, name: str, told: Told) -> None:
    """A folder without one of its files, or without any."""
    sample = EVERY[name](tmp_path)
    if sample.path.is_file():
        sample.path.unlink()
        assert outcome(sample) is None
        return
    whole = content(sample)
    told()
    files = files_of(sample)
    for file in files:
        stored = file.read_bytes()
        file.unlink()
        found = outcome(sample)
        said = told()
        last = name in COUNTED_BY_NAME and file == files[-1]
        assert found in (None, whole) or name in PARTIAL or said or last, file.name
        file.write_bytes(stored)
    shutil.rmtree(sample.path)
    sample.path.mkdir()
    assert outcome(sample) is None
    assert outcome(sample, sample.format) is None


@pytest.mark.parametrize("name", EVERY)
def test_ids_beyond_the_model(tmp_path: Path, name: str) -> None:
    """A model with fewer experts, layers or choices is noticed, where the format does not say them itself."""
    sample = EVERY[name](tmp_path)
    whole = content(sample)
    for changes in (
        {"num_experts": 4},
        {"num_layers": 2, "moe_layer_ids": (1, 2)},
        {"top_k": 1},
        {"num_layers": 9, "num_decoder_layers": 9, "moe_layer_ids": tuple(range(9))},
    ):
        wrong = Sample(
            format=sample.format,
            path=sample.path,
            expected=sample.expected,
            options=ReadOptions(model=small_model(**changes)),
        )
        found = outcome(wrong)
        if sample.format in ("dataset", "npz", "statistics"):
            assert found == whole


@pytest.mark.parametrize("name", EVERY)
def test_links_to_nowhere(tmp_path: Path, name: str) -> None:
    """A file that is there by name alone cannot be read."""
    sample = EVERY[name](tmp_path)
    file = files_of(sample)[-1]
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    assert outcome(sample) is None or name in PARTIAL


class Evil:
    """Unpickling this leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", EVERY)
def test_code_is_never_run(tmp_path: Path, name: str) -> None:
    """A pickle in place of each file, bare, in a PyTorch archive and in an array of objects."""
    sample = EVERY[name](tmp_path)
    mark = tmp_path / "was_here"
    evil = pickle.dumps(
        {"records": Evil(mark), "logical_count": Evil(mark), "moe_load": Evil(mark)}, protocol=2
    )
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", evil)
        file.writestr("archive/version", "3\n")
    objects = io.BytesIO()
    np.save(objects, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    for path in files_of(sample):
        stored = path.read_bytes()
        for attack in (evil, archive.getvalue(), objects.getvalue()):
            path.write_bytes(attack)
            for format in (None, sample.format):
                assert outcome(sample, format) is None or name in PARTIAL
            assert not mark.exists()
        path.write_bytes(stored)


def test_sizes_that_lie(tmp_path: Path) -> None:
    """Headers that announce more than any memory holds are refused before anything is allocated."""
    header = b'{"50_1":{"dtype":"I64","shape":[1152921504606846976],"data_offsets":[0,8]}}'
    folder = write_tensorrt_counts(tmp_path / "statistics", Recording())
    for lie in (
        len(header).to_bytes(8, "little") + header + bytes(8),
        (1 << 62).to_bytes(8, "little") + header,
    ):
        (folder / "rank1.safetensors").write_bytes(lie)
        with pytest.raises(InputError, match=r"rank1\.safetensors: is damaged or incomplete"):
            open_trace(folder)
    array = (
        b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999999, 4, 2), }"
    )
    (tmp_path / "one.npy").write_bytes(array.ljust(127) + b"\n" + bytes(100))
    with pytest.raises(InputError, match=r"one\.npy"):
        open_trace(tmp_path / "one.npy", options=ReadOptions(model=small_model()))
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("topk.npy", "w") as entry,
    ):
        entry.write(array.ljust(127) + b"\n")
        entry.write(bytes(1 << 22))
    with pytest.raises(InputError, match=r"bomb\.npz"):
        open_trace(tmp_path / "bomb.npz")


def test_rank_files_of_two_models(tmp_path: Path) -> None:
    """Shapes that differ between ranks are named, not mixed."""
    folder = write_tensorrt_counts(tmp_path / "counts", Recording())
    wide = write_tensorrt_counts(tmp_path / "wide", Recording(num_experts=8))
    shutil.copy(wide / "rank1.safetensors", folder)
    with pytest.raises(InputError, match=r"rank1\.safetensors: counts 8 experts in layer 1"):
        open_trace(folder)
    folder = write_megatron(tmp_path / "lines", Recording())
    shutil.copy(write_megatron(tmp_path / "more", Recording(top_k=3)) / "router_trace_rank1.jsonl", folder)
    with pytest.raises(InputError, match="has ranks with top-2 and with top-3"):
        open_trace(folder)
    folder = write_sglang_ranks(SglangRecording(), tmp_path / "dump")
    other = write_sglang_ranks(SglangRecording(num_layers=5), tmp_path / "other")
    name = sorted(file.name for file in folder.iterdir())[1]
    shutil.copy(other / name, folder)
    with pytest.raises(InputError, match=str(folder)):
        read_all(open_trace(folder))  # type: ignore[arg-type]


def test_negative_counts(tmp_path: Path) -> None:
    """A counter that wrapped around is no count."""
    folder = write_tensorrt_counts(tmp_path, Recording())
    counts = load_file(folder / "rank0.safetensors")
    counts["51_2"] = np.array([1, 2, -(2**63), 4, 5, 6])
    save_file(counts, folder / "rank0.safetensors")
    with pytest.raises(InputError, match="counts -9223372036854775808 pairs in layer 2 of iteration 51"):
        open_trace(folder)
