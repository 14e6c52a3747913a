"""Tests of `sglang_response` and `vllm`: routed experts in responses and arrays become sequences."""

from __future__ import annotations

import base64
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.model import preset_model
from tests.traces.importers.samples import answered, base64_npy, base64_raw, routed, small_model
from traces import files
from traces.counts import ExpertCounts
from traces.importers import json_file
from traces.importers.json_file import json_records, read_record
from traces.readers import ReadOptions, open_trace
from traces.source import TraceSource, read_all

MODEL = ReadOptions(model=small_model())
IDS, TRACE = answered(np.random.default_rng(0), [5])


def opened(path: Path, options: ReadOptions = MODEL, format: str | None = None) -> TraceSource:
    source = open_trace(path, options=options, format=format)
    assert not isinstance(source, ExpertCounts)
    return source


def refusal(path: Path, options: ReadOptions = MODEL, format: str | None = None) -> str:
    """Read what must not be readable; return the one line without the path."""
    with pytest.raises(InputError) as caught:
        read_all(opened(path, options, format))
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message.removeprefix(str(path))


def lines(path: Path, *values: Any) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def native(ids: Any, **about: Any) -> dict[str, Any]:
    """A response of SGLang's own endpoint."""
    counts = {"prompt_tokens": 1, "completion_tokens": len(ids)}
    return {"text": "a", "meta_info": {**counts, "routed_experts": base64_raw(ids), **about}}


# ----------------------------------------------------------------------------------------------------- SGLang


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_responses_of_any_length_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int
) -> None:
    """Ids, sequences and positions come back, in any block size."""
    arrays, expected = answered(np.random.default_rng(seed), lengths)
    path = lines(tmp_path_factory.mktemp("r") / "a.jsonl", *(native(ids) for ids in arrays))
    source = opened(path)
    assert source.digest == expected.digest
    assert sum(block.num_tokens for block in source.blocks(max_tokens=2)) == expected.num_tokens


def test_responses_that_start_late_say_where(tmp_path: Path) -> None:
    """Tokens that were not asked for come before the first."""
    trace = read_all(opened(lines(tmp_path / "a", native(IDS[0], prompt_tokens=4))))
    assert trace.position_T is not None
    assert trace.position_T.tolist() == [3, 4, 5, 6, 7]


def test_without_numbers_of_tokens_positions_are_unknown(tmp_path: Path) -> None:
    """Nothing is made up."""
    trace = read_all(opened(lines(tmp_path / "a", native(IDS[0], prompt_tokens=None))))
    assert trace.position_T is None
    assert trace.sequence_T is not None


def test_the_serving_rank_is_the_home(tmp_path: Path) -> None:
    """Where every response names it."""
    both = (native(IDS[0], dp_rank=3), native(IDS[0], dp_rank=1))
    trace = read_all(opened(lines(tmp_path / "a", *both)))
    assert trace.rank_T is not None
    assert trace.rank_T.tolist() == [3] * 5 + [1] * 5
    assert read_all(opened(lines(tmp_path / "a", both[0], native(IDS[0])))).rank_T is None


def test_moe_layers_alone_are_fine(tmp_path: Path) -> None:
    """The number of tokens tells whether dense layers are listed."""
    trace = read_all(opened(lines(tmp_path / "a", native(IDS[0][:, 1:]))))
    assert trace.experts_TLK.tolist() == TRACE.experts_TLK.tolist()


def test_the_model_is_known_by_the_number_of_ids(tmp_path: Path) -> None:
    """61 layers of top-8 with ids above 255 are Kimi-K2's, of which one layer is dense."""
    ids = routed(np.random.default_rng(0), 3, 61, 384, 8)
    ids[0, 5] = np.arange(300, 308)
    header = opened(lines(tmp_path / "a", native(ids)), ReadOptions()).header
    assert (header.num_layers, header.num_experts, header.top_k) == (60, 384, 8)
    assert (header.model_name, header.moe_layer_ids) == ("kimi-k2", tuple(range(1, 61)))


@pytest.mark.parametrize("value", [base64_raw, base64_npy])
def test_the_servers_name_of_the_model_is_heeded(tmp_path: Path, value: Any) -> None:
    """Where it is one that is known; with ids below 256 the shape alone would fit two models."""
    ids = routed(np.random.default_rng(0), 3, 61, 256, 8)
    usage = {"prompt_tokens": 1, "completion_tokens": 3}
    about = {"usage": usage, "choices": [{"routed_experts": value(ids)}]}
    named = opened(lines(tmp_path / "a", {"model": "deepseek-ai/DeepSeek-V3", **about}), ReadOptions()).header
    assert (named.model_name, named.num_layers, named.num_experts) == ("deepseek-v3", 58, 256)


