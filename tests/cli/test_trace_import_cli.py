"""``trace import`` and ``trace synthesize`` as users meet them: any format in, whole data sets out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.cli.app import run
from tests.traces.importers.samples import SAMPLES, SglangRecording, small_model, write_sglang_ranks
from tests.traces.importers.samples_passes import Recording, write_heat, write_megatron, write_tensorrt_counts
from traces import conversion
from traces.conversion import JoinedSource, write_source
from traces.counts import ExpertCounts
from traces.readers import ReadOptions, open_trace, read_trace
from traces.source import BLOCK_TOKENS, MemorySource, TraceHeader, TraceSource, read_all
from traces.statistics import collect, save
from traces.store import write_npz
from traces.synthesize import FittedRouting, synthesize
from traces.trace import Trace


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The small model as a file."""
    shape = small_model()
    path = tmp_path / "small.yaml"
    names = ("name", "num_layers", "num_experts", "top_k", "hidden_size", "expert_hidden_size")
    values = {name: getattr(shape, name) for name in (*names, "num_decoder_layers")}
    path.write_text(json.dumps({**values, "moe_layer_ids": list(shape.moe_layer_ids)}))
    return str(path)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must fail as bad input in one line; return the line."""
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def by_rank(trace: Trace) -> Iterator[Any]:
    """Yield each rank's ids: a data set keeps every rank's order, and interleaves the ranks evenly."""
    assert trace.rank_T is not None
    for rank in np.unique(trace.rank_T):
        yield trace.experts_TLK[trace.rank_T == rank]


def test_an_engines_dump_becomes_a_data_set(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens, homes, model and domain are kept; the report says what was written."""
    recording = Recording(num_passes=2)
    folder = write_megatron(tmp_path / "dump", recording)
    out = tmp_path / "set"
    assert (
        run(["trace", "import", str(folder), "-o", str(out), "--model", model, "--domain", "law", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    trace = read_trace(out)
    assert report["tokens"] == trace.num_tokens == recording.trace().num_tokens
    assert (report["num_layers"], report["num_experts"], report["top_k"]) == (3, 6, 2)
    assert report["interrupted"] is False
    assert (trace.model_name, trace.moe_layer_ids, trace.domain_names) == ("small", (1, 2, 3), ("law",))
    for mine, theirs in zip(by_rank(trace), by_rank(recording.trace()), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    "name", [name for name in SAMPLES if "one-rank" in name or "sglang-per-token" in name]
)
def test_a_converted_trace_is_the_same_trace(tmp_path: Path, name: str) -> None:
    """From any format to a data set and on to an archive."""
    sample = SAMPLES[name](tmp_path)
    assert isinstance(sample.expected, Trace)
    source = open_trace(sample.path, options=sample.options)
    assert not isinstance(source, ExpertCounts)
    write_source(source, tmp_path / "set")
    write_source(read_source(tmp_path / "set"), tmp_path / "whole.npz")
    again = read_trace(tmp_path / "whole.npz")
    assert TraceHeader.of(again) == source.header
    for mine, theirs in zip(by_rank(again), by_rank(sample.expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def read_source(path: Path) -> TraceSource:
    """Open a data set."""
    source = open_trace(path)
    assert not isinstance(source, ExpertCounts)
    return source


def test_several_sources_are_domains(tmp_path: Path) -> None:
    """Each gets its name; sequences are numbered on."""
    traces = [
        synthesize(num_tokens=100, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=seed)
        for seed in (0, 1)
    ]
    for number, trace in enumerate(traces):
        write_npz(trace, tmp_path / f"{number}.npz")
    paths = [str(tmp_path / f"{number}.npz") for number in (0, 1)]
    out = tmp_path / "set"
    assert run(["trace", "import", *paths, "-o", str(out), "--domain", "law", "--domain", "code"]) == 0
    whole = read_trace(out)
    assert whole.domain_names == ("law", "code")
    assert whole.domain_T is not None
    assert whole.domain_T.tolist() == [0] * 100 + [1] * 100
    assert whole.sequence_T is not None
    assert whole.sequence_T.tolist() == np.repeat(np.arange(10), 20).tolist()
    # Without names of their own, domains of the same name are the same.
    assert run(["trace", "import", *paths, "-o", str(out), "--overwrite"]) == 0
    both = read_trace(out)
    assert both.domain_names == traces[0].domain_names
    assert both.domain_T is not None
    expected = np.concatenate([trace.domain_T for trace in traces if trace.domain_T is not None])
    np.testing.assert_array_equal(both.domain_T, expected)


def test_append_goes_on_where_the_data_set_ends(tmp_path: Path) -> None:
    """Tokens come after those that are there, sequences are numbered on."""
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=0)
    write_npz(trace, tmp_path / "trace.npz")
    for _ in range(2):
        assert (
            run(["trace", "import", str(tmp_path / "trace.npz"), "-o", str(tmp_path / "set"), "--append"])
            == 0
        )
    whole = read_trace(tmp_path / "set")
    np.testing.assert_array_equal(whole.experts_TLK, np.tile(trace.experts_TLK, (2, 1, 1)))
    assert whole.sequence_T is not None
    assert whole.sequence_T.tolist() == np.repeat(np.arange(6), 20).tolist()


def test_counts_become_json_of_decoder_layers(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts of several files are windows one after the other; dense layers are rows of zeros."""
    recording = Recording()
    heat = write_heat(tmp_path / "heat.pt", recording.load_ILE())
    folder = write_tensorrt_counts(tmp_path / "statistics", recording)
    out = tmp_path / "counts.json"
    arguments = ["trace", "import", str(heat), str(folder), "-o", str(out), "--model", model, "--json"]
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["windows"], report["num_layers"], report["counts_only"]) == (6, 3, True)
    stored = np.array(json.loads(out.read_text())["logical_count"])
    assert stored.shape == (6, 4, 6)
    assert not stored[:, 0].any()
    counts = open_trace(out, options=ReadOptions(model=small_model()))
    assert isinstance(counts, ExpertCounts)
    np.testing.assert_array_equal(counts.load_WLE, np.concatenate([recording.load_ILE()] * 2))
    assert counts.moe_layer_ids == (1, 2, 3)
    assert "is there already" in fails(capsys, arguments)
    line = fails(capsys, ["trace", "import", str(heat), "-o", str(tmp_path / "set"), "--model", model])
    assert "only counts experts; commands take it as TRACE as it is" in line
    assert not (tmp_path / "set").exists()


def test_tokens_and_counts_are_not_mixed(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor are tokens stored as counts, nor statistics as a trace."""
    heat = write_heat(tmp_path / "heat.pt", Recording().load_ILE())
    dump = write_megatron(tmp_path / "dump", Recording())
    out = ["-o", str(tmp_path / "out"), "--model", model]
    assert "import them apart" in fails(capsys, ["trace", "import", str(dump), str(heat), *out])
    line = fails(capsys, ["trace", "import", str(dump), "-o", str(tmp_path / "x.json"), "--model", model])
    assert "not in .json" in line
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=0)
    save(collect(MemorySource(trace), window_tokens=10), tmp_path / "trace.stats")
    assert "holds statistics" in fails(capsys, ["trace", "import", str(tmp_path / "trace.stats"), *out])


def test_a_damaged_source_leaves_nothing(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was there before stays as it was."""
    folder = write_megatron(tmp_path / "dump", Recording(num_steps=4))
    file = folder / "router_trace_rank1.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace("]]", ", 9]]")
    file.write_text("".join(lines))
    out = tmp_path / "set"
    arguments = ["trace", "import", str(folder), "-o", str(out), "--model", model]
    assert "router_trace_rank1.jsonl: line 5 is damaged" in fails(capsys, arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dump", "small.yaml"]
    write_source(MemorySource(Recording().trace()), out)
    before = read_trace(out).digest
    fails(capsys, [*arguments, "--overwrite"])
    assert read_trace(out).digest == before


def test_ctrl_c_keeps_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set is valid and the report says that it is a part."""
    trace = synthesize(
        num_tokens=3 * BLOCK_TOKENS, num_layers=1, num_experts=4, top_k=1, sequence_tokens=512, seed=0
    )
    write_npz(trace, tmp_path / "trace.npz")
    blocks = JoinedSource.blocks

    def interrupted(self: JoinedSource, *arguments: Any, **more: Any) -> Iterator[Trace]:
        for number, block in enumerate(blocks(self, *arguments, **more)):
            if number == 2:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(conversion.JoinedSource, "blocks", interrupted)
    out = tmp_path / "set"
    assert run(["trace", "import", str(tmp_path / "trace.npz"), "-o", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["interrupted"] is True
    assert f"interrupted after {2 * BLOCK_TOKENS} of {3 * BLOCK_TOKENS} tokens" in captured.err
    np.testing.assert_array_equal(read_trace(out).experts_TLK, trace.experts_TLK[: 2 * BLOCK_TOKENS])


def test_outputs_that_are_there_are_not_overwritten_by_chance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor are folders of other things, ever."""
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=0)
    write_npz(trace, tmp_path / "trace.npz")
    source = str(tmp_path / "trace.npz")
    out = tmp_path / "set"
    assert run(["trace", "import", source, "-o", str(out)]) == 0
    capsys.readouterr()
    assert "is not empty; choose another output" in fails(capsys, ["trace", "import", source, "-o", str(out)])
    assert "contradict each other" in fails(
        capsys, ["trace", "import", source, "-o", str(out), "--overwrite", "--append"]
    )
    (tmp_path / "file").write_text("")
    assert "is a file" in fails(capsys, ["trace", "import", source, "-o", str(tmp_path / "file")])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("important")
    assert "other files" in fails(capsys, ["trace", "import", source, "-o", str(other), "--overwrite"])
    assert (other / "thesis.tex").read_text() == "important"
    assert "is there already" in fails(capsys, ["trace", "import", source, "-o", source])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--domain", "a", "--domain", "b"], "--domain is given 2 times for 1 sources"),
        (["--from", "vllm-omni"], "known formats: dataset"),
        (["--model", "gpt-5"], "gpt-5"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    """In one line, and nothing is written."""
    dump = write_megatron(tmp_path / "dump", Recording())
    assert message in fails(capsys, ["trace", "import", str(dump), "-o", str(tmp_path / "set"), *more])
    assert not (tmp_path / "set").exists()


def test_sources_of_two_models_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the names of both and what differs."""
    for number, experts in enumerate((8, 9)):
        trace = synthesize(
            num_tokens=60, num_layers=2, num_experts=experts, top_k=2, sequence_tokens=20, seed=0
        )
        write_npz(trace, tmp_path / f"{number}.npz")
    paths = [str(tmp_path / f"{number}.npz") for number in (0, 1)]
    line = fails(capsys, ["trace", "import", *paths, "-o", str(tmp_path / "set")])
    assert "1.npz: is another model's than" in line
    assert "num_experts 9 against 8" in line


def test_several_ranks_of_an_engine_keep_their_homes(tmp_path: Path) -> None:
    """A data set of an SGLang dump knows where each token came from."""
    recording = SglangRecording()
    path = write_sglang_ranks(recording, tmp_path / "dump")
    assert run(["trace", "import", str(path), "-o", str(tmp_path / "set")]) == 0
    trace = read_trace(tmp_path / "set")
    for mine, theirs in zip(by_rank(trace), by_rank(recording.expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


# ------------------------------------------------------------------------------------------------- synthesize


def test_synthesize_from_knobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A seeded trace of the size asked for."""
    sizes = ["--layers", "2", "--experts", "16", "--top-k", "4", "--domains", "3", "--tokens", "5000"]
    for name in ("a", "b"):
        assert run(["trace", "synthesize", "-o", str(tmp_path / name), *sizes, "--seed", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (report["tokens"], report["num_layers"], report["num_experts"], report["top_k"]) == (
        5000,
        2,
        16,
        4,
    )
    first, second = (read_trace(tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest
    assert len(first.domain_names) == 3


def test_synthesize_like_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the trace, from its statistics without tokens, from the router that was fitted: the same trace."""
    trace = synthesize(num_tokens=4096, num_layers=2, num_experts=8, top_k=2, sequence_tokens=64, seed=0)
    write_npz(trace, tmp_path / "real.npz")
    stats = ["-o", str(tmp_path / "real.stats"), "--no-sample", "--window", "256"]
    assert run(["trace", "statistics", str(tmp_path / "real.npz"), *stats]) == 0
    fit = str(tmp_path / "router.npz")
    for name, like, more in (
        ("a", "real.npz", ["--window", "256", "--save-fit", fit]),
        ("b", "real.stats", []),
        ("c", "router.npz", []),
    ):
        out = ["-o", str(tmp_path / name), "--like", str(tmp_path / like), "--seed", "1"]
        assert run(["trace", "synthesize", *out, *more]) == 0
    digests = {read_trace(tmp_path / name).digest for name in ("a", "b", "c")}
    assert len(digests) == 1
    assert FittedRouting.load(fit).num_windows == 16
    drawn = read_trace(tmp_path / "a")
    assert drawn.num_tokens == 4096
    rows = {row.tobytes() for row in trace.experts_TLK.reshape(4096, -1)}
    assert len({row.tobytes() for row in drawn.experts_TLK.reshape(4096, -1)} - rows) > 0
    capsys.readouterr()
    line = fails(capsys, ["trace", "synthesize", "-o", str(tmp_path / "d"), "--like", fit, "--window", "9"])
    assert "--window needs a trace to fit" in line


def test_synthesize_like_counts_warns(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loads alone are imitated, and the user is told."""
    heat = write_heat(tmp_path / "heat.pt", Recording(num_tokens=500).load_ILE())
    assert run(["trace", "synthesize", "-o", str(tmp_path / "a"), "--like", str(heat), "--model", model]) == 0
    assert "knows loads alone" in capsys.readouterr().err
    assert read_all(read_source(tmp_path / "a")).model_name == "small"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--like", "nowhere"], "nowhere: does not exist"),
        (["--experts", "4", "--top-k", "5"], "top_k is 5 of 4 experts"),
        (["--tokens", "0"], "num_tokens is 0"),
        (["--window", "9"], "--window needs --like"),
        (["--like", "{npz}", "--experts", "4"], "--experts has no meaning beside --like"),
        (["--like", "{npz}", "--window", "100000"], "window"),
    ],
)
def test_synthesize_refuses_what_makes_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    """In one line, and nothing is written."""
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=0)
    write_npz(trace, tmp_path / "trace.npz")
    given = [option.format(npz=tmp_path / "trace.npz") for option in more]
    assert message in fails(capsys, ["trace", "synthesize", "-o", str(tmp_path / "out"), *given])
    assert not (tmp_path / "out").exists()
