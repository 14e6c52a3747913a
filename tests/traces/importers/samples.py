"""A tiny sample of every trace format, written as its engine would, with what reading it must give.

`SAMPLES` maps the name of a sample to a function that writes it into an empty folder. Add a format by adding
its function; `test_samples.py` then holds every reader to claim its own samples and no others.
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.model import ModelShape
from tests.traces.importers.samples_passes import (
    Recording,
    write_heat,
    write_megatron,
    write_tensorrt_counts,
    write_tensorrt_raw,
)
from traces.counts import ExpertCounts
from traces.readers import ReadOptions
from traces.store import write_dataset, write_npz
from traces.synthesize import synthesize
from traces.trace import Trace

__all__ = [
    "SAMPLES",
    "Sample",
    "SglangRecording",
    "base64_npy",
    "small_model",
    "truncated_npz",
    "write_sglang_ranks",
]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A written sample.

    Parameters
    ----------
    format
        The reader that must claim it; a key of `traces.readers.READERS`.
    path
        What to open.
    expected
        What reading gives.
    options
        What the reader must be told.
    """

    format: str
    path: Path
    expected: Trace | ExpertCounts
    options: ReadOptions = field(default_factory=ReadOptions)


def small_model(**changes: Any) -> ModelShape:
    """Return a model of 4 decoder layers of which the last 3 are MoE layers, top-2 of 6 experts."""
    sizes: dict[str, Any] = {
        "name": "small",
        "num_layers": 3,
        "num_experts": 6,
        "top_k": 2,
        "hidden_size": 8,
        "expert_hidden_size": 8,
        "num_decoder_layers": 4,
        "moe_layer_ids": (1, 2, 3),
    }
    return ModelShape(**{**sizes, **changes})


def routed(
    rng: np.random.Generator, num_tokens: int, num_layers: int, num_experts: int, top_k: int
) -> IntArray:
    """Return random distinct expert ids, ``[tokens, layers, k]``."""
    order = rng.random((num_tokens, num_layers, num_experts)).argsort(axis=2)
    return order[:, :, :top_k].astype(np.int64)


# -------------------------------------------------------------------------------------------- our own formats


def dataset(folder: Path) -> Sample:
    """A recorded data set."""
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=0)
    write_dataset(trace, folder / "recorded")
    return Sample(format="dataset", path=folder / "recorded", expected=trace)


def npz(folder: Path) -> Sample:
    """A NumPy archive."""
    trace = synthesize(num_tokens=60, num_layers=2, num_experts=8, top_k=2, sequence_tokens=20, seed=1)
    write_npz(trace, folder / "trace.npz")
    return Sample(format="npz", path=folder / "trace.npz", expected=trace)


# -------------------------------------------------------------------------------------------- SGLang recorder


@dataclass(kw_only=True)
class SglangRecording:
    """A server with several ranks, each of which prefills and decodes requests of its own.

    Parameters
    ----------
    num_ranks, num_passes
        Ranks, and the forward passes that all of them run.
    num_layers, dense
        Decoder layers, and those of them that are dense.
    num_experts, top_k, num_slots
        Logical experts, experts per token, physical slots (`num_slots` - `num_experts` are second replicas).
    padding
        Rows of padding that each pass ends with.
    width
        Ids that the recorder keeps per token.
    """

    num_ranks: int = 2
    num_passes: int = 6
    num_layers: int = 4
    dense: tuple[int, ...] = (0,)
    num_experts: int = 6
    top_k: int = 2
    num_slots: int = 8
    padding: int = 1
    width: int = 8
    seed: int = 0
    map_LR: IntArray = field(init=False)
    records: list[list[dict[str, Any]]] = field(init=False)
    expected: Trace = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        extra = np.stack(
            [
                rng.permutation(self.num_experts)[: self.num_slots - self.num_experts]
                for _ in range(self.num_layers)
            ]
        )
        base = np.tile(np.arange(self.num_experts), (self.num_layers, 1))
        self.map_LR = rng.permuted(np.concatenate([base, extra], axis=1), axis=1)
        servers = [_Server(self, rank, rng) for rank in range(self.num_ranks)]
        self.records = [[] for _ in servers]
        tokens: list[tuple[int, float, int, dict[str, Any]]] = []
        for step in range(self.num_passes):
            for server in servers:
                record, taken = server.run(step)
                self.records[server.rank].append(record)
                count = len(taken["sequence"])
                tokens += [
                    (
                        step,
                        (place + 0.5) / count,
                        server.rank,
                        {name: all_T[place] for name, all_T in taken.items()},
                    )
                    for place in range(count)
                ]
        tokens.sort(key=lambda token: token[:3])
        moe = [layer for layer in range(self.num_layers) if layer not in self.dense]
        self.expected = Trace(
            experts_TLK=np.array([token[3]["experts"] for token in tokens]),
            num_experts=self.num_experts,
            sequence_T=np.array([token[3]["sequence"] for token in tokens]),
            position_T=np.array([token[3]["position"] for token in tokens]),
            rank_T=np.array([token[2] for token in tokens]),
            moe_layer_ids=tuple(moe) if self.dense else None,
        )


