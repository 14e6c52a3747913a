"""Tests of `traces.importers.sglang_counts` and `sglang_stat`: counts of experts, dense layers dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from tests.traces.importers.samples import small_model
from traces.counts import ExpertCounts
from traces.importers import sglang_counts
from traces.importers.sglang_counts import summed_steps
from traces.readers import ReadOptions, open_trace, read_trace

MODEL = ReadOptions(model=small_model())


def opened(path: Path, options: ReadOptions = MODEL) -> ExpertCounts:
    counts = open_trace(path, options=options)
    assert isinstance(counts, ExpertCounts)
    return counts


def refusal(path: Path, options: ReadOptions = MODEL) -> str:
    """Read what must not be readable; return the one line without the path."""
    with pytest.raises(InputError) as caught:
        open_trace(path, options=options)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def counts_of(num_steps: int = 1, num_layers: int = 4, num_experts: int = 6) -> Any:
    """Counts of which those of layer 0 are zero."""
    count = np.arange(num_steps * num_layers * num_experts).reshape(num_steps, num_layers, num_experts) + 1
    count[:, 0] = 0
    return count


def as_json(path: Path, count: Any) -> Path:
    path.write_text(json.dumps({"logical_count": count.tolist()}))
    return path


def as_stat(path: Path, count: Any, **entries: Any) -> Path:
    torch.save({"rank": 0, "logical_count": torch.from_numpy(count.astype(np.int32)), **entries}, path)
    return path


@pytest.mark.parametrize("write", [as_json, as_stat])
def test_one_sum_is_one_window(tmp_path: Path, write: Any) -> None:
    """A file may hold the sum over all steps; layers are the model's MoE layers."""
    counts = opened(write(tmp_path / "a", counts_of()[0]))
    assert counts.load_WLE.tolist() == counts_of()[:, 1:].tolist()
    assert (counts.top_k, counts.model_name, counts.moe_layer_ids) == (2, "small", (1, 2, 3))


@pytest.mark.parametrize("write", [as_json, as_stat])
def test_steps_are_windows(tmp_path: Path, write: Any) -> None:
    """Steps in which nothing was routed are left out."""
    count = counts_of(3)
    count[1] = 0
    assert opened(write(tmp_path / "a", count)).load_WLE.tolist() == count[[0, 2], 1:].tolist()


def test_moe_layers_alone_are_fine(tmp_path: Path) -> None:
    """Some versions leave dense layers out."""
    counts = opened(as_json(tmp_path / "a", counts_of()[:, 1:]))
    assert counts.load_WLE.tolist() == counts_of()[:, 1:].tolist()


def test_a_model_is_known_by_its_shape(tmp_path: Path) -> None:
    """61 layers of 256 experts are DeepSeek-V3's: three dense ones, top-8."""
    count = np.ones((61, 256), dtype=int)
    count[:3] = 0
    counts = opened(as_json(tmp_path / "a.json", count), ReadOptions())
    assert counts.load_WLE.shape == (1, 58, 256)
    assert (counts.top_k, counts.model_name) == (8, "deepseek-v3")
    assert counts.moe_layer_ids == tuple(range(3, 61))


def test_unknown_models_must_be_named(tmp_path: Path) -> None:
    """Top-k is not in the file, and nobody guesses it."""
    message = refusal(as_json(tmp_path / "a.json", counts_of()), ReadOptions())
    assert "counts 4 layers of 6 experts, which no known model has alone" in message
    assert "name the model with --model" in message


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (counts_of(1, 4, 7), "counts 7 experts, small has 6"),
        (counts_of(1, 2), "has 2 layers, the model 3 MoE layers"),
        (counts_of() + 1, "counts tokens in layer 0, which is dense"),
        (counts_of() * [1, 1, 1, 1, 1, 0] * 0, "every count is zero"),
        (-counts_of(), "the count of step 0 layer 3 expert 5 is -24; counts are not negative"),
    ],
)
@pytest.mark.parametrize("write", [as_json, as_stat])
def test_counts_that_are_not_the_models_are_refused(
    tmp_path: Path, write: Any, count: Any, message: str
) -> None:
    """Both formats refuse them in the same words."""
    assert message in refusal(write(tmp_path / "a", count))