def test_names_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    """Servers name models as they like; then the user must."""
    ids = routed(np.random.default_rng(0), 3, 61, 256, 8)
    response = {"model": "mine", **native(ids)}
    assert "name the model with --model" in refusal(lines(tmp_path / "b", response), ReadOptions())


def test_unknown_models_must_be_named(tmp_path: Path) -> None:
    """Bare ids say neither layers nor k."""
    message = refusal(lines(tmp_path / "a", native(IDS[0])), ReadOptions())
    assert (
        "record 1: does not say how many layers and experts there are; name the model with --model" in message
    )


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (native(IDS[0] + 3), "names expert"),
        (native(IDS[0] - 9), "record 1: token 0 layer 0 names expert -"),
        (native(IDS[0][:, :, :1]), "record 1: routed_experts holds 20 ids, which is no number of tokens"),
        (native(IDS[0], completion_tokens=2), "record 1: routed_experts holds 40 ids, which is no number"),
        (native(IDS[0], routed_experts="ab?="), "which is no base64"),
        (native(IDS[0], routed_experts="a" * 7), "has 7 characters, which is no base64"),
        (native(IDS[0], routed_experts=base64_npy(IDS[0])), "is no base64 of bare ids"),
        (native(IDS[0], routed_experts=""), "holds no routed experts"),
        ({"text": "a", "meta_info": {}}, "holds no routed experts"),
        (3, "record 1 is int, not a response"),
    ],
)
def test_damaged_responses_are_named(tmp_path: Path, response: Any, message: str) -> None:
    """The record is said, and what is wrong with it."""
    assert message in refusal(lines(tmp_path / "a", response), format="sglang-response")


def test_responses_of_another_model_are_named(tmp_path: Path) -> None:
    """Later responses are held to the first."""
    other = native(np.zeros((3, 3, 3)), prompt_tokens=None)
    message = refusal(lines(tmp_path / "a", native(IDS[0]), other))
    assert "record 2: routed_experts holds 27 ids, 8 belong to a token of small" in message


def test_records_of_proxies_are_understood(tmp_path: Path) -> None:
    """The response lies beside its request, the ids in a choice."""
    choice = {"index": 0, "meta_info": native(IDS[0])["meta_info"]}
    path = lines(tmp_path / "a", {"request": {"text": "q"}, "response": {"choices": [choice]}})
    assert read_all(opened(path)).digest == TRACE.digest


# ------------------------------------------------------------------------------------------------------- vLLM


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_arrays_of_any_length_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seed: int
) -> None:
    """Folders, archives and responses give the same trace."""
    arrays, expected = answered(np.random.default_rng(seed), lengths)
    folder = tmp_path_factory.mktemp("v")
    (folder / "files").mkdir()
    for number, ids in enumerate(arrays):
        np.save(folder / "files" / f"{number}.npy", ids.astype(np.uint8))
    np.savez(folder / "a.npz", *(ids.astype(np.uint16) for ids in arrays))
    lines(folder / "a.jsonl", *({"choices": [{"routed_experts": base64_npy(ids)}]} for ids in arrays))
    for path in (folder / "files", folder / "a.npz", folder / "a.jsonl"):
        assert opened(path).digest == expected.digest


@pytest.mark.parametrize("form", ["lists", "object"])
def test_other_forms_of_arrays_are_read(tmp_path: Path, form: str) -> None:
    """Nested lists, or an object that tells the shape."""
    ids = IDS[0]
    bare = base64.b64encode(ids.astype("<u2").tobytes()).decode()
    value = ids.tolist() if form == "lists" else {"data": bare, "shape": list(ids.shape), "dtype": "uint16"}
    path = lines(tmp_path / "a", {"choices": [{"routed_experts": value}]})
    assert read_all(opened(path)).digest == TRACE.digest


def test_dense_layers_show_without_a_model(tmp_path: Path) -> None:
    """Layers whose ids are all alike were never filled in; experts are counted by the largest id."""
    ids = IDS[0].copy()
    np.save(tmp_path / "a.npy", ids)
    header = opened(tmp_path / "a.npy", ReadOptions()).header
    assert header.moe_layer_ids == (1, 2, 3)
    assert header.num_experts == int(ids.max()) + 1