class _Server:
    """One rank: requests under way, as (number, next position)."""

    def __init__(self, recording: SglangRecording, rank: int, rng: np.random.Generator) -> None:
        self.recording = recording
        self.rank = rank
        self.rng = rng
        self.running: list[tuple[int, int]] = []
        self.numbered = 0
        self.chunk: tuple[int, int] | None = None

    def run(self, step: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Run a pass; return its record and the tokens in it."""
        if step == 0 or self.rng.random() < 0.3 or not self.running:
            stretches = self._prefill()
            lengths: list[int] | None = [length for _, _, length in stretches]
            mode = 1
        else:
            # Some requests end, at least one goes on; each is one token further.
            going = [entry for entry in self.running if self.rng.random() < 0.8] or self.running[:1]
            stretches = [(number, position, 1) for number, position in going]
            self.running = [(number, position + 1) for number, position in going]
            lengths, mode = None, 2
        sequence = np.concatenate([np.full(length, number) for number, _, length in stretches])
        position = np.concatenate([first + np.arange(length) for _, first, length in stretches])
        return self._record(step, sequence, position, lengths, mode)

    def _prefill(self) -> list[tuple[int, int, int]]:
        """Take in new requests, all of different lengths; the last prompt may be cut in chunks."""
        stretches = []
        if self.chunk is not None:
            number, first = self.chunk
            stretches.append((number, first, int(self.rng.integers(1, 4))))
        for _ in range(int(self.rng.integers(1, 3))):
            stretches.append((self.numbered, 0, int(self.rng.integers(1, 6))))
            self.numbered += 1
        taken = {position for _, position in self.running}
        settled = []
        for number, first, length in stretches:
            while first + length in taken:
                length += 1
            taken.add(first + length)
            settled.append((number, first, length))
        cut = self.rng.random() < 0.4
        self.chunk = (settled[-1][0], settled[-1][1] + settled[-1][2]) if cut else None
        whole = settled[:-1] if cut else settled
        self.running += [(number, first + length) for number, first, length in whole]
        return settled

    def _text(self, step: int, count: int) -> list[int]:
        """Return ids of a vocabulary: no two ranks read the same text."""
        text = np.random.default_rng((self.recording.seed, self.rank, step))
        return [int(one) for one in text.integers(1, 50_000, count)]

    def _record(
        self, step: int, sequence: IntArray, position: IntArray, lengths: list[int] | None, mode: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        import torch

        about = self.recording
        count = len(sequence)
        moe = [layer for layer in range(about.num_layers) if layer not in about.dense]
        experts = routed(self.rng, count, len(moe), about.num_experts, about.top_k)
        ids = np.full((about.num_layers, count + about.padding, about.width), -1, dtype=np.int32)
        physical = np.zeros((about.num_layers, about.num_slots), dtype=np.int32)
        for place, layer in enumerate(moe):
            for token in range(count):
                for choice in range(about.top_k):
                    slots = np.nonzero(about.map_LR[layer] == experts[token, place, choice])[0]
                    ids[layer, token, choice] = self.rng.choice(slots)
                    physical[layer, ids[layer, token, choice]] += 1
        record = {
            "forward_pass_id": step + 3,
            "rank": self.rank,
            "gatherer_key": "primary",
            "input_ids": [*self._text(step, count), *[0] * about.padding],
            "positions": [*position.tolist(), *[0] * about.padding],
            "extend_seq_lens": lengths,
            "forward_mode": mode,
            "topk_ids_of_layer": torch.from_numpy(ids),
            "misc_objects": [],
            "global_physical_count": torch.from_numpy(physical),
        }
        return record, {"experts": experts, "sequence": sequence, "position": position}


def write_sglang_ranks(recording: SglangRecording, folder: Path, *, per_token: bool = True) -> Path:
    """Write one file per rank, as ``dump_expert_distribution_record`` does."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    left_out = () if per_token else _PER_TOKEN_KEYS
    for rank, records in enumerate(recording.records):
        torch.save(
            {
                "records": [{k: v for k, v in record.items() if k not in left_out} for record in records],
                "last_physical_to_logical_map": torch.from_numpy(recording.map_LR),
            },
            folder / f"expert_distribution_recorder_1700000000.{rank + 25}_{rank}.pt",
        )
    return folder


_PER_TOKEN_KEYS = (
    "input_ids",
    "positions",
    "extend_seq_lens",
    "forward_mode",
    "topk_ids_of_layer",
    "misc_objects",
)


def sglang_per_token(folder: Path) -> Sample:
    """Per-token dumps of two ranks, with replicas, a dense layer and padding."""
    recording = SglangRecording()
    path = write_sglang_ranks(recording, folder / "dump")
    return Sample(format="sglang-tokens", path=path, expected=recording.expected)


def sglang_per_token_of_one_rank(folder: Path) -> Sample:
    """The dump of a single rank, named itself."""
    recording = SglangRecording(num_ranks=1, num_slots=6, dense=(), seed=1)
    path = write_sglang_ranks(recording, folder)
    return Sample(format="sglang-tokens", path=next(path.glob("*.pt")), expected=recording.expected)


def sglang_per_pass(folder: Path) -> Sample:
    """Per-pass dumps: counts of physical slots, to be summed over ranks."""
    recording = SglangRecording(seed=2)
    path = write_sglang_ranks(recording, folder / "dump", per_token=False)
    load_WLE = np.zeros((recording.num_passes, recording.num_layers, recording.num_experts), dtype=np.int64)
    for records in recording.records:
        for window, record in enumerate(records):
            count_LR = record["global_physical_count"].numpy()
            for layer, slot in np.ndindex(count_LR.shape):
                load_WLE[window, layer, recording.map_LR[layer, slot]] += count_LR[layer, slot]
    model = small_model()
    expected = ExpertCounts(
        load_WLE=load_WLE[:, 1:], top_k=2, model_name="small", moe_layer_ids=model.moe_layer_ids
    )
    return Sample(format="sglang-tokens", path=path, expected=expected, options=ReadOptions(model=model))


def _counts(rng: np.random.Generator, num_steps: int) -> tuple[IntArray, ExpertCounts]:
    """Return counts of all 4 layers of the small model, the first dense, and what they say."""
    load_WLE = rng.integers(1, 99, (num_steps, 4, 6))
    load_WLE[:, 0] = 0
    expected = ExpertCounts(load_WLE=load_WLE[:, 1:], top_k=2, model_name="small", moe_layer_ids=(1, 2, 3))
    return load_WLE, expected


def sglang_stat(folder: Path) -> Sample:
    """A stat dump, whose buffer is longer than what was recorded."""
    import torch

    load_WLE, expected = _counts(np.random.default_rng(3), 5)
    buffer = np.concatenate([load_WLE, np.zeros((3, 4, 6), dtype=np.int64)]).astype(np.int32)
    path = folder / "expert_distribution_recorder_1700000000.5.pt"
    content = {
        "rank": 0,
        "logical_count": torch.from_numpy(buffer),
        "average_utilization_rate_over_window": None,
    }
    torch.save(content, path)
    return Sample(
        format="sglang-stat", path=path, expected=expected, options=ReadOptions(model=small_model())
    )


def sglang_counts(folder: Path) -> Sample:
    """Counts in JSON by step; whole floats, as SGLang writes them."""
    load_WLE, expected = _counts(np.random.default_rng(4), 3)
    path = folder / "counts.json"
    path.write_text(json.dumps({"logical_count": load_WLE.astype(float).tolist()}))
    return Sample(
        format="sglang-counts", path=path, expected=expected, options=ReadOptions(model=small_model())
    )


# --------------------------------------------------------------------------------------- responses and arrays


def answered(rng: np.random.Generator, lengths: list[int]) -> tuple[list[IntArray], Trace]:
    """Return the ids of answers over all 4 layers of the small model, the first dense, and their trace."""
    model = small_model()
    arrays = []
    for length in lengths:
        ids = np.zeros((length, 4, 2), dtype=np.int64)
        ids[:, 1:] = routed(rng, length, 3, model.num_experts, model.top_k)
        arrays.append(ids)
    trace = Trace(
        experts_TLK=np.concatenate(arrays)[:, 1:],
        num_experts=6,
        sequence_T=np.repeat(np.arange(len(lengths)), lengths),
        position_T=np.concatenate([np.arange(length) for length in lengths]),
        model_name="small",
        moe_layer_ids=(1, 2, 3),
    )
    return arrays, trace


def base64_raw(ids: IntArray) -> str:
    """Return ids as SGLang sends them."""
    return base64.b64encode(ids.astype("<i4").tobytes()).decode()


def base64_npy(ids: IntArray) -> str:
    """Return ids as vLLM sends them."""
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.uint8))
    return base64.b64encode(buffer.getvalue()).decode()