def test_counts_that_wrapped_around_are_named_as_such(tmp_path: Path) -> None:
    """The engine sums in 32 bits: past 2^31 a count turns negative."""
    count = counts_of()
    count[0, 2, 1] = 2**31 - 2**32
    message = refusal(as_stat(tmp_path / "a.pt", count))
    assert "is -2147483648" in message
    assert "counts of 32 bits wrap around past 2^31: dump more often" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"logical_count": [[NaN, 1]]}', "NaN is no JSON number"),
        ('{"logical_count": [[Infinity, 1]]}', "Infinity is no JSON number"),
        ('{"logical_count": [[1.5, 1]]}', "holds 1.5, which is no whole number"),
        ('{"logical_count": [[1e300, 1]]}', "holds 1e+300, which is no whole number"),
        ('{"logical_count": [[1], [1, 2]]}', "rows of different lengths"),
        ('{"logical_count": [["a", "b"]]}', "not numbers"),
        ('{"logical_count": [1, 2]}', "not numbers [layers][experts]"),
        ('{"logical_count": [[]]}', "not numbers [layers][experts]"),
        ('{"logical_count": [[1, 2]', "is not valid JSON"),
        ('{"logical_count": [[1, 2]]} and', "is not valid JSON"),
        ('{"logical_count": ' + "[" * 100_000, "nested too deeply"),
        ('{"logical_count": [' + "9" * 5000 + "]}", "is not valid JSON"),
        ('{"a": {"logical_count": [[1]]}}', "has no logical_count"),
        (b'{"logical_count": [[1]], "\xff": 0}', "is not text in UTF-8"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    """One line each, whatever is wrong."""
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(path)


def test_json_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size is looked at first."""
    from traces.importers import json_file

    monkeypatch.setattr(json_file, "LIMIT_RECORD_BYTES", 100)
    assert "more than 100; cut it in parts" in refusal(as_json(tmp_path / "a.json", counts_of(9)))


def test_byte_order_marks_are_passed_over(tmp_path: Path) -> None:
    """Files that went through Windows begin with one."""
    content = json.dumps({"logical_count": counts_of().tolist()}).encode()
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert opened(tmp_path / "a.json").num_windows == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rank": 0, "logical_count": [1]}, "logical_count is list, not a tensor"),
        ({"rank": 0, "logical_count": torch.ones(2, 4, 6)}, "is float32 [2, 4, 6], not integers"),
        ({"rank": 0, "logical_count": torch.ones(4, dtype=torch.int32)}, "is int32 [4], not integers"),
        ({"rank": 0, "b": {"logical_count": 1}}, "has no logical_count"),
    ],
)
def test_damaged_stat_dumps_are_named(tmp_path: Path, content: Any, message: str) -> None:
    """One line each, whatever is wrong."""
    torch.save(content, tmp_path / "a.pt")
    assert message in refusal(tmp_path / "a.pt")


def test_dumps_of_a_folder_follow_one_another(tmp_path: Path) -> None:
    """In the order of their names, which hold the time."""
    count = counts_of(3)
    as_stat(tmp_path / "recorder_2.pt", count[2])
    as_stat(tmp_path / "recorder_1.pt", count[:2])
    assert opened(tmp_path).load_WLE.tolist() == count[:, 1:].tolist()


def test_dumps_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    """Other shapes, or the same sums from another rank."""
    as_stat(tmp_path / "a.pt", counts_of())
    as_stat(tmp_path / "b.pt", counts_of(1, 4, 7))
    assert "b.pt: counts [4, 7] [layers, experts], others [4, 6]" in refusal(tmp_path)
    as_stat(tmp_path / "b.pt", counts_of(), rank=1)
    assert "b.pt: is of rank 1, others of rank 0" in refusal(tmp_path)


def test_counts_are_no_tokens(tmp_path: Path) -> None:
    """Who asks for tokens is told."""
    with pytest.raises(InputError, match="holds expert counts, not which experts each token selected"):
        read_trace(as_json(tmp_path / "a.json", counts_of()), options=MODEL)


@settings(max_examples=50, deadline=None)
@given(num_steps=st.integers(1, 20), limit=st.integers(1, 300))
def test_long_recordings_keep_their_sum(num_steps: int, limit: int) -> None:
    """Neighbouring steps are summed until they fit; no pair is lost."""
    count = counts_of(num_steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang_counts, "LIMIT_COUNTS", limit)
        few = summed_steps(count)
    assert few.sum(axis=0).tolist() == count.sum(axis=0).tolist()
    assert few.size <= max(limit, 24)