def test_a_known_model_tells_the_experts(tmp_path: Path) -> None:
    """24 layers of top-4 are gpt-oss-20b's, whose last experts may never have been selected."""
    np.save(tmp_path / "a.npy", routed(np.random.default_rng(0), 4, 24, 30, 4).astype(np.uint8))
    assert opened(tmp_path / "a.npy", ReadOptions()).header.num_experts == 32
    named = opened(tmp_path / "a.npy", ReadOptions(model=preset_model("gpt-oss-20b"))).header
    assert (named.num_experts, named.model_name) == (32, "gpt-oss-20b")


def test_every_token_gets_the_domain_asked_for(tmp_path: Path) -> None:
    """What kind of traffic it was is for the user to say."""
    np.save(tmp_path / "a.npy", IDS[0])
    source = opened(tmp_path / "a.npy", ReadOptions(model=small_model(), domain="code"))
    assert source.header.domain_names == ("code",)
    assert source.digest == read_all(source).digest


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    """A range of tokens opens the files that hold them, and no others."""
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", IDS[0])
    source = opened(tmp_path)
    (tmp_path / "a.npy").unlink()
    assert sum(block.num_tokens for block in source.blocks(7)) == 8
    with pytest.raises(InputError, match=r"a\.npy: cannot be read"):
        read_all(source)


def test_arrays_of_different_models_are_refused(tmp_path: Path) -> None:
    """Layers and k are the same in all of them."""
    np.save(tmp_path / "a.npy", IDS[0])
    np.save(tmp_path / "b.npy", IDS[0][:, 1:])
    assert "holds arrays of 3 layers x top-2 and of 4 x top-2" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 4, 2)), "a.npy: is float64 [3, 4, 2], not integer expert ids"),
        (np.zeros((3, 4), int), "a.npy: is int64 [3, 4], not integer expert ids"),
        (np.array([[["x"]]], dtype=object), "a.npy: is object [1, 1, 1], not integer expert ids"),
        (np.zeros((0, 4, 2), int), "holds no token"),
        (IDS[0] + 5, "a.npy: token 0 layer 0 names expert"),
        (IDS[0] - 6, "a.npy: token 0 layer 0 names expert -"),
        (IDS[0][:, :, :1], "routes to top-1, small to top-2"),
        (IDS[0][:, :2], "has 2 layers, small 3 MoE layers"),
    ],
)
def test_arrays_that_are_no_ids_are_named(tmp_path: Path, array: Any, message: str) -> None:
    """The file is said, and what is wrong with it; nothing is unpickled."""
    np.save(tmp_path / "a.npy", array)
    assert message in refusal(tmp_path, format="vllm")


def test_arrays_of_one_expert_for_all_route_nothing(tmp_path: Path) -> None:
    """All layers dense means that nothing was captured."""
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 2), int))
    assert "routes nothing" in refusal(tmp_path / "a.npy", ReadOptions())


def lying_npy(shape: str, body: bytes) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


@pytest.mark.parametrize("shape", ["(99999999999, 4, 2)", "(1, 4, 3)", "(-1, -4, 2)"])
def test_headers_that_lie_are_refused(tmp_path: Path, shape: str) -> None:
    """No room is made for what is not there, in a file, an archive or a response."""
    content = lying_npy(shape, bytes(8))
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    lines(tmp_path / "a.json", {"choices": [{"routed_experts": base64.b64encode(content).decode()}]})
    for path in (tmp_path / "f", tmp_path / "a.npz", tmp_path / "a.json"):
        assert ("is damaged" if "-" in shape else "bytes long") in refusal(path, format="vllm")


