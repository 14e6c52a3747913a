"""``trace info``, ``merge`` and ``window`` on the command line: any trace in, errors on one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.cli.app import run
from traces.readers import read_trace
from traces.store import DatasetSource, DatasetWriter, read_dataset, write_dataset, write_npz
from traces.synthesize import synthesize
from traces.trace import Trace

SAMPLE = Path(__file__).parents[2] / "placement" / "samples" / "traces" / "byte16.npz"
RECORDED = Path(__file__).parents[1] / "data" / "traces" / "recorded"


def small_trace(num_tokens: int = 64, seed: int = 0, **changes: Any) -> Trace:
    trace = synthesize(
        num_tokens=num_tokens, num_layers=2, num_experts=8, top_k=2, sequence_tokens=8, seed=seed
    )
    kept = {name: getattr(trace, name) for name in ("experts_TLK", "num_experts", "sequence_T")}
    domain_T = np.arange(num_tokens) // 8 % 2
    return Trace(**{**kept, "domain_T": domain_T, "domain_names": ("code", "prose"), **changes})


@pytest.fixture
def data_set(tmp_path: Path) -> str:
    write_dataset(small_trace(), tmp_path / "set", fragment_tokens=20)
    return str(tmp_path / "set")


def succeeds(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must succeed; return what it printed."""
    capsys.readouterr()
    code = run(["trace", *arguments])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return captured.out


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with exit code 2 and one line; return the line."""
    capsys.readouterr()
    assert run(["trace", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_info_of_a_data_set_says_how_it_is_stored(capsys: pytest.CaptureFixture[str], data_set: str) -> None:
    """Sizes, shards and domains; as one object or as tables."""
    found = json.loads(succeeds(capsys, "info", data_set, "--json"))
    assert (found["num_tokens"], found["stored"]["fragments"], found["stored"]["shards"]) == (64, 4, 1)
    assert found["domain_tokens"] == {"code": 32, "prose": 32}
    assert found["digest"] == DatasetSource(data_set).digest
    printed = succeeds(capsys, "info", data_set)
    assert "4 fragments of 1" in printed
    assert "top-2 of 8 experts" in printed


def test_info_takes_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever the data set lies."""
    write_dataset(small_trace(), "memory://cli-info/set", overwrite=True)
    assert json.loads(succeeds(capsys, "info", "memory://cli-info/set", "--json"))["num_tokens"] == 64