def sglang_response(folder: Path) -> Sample:
    """Native responses of SGLang, one a line; an aborted one says nothing of experts."""
    arrays, trace = answered(np.random.default_rng(5), [4, 1, 7])
    lines = [
        {
            "text": "quo\u00fe",
            "output_ids": [1, 2],
            "meta_info": {
                "prompt_tokens": len(ids) - 1,
                "completion_tokens": 2,
                "routed_experts": base64_raw(ids),
            },
        }
        for ids in arrays
    ]
    lines.insert(1, {"text": "", "meta_info": {"prompt_tokens": 3, "completion_tokens": 0}})
    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Sample(
        format="sglang-response", path=path, expected=trace, options=ReadOptions(model=small_model())
    )


def sglang_openai_response(folder: Path) -> Sample:
    """OpenAI-style responses of SGLang, as one JSON array, pretty-printed."""
    arrays, trace = answered(np.random.default_rng(6), [5, 2])
    responses = [
        {
            "choices": [{"index": 0, "text": "a"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": len(ids)},
            "sglext": {"routed_experts": base64_raw(ids)},
        }
        for ids in arrays
    ]
    path = folder / "responses.json"
    path.write_text(json.dumps(responses, indent=1))
    return Sample(
        format="sglang-response", path=path, expected=trace, options=ReadOptions(model=small_model())
    )


def vllm_arrays(folder: Path) -> Sample:
    """A folder of arrays, one per completion."""
    arrays, trace = answered(np.random.default_rng(7), [3, 6])
    path = folder / "routed"
    path.mkdir()
    for number, ids in enumerate(arrays):
        np.save(path / f"{number:04}.npy", ids.astype(np.uint8))
    return Sample(format="vllm", path=path, expected=trace, options=ReadOptions(model=small_model()))


def vllm_array(folder: Path) -> Sample:
    """The array of one completion."""
    arrays, trace = answered(np.random.default_rng(8), [9])
    np.save(folder / "one.npy", arrays[0].astype(np.uint16))
    options = ReadOptions(model=small_model())
    return Sample(format="vllm", path=folder / "one.npy", expected=trace, options=options)


def vllm_archive(folder: Path) -> Sample:
    """An archive of many arrays."""
    arrays, trace = answered(np.random.default_rng(9), [2, 4, 3])
    path = folder / "many.npz"
    np.savez_compressed(path, **{f"request{n}": ids.astype(np.uint8) for n, ids in enumerate(arrays)})
    return Sample(format="vllm", path=path, expected=trace, options=ReadOptions(model=small_model()))


def vllm_responses(folder: Path) -> Sample:
    """Responses over HTTP: prompts of one come apart, another has two choices."""
    rng = np.random.default_rng(10)
    arrays, _ = answered(rng, [4, 3, 5, 6])
    first = {
        "prompt_routed_experts": base64_npy(arrays[0]),
        "choices": [{"index": 0, "routed_experts": base64_npy(arrays[1])}],
    }
    second = {"choices": [{"routed_experts": base64_npy(ids)} for ids in arrays[2:]]}
    path = folder / "responses.jsonl"
    path.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    trace = Trace(
        experts_TLK=np.concatenate(arrays)[:, 1:],
        num_experts=6,
        sequence_T=np.repeat([0, 1, 2], [7, 5, 6]),
        position_T=np.concatenate([np.arange(7), np.arange(5), np.arange(6)]),
        model_name="small",
        moe_layer_ids=(1, 2, 3),
    )
    return Sample(format="vllm", path=path, expected=trace, options=ReadOptions(model=small_model()))


# --------------------------------------------------------------------- TensorRT-LLM, Megatron-LM, vllm-ascend


def tensorrt_llm_counts(folder: Path) -> Sample:
    """Counts of two ranks, by decoder layer."""
    recording = Recording(seed=11)
    path = write_tensorrt_counts(folder / "statistics", recording)
    expected = ExpertCounts(load_WLE=recording.load_ILE(), top_k=2, moe_layer_ids=recording.layers)
    return Sample(format="tensorrt-llm", path=path, expected=expected)


def tensorrt_llm_raw(folder: Path) -> Sample:
    """Ids of every token of two ranks, with padding."""
    recording = Recording(seed=12)
    path = write_tensorrt_raw(folder / "statistics", recording, padding=3)
    return Sample(format="tensorrt-llm", path=path, expected=recording.trace())


def megatron(folder: Path) -> Sample:
    """Training steps of two micro-batches on two ranks."""
    recording = Recording(num_passes=2, seed=13)
    path = write_megatron(folder / "traces", recording)
    options = ReadOptions(model=small_model())
    return Sample(format="megatron", path=path, expected=recording.trace(model_name="small"), options=options)


def megatron_of_one_rank(folder: Path) -> Sample:
    """One file, named itself; the largest id says how many experts there are."""
    recording = Recording(num_ranks=1, num_tokens=9, seed=14)
    path = next(write_megatron(folder, recording).glob("*.jsonl"))
    return Sample(format="megatron", path=path, expected=recording.trace())


def vllm_ascend(folder: Path) -> Sample:
    """Heat of every step, whole numbers as floats."""
    recording = Recording(seed=15)
    path = write_heat(folder / "heat.pt", recording.load_ILE().astype(np.float32))
    expected = ExpertCounts(
        load_WLE=recording.load_ILE(), top_k=2, model_name="small", moe_layer_ids=recording.layers
    )
    return Sample(
        format="vllm-ascend", path=path, expected=expected, options=ReadOptions(model=small_model())
    )


def truncated_npz(folder: Path) -> Sample:
    """An archive whose end is missing is still known for what it was."""
    sample = npz(folder)
    content = sample.path.read_bytes()
    with zipfile.ZipFile(sample.path) as archive:
        last = archive.infolist()[-1].header_offset
    sample.path.write_bytes(content[:last])
    return sample


SAMPLES: Mapping[str, Callable[[Path], Sample]] = {
    "dataset": dataset,
    "npz": npz,
    "sglang-per-token": sglang_per_token,
    "sglang-per-token-one-rank": sglang_per_token_of_one_rank,
    "sglang-per-pass": sglang_per_pass,
    "sglang-stat": sglang_stat,
    "sglang-counts": sglang_counts,
    "sglang-response": sglang_response,
    "sglang-openai-response": sglang_openai_response,
    "vllm-arrays": vllm_arrays,
    "vllm-array": vllm_array,
    "vllm-archive": vllm_archive,
    "vllm-responses": vllm_responses,
    "tensorrt-llm-counts": tensorrt_llm_counts,
    "tensorrt-llm-raw": tensorrt_llm_raw,
    "megatron": megatron,
    "megatron-one-rank": megatron_of_one_rank,
    "vllm-ascend": vllm_ascend,
}