def test_bombs_are_refused_before_they_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those that the archive declares."""
    monkeypatch.setattr(files, "_RATIO_MATTERS_BYTES", 1 << 16)
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros((1 << 18, 4, 2), np.uint8))
    assert "over 100 times its size" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_truncated_files_are_named(tmp_path: Path, kept: float) -> None:
    """Wherever the copy stopped."""
    buffer = io.BytesIO()
    np.savez(buffer, a=IDS[0], b=IDS[0])
    (tmp_path / "a.npz").write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * kept)])
    assert "is damaged or incomplete" in refusal(tmp_path / "a.npz", format="vllm")
    text = json.dumps({"choices": [{"routed_experts": base64_npy(IDS[0])}]})
    (tmp_path / "a.json").write_text(text[: int(len(text) * kept)])
    assert "is not valid JSON" in refusal(tmp_path / "a.json", format="vllm")


@pytest.mark.parametrize("body", ["{'descr': (((", "nonsense", "{'shape': 3}"])
def test_headers_without_sense_are_named(tmp_path: Path, body: str) -> None:
    """NumPy parses them with Python's own tokenizer; its failures are translated."""
    header = body.encode().ljust(117) + b"\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "a.npy: is damaged or no array" in refusal(tmp_path, format="vllm")
    with pytest.raises(InputError, match="no trace of a known format"):
        open_trace(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("k05VTVBZ????", "is no base64"),
        ("k05VTVBZAQB2", "is damaged or no array"),
        ([[1, 2], [3]], "rows of different lengths"),
        ([[1, 2], [3, 4]], "not integers [tokens][layers][k]"),
        ([[["a"]]], "not integers [tokens][layers][k]"),
        ([[[1.5]]], "not integers [tokens][layers][k]"),
        ({"data": "AAAA"}, "is an object without data and shape"),
        ({"data": "AAAA", "shape": [9, 9, 9]}, "but is 3 bytes long"),
        ({"data": "AAAA", "shape": [3, 1], "dtype": "uint8"}, "have shape [3, 1]"),
        ({"data": "AAAA", "shape": [1, 3, 1], "dtype": "code"}, "unknown type 'code'"),
        ({"data": "AAAA", "shape": [1, 3, -1], "dtype": "uint8"}, "is an object without data and shape"),
        (7, "is int, not text or lists"),
        ("aGVsbG8=", "is text, but no base64 of an .npy file"),
    ],
)
def test_damaged_values_are_named(tmp_path: Path, value: Any, message: str) -> None:
    """The record is said."""
    path = lines(tmp_path / "a", {"choices": [{"routed_experts": value}]})
    found = refusal(path, format="vllm")
    assert found.startswith(": record 1: ")
    assert message in found


# ------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n{"a": 2}\n{"a": 3}',
        '[{"a": 1}, {"a": 2},\n{"a": 3}]\n',
        '\ufeff\n {"a": 1} {"a": 2}\n\n{"a": 3}\n\n',
        ' [ {"a":1},{"a":2},{"a":3} ] ',
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_records_are_read_in_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int
) -> None:
    """Lines, arrays, records side by side; each can be read again by its place."""
    monkeypatch.setattr(json_file, "_CHUNK_BYTES", chunk)
    path = tmp_path / "a"
    path.write_text(text, encoding="utf-8")
    records = list(json_records(path))
    assert [record.value for record in records] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [record.number for record in records] == [1, 2, 3]
    assert [read_record(path, record.start, record.num_bytes) for record in records] == [
        {"a": 1},
        {"a": 2},
        {"a": 3},
    ]


def test_places_count_bytes(tmp_path: Path) -> None:
    """Texts in other scripts before a record do not shift it."""
    path = tmp_path / "a"
    path.write_text(
        json.dumps({"text": "日本語 þ", "a": 1}, ensure_ascii=False) + '\n{"b": 2}', encoding="utf-8"
    )
    record = list(json_records(path))[1]
    assert read_record(path, record.start, record.num_bytes) == {"b": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": ', "record 2 is not valid JSON"),
        ('{"a": 1}\n{"a": nan}', "record 2 is not valid JSON"),
        ('{"a": 1}\n{"a": NaN}', "NaN is no JSON number"),
        ('[{"a": 1}, {"a": 2}', "the array ends after record 2"),
        ('[{"a": 1}] {"a": 2}', "something follows the array"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": "\x01"}', "record 1 is not valid JSON"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    """The record's number is said."""
    (tmp_path / "a").write_text(text)
    with pytest.raises(InputError, match=message):
        list(json_records(tmp_path / "a"))


def test_endless_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that never ends is given up long before memory is full."""
    monkeypatch.setattr(json_file, "LIMIT_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_file, "_CHUNK_BYTES", 100)
    (tmp_path / "a").write_text('{"a": 1}\n{"a": "' + "x" * 100_000)
    with pytest.raises(InputError, match="record 2 is longer than 1000 bytes or never ends"):
        list(json_records(tmp_path / "a"))


def test_files_that_change_are_noticed(tmp_path: Path) -> None:
    """What was a record is none any more."""
    path = lines(tmp_path / "a", native(IDS[0]), native(IDS[0]))
    source = opened(path)
    path.write_text("x" * os.path.getsize(path))
    with pytest.raises(InputError, match="has changed since it was opened"):
        read_all(source)