def test_info_of_counts_says_what_they_serve(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A dump that counts experts is summed up, with the objectives that it can and cannot decide."""
    count_WLE = np.ones((2, 32, 8), dtype=int)
    count_WLE[:, 1] = [9, 7, 0, 0, 0, 0, 0, 0]
    count_WLE[:, 0] = 2
    (tmp_path / "counts.json").write_text(json.dumps({"logical_count": count_WLE.tolist()}))
    arguments = ("info", str(tmp_path / "counts.json"), "--model", "mixtral-8x7b")
    found = json.loads(succeeds(capsys, *arguments, "--json"))
    assert (found["num_windows"], found["num_layers"], found["top_k"]) == (2, 32, 2)
    assert found["serves"] == {
        "balance": ["dispatch", "dispatch-nodedup", "allgather"],
        "step-time": ["dispatch-nodedup", "allgather"],
        "traffic": [],
    }
    assert found["layers"][1] == {
        "layer": 1,
        "decoder_layer": 1,
        "busiest_over_mean": 4.5,
        "coefficient_of_variation": 1.75,
        "active_experts": 2,
    }
    printed = succeeds(capsys, *arguments)
    assert "expert counts, not which experts each token selected" in printed
    assert "cannot serve" in printed


def test_window_cuts_folds_that_score_on_what_was_not_seen(
    capsys: pytest.CaptureFixture[str], data_set: str, tmp_path: Path
) -> None:
    """Even and odd windows of one trace, as data set and as archive."""
    fit, score = str(tmp_path / "fit"), str(tmp_path / "score.npz")
    printed = succeeds(capsys, "window", data_set, "-o", fit, "--fold", "even", "--window", "10")
    assert printed == f"{fit}: 30 of 64 tokens\n"
    found = json.loads(
        succeeds(capsys, "window", data_set, "-o", score, "--fold", "odd", "--window", "10", "--json")
    )
    assert found == {"path": score, "tokens": 30, "of_tokens": 64}
    expected = small_trace().split_alternate(10)
    assert (read_trace(fit).digest, read_trace(score).digest) == tuple(trace.digest for trace in expected)


def test_window_cuts_by_tokens_domains_and_sequences(
    capsys: pytest.CaptureFixture[str], data_set: str, tmp_path: Path
) -> None:
    """Choices add up; the manifest says where the tokens come from."""
    out = str(tmp_path / "out")
    succeeds(capsys, "window", data_set, "-o", out, "--start", "8", "--stop", "40", "--domain", "prose")
    back = read_dataset(out)
    assert back.sequence_T is not None
    assert back.sequence_T.tolist() == [1] * 8 + [3] * 8
    provenance = DatasetSource(out).manifests[0].provenance
    assert provenance["cut"] == {"start": 8, "stop": 40, "domains": ["prose"]}
    assert provenance["digest"] == DatasetSource(data_set).digest
    succeeds(capsys, "window", data_set, "-o", out, "--sample-sequences", "0.5", "--seed", "1", "--overwrite")
    assert 0 < read_dataset(out).num_tokens < 64


def test_window_converts_any_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a cut the whole trace is written: an old data set becomes one of today's."""
    succeeds(capsys, "window", str(RECORDED), "-o", str(tmp_path / "new"))
    assert DatasetSource(tmp_path / "new").is_current
    assert read_dataset(tmp_path / "new").digest == read_dataset(RECORDED).digest
    succeeds(capsys, "window", str(SAMPLE), "-o", str(tmp_path / "some"), "--stop", "100")
    assert read_dataset(tmp_path / "some").domain_names[:2] == ("cpp", "fiction_en")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fold", "even"), "say how many tokens with --window"),
        (("--window", "8"), "--window has no effect by itself"),
        (("--fold", "both", "--window", "8"), "fold 'both' is unknown"),
        (("--domain", "law"), "set: no domain is called 'law'; there are 'code', 'prose'"),
        (("--start", "65"), "set: tokens 65 to 64 are asked for of a trace of 64"),
        (("--sample-sequences", "2"), "share of 2 of the sequences"),
        (("--start", "8", "--stop", "8"), "no token is kept"),
    ],
)
def test_window_refuses_what_makes_no_sense(
    capsys: pytest.CaptureFixture[str], data_set: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """One line, exit code 2, nothing written."""
    assert message in fails(capsys, "window", data_set, "-o", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_merge_links_data_sets_and_converts_others(
    capsys: pytest.CaptureFixture[str], data_set: str, tmp_path: Path
) -> None:
    """A data set, an archive and an old data set of the same shape become one; inputs stay as they are."""
    write_npz(small_trace(16, 1), tmp_path / "a.npz")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in Path(data_set).iterdir())
    out = str(tmp_path / "out")
    printed = succeeds(capsys, "merge", data_set, str(tmp_path / "a.npz"), "-o", out, "--ranks", "renumber")
    assert printed == f"{out}: 80 tokens of 2 traces, 2 ranks\n"
    back = read_dataset(out)
    np.testing.assert_array_equal(
        back.experts_TLK, np.concatenate([small_trace().experts_TLK, small_trace(16, 1).experts_TLK])
    )
    assert sorted((path.name, path.stat().st_mtime_ns) for path in Path(data_set).iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "out", "set"]
    merged = DatasetSource(out).manifests[0].provenance["merged"]
    assert merged == [data_set, str(tmp_path / "a.npz")]
    found = json.loads(
        succeeds(capsys, "merge", str(RECORDED), str(RECORDED), "-o", out, "--overwrite", "--json")
    )
    assert (found["tokens"], found["ranks"]) == (48, 2)


def test_merge_refuses_what_does_not_belong_together(
    capsys: pytest.CaptureFixture[str], data_set: str, tmp_path: Path
) -> None:
    """Other shapes, outputs that are there, unknown ways: one line each, naming both sides."""
    other = Trace(experts_TLK=small_trace().experts_TLK, num_experts=9)
    write_npz(other, tmp_path / "other.npz")
    out = str(tmp_path / "out")
    message = fails(capsys, "merge", data_set, str(tmp_path / "other.npz"), "-o", out)
    assert "other.npz: cannot be merged with" in message
    assert "num_experts 9 against 8" in message
    assert "is one of the data sets to merge" in fails(capsys, "merge", data_set, "-o", data_set)
    assert "--ranks 'mix' is unknown" in fails(capsys, "merge", data_set, "-o", out, "--ranks", "mix")
    assert "is no folder" in fails(capsys, "merge", data_set, "-o", out + ".npz")
    assert not (tmp_path / "out").exists()


def test_a_spool_left_by_a_crash_is_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Writing over it is refused; reading goes on with what was flushed."""
    out = DatasetWriter(tmp_path / "set", num_layers=2, num_experts=8, top_k=2, fragment_tokens=6)
    out.append(small_trace(8).experts_TLK)
    assert json.loads(succeeds(capsys, "info", str(tmp_path / "set"), "--json"))["num_tokens"] == 6
    out.close()
