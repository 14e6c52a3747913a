"""Load windows are counted on the device, equal what is recorded token by token, and hold nobody up."""

import gc
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_transfers import SlowTransfer
from torch import distributed, nn

from placement.errors import InputError
from placement.plan import Placement
from placement.runtime.checkpoint import load_checkpoint
from placement.runtime.families.generic import GenericFamily
from placement.runtime.families.registry import supported_families
from placement.runtime.families.training import FRAMEWORKS
from placement.runtime.hook import apply_placement
from placement.runtime.samples import resolve_model
from placement.runtime.tiny import tiny_model
from traces.record import LoadCounter, LoadWindow, MemorySink, Recorder, RecordingStopped, loads, tokens
from traces.record.passes import places_kept
from traces.record.transfer import HostTransfer
from traces.trace import Trace

EXPERTS, TOP_K = 6, 2
FAMILIES = tuple(sorted(set(supported_families()) - {one.model_type for one in FRAMEWORKS}))


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def _tokens(rows: int, length: int, seed: int = 0, *, vocabulary: int = 32) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def _run(model: Any, **inputs: Any) -> None:
    with torch.no_grad():
        model(**inputs)


def _load_of(experts_TLK: Any, num_experts: int = EXPERTS) -> Any:
    """Counts of recorded ids, by numpy: ``[layers, experts]``."""
    return np.stack([np.bincount(ids.ravel(), minlength=num_experts) for ids in experts_TLK.swapaxes(0, 1)])


def _recorded(model: Any, run: Callable[[], None], num_experts: int = EXPERTS) -> Trace:
    sink = MemorySink(num_experts=num_experts)
    with Recorder(model, sink):
        run()
    return sink.trace()


def _counted(model: Any, run: Callable[[], None], **options: Any) -> list[LoadWindow]:
    with LoadCounter(model, **options) as counter:
        run()
    return counter.windows()


def _only(windows: Sequence[LoadWindow]) -> LoadWindow:
    (one,) = windows
    return one


@pytest.mark.parametrize("model_type", FAMILIES)
def test_loads_of_every_family_are_those_of_the_recorded_ids(model_type: str) -> None:
    """A padded pass of every family: counts equal a bincount of the ids that a recorder writes down."""
    model = tiny_model(model_type, num_layers=2)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    with LoadCounter(model) as counter:
        trace = _recorded(
            model, lambda: _run(model, input_ids=_tokens(2, 6), attention_mask=mask), counter.num_experts
        )
    found = _only(counter.windows())
    assert np.array_equal(found.load_LE, _load_of(trace.experts_TLK, counter.num_experts))
    assert found.tokens == trace.num_tokens == 10


def test_loads_of_the_sample_model() -> None:
    """Three uneven batches of byte16, a window each: counts are those of the recorded tokens."""
    model = load_checkpoint(resolve_model("byte16"))
    sizes = ((1, 9), (3, 4), (2, 17))

    def run() -> None:
        for seed, (rows, length) in enumerate(sizes):
            _run(model, input_ids=_tokens(rows, length, seed, vocabulary=256))

    with LoadCounter(model, step_per_pass=True) as counter:
        trace = _recorded(model, run, counter.num_experts)
    windows = counter.windows()
    ends = np.cumsum([rows * length for rows, length in sizes])
    parts = np.split(trace.experts_TLK, ends[:-1])
    assert [(one.window, one.tokens, one.steps) for one in windows] == [(0, 9, 1), (1, 12, 1), (2, 34, 1)]
    for one, part in zip(windows, parts, strict=True):
        assert np.array_equal(one.load_LE, _load_of(part, counter.num_experts))


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=7),
    window_steps=st.integers(1, 3),
    every_steps=st.integers(1, 3),
    buffers=st.integers(1, 4),
    slow=st.booleans(),
    data=st.data(),
)
def test_windows_add_up_to_what_was_recorded(
    batches: list[tuple[int, int]],
    window_steps: int,
    every_steps: int,
    buffers: int,
    slow: bool,
    data: st.DataObject,
) -> None:
    """However windows are cut, sampled and delayed, each holds the recorded tokens of its own steps."""
    model = tiny_model("mixtral", num_layers=1)
    expected: dict[int, Any] = {}
    options: dict[str, Any] = {"window_steps": window_steps, "every_steps": every_steps, "buffers": buffers}
    transfer = SlowTransfer() if slow else HostTransfer()
    with LoadCounter(model, transfer=transfer, **options) as counter:
        for step, (rows, length) in enumerate(batches):
            mask = torch.tensor(
                data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows,
                                   max_size=rows)), dtype=torch.int64,
            )  # fmt: skip
            mask[:, 0] = 1
            inputs = {"input_ids": _tokens(rows, length, step), "attention_mask": mask}
            if step % every_steps == 0:
                load_LE = _load_of(_recorded_ids(model, inputs, counter))
                expected[step // window_steps] = expected.get(step // window_steps, 0) + load_LE
            _run(model, **inputs)
            counter.step()
    found = {one.window: one.load_LE for one in counter.windows() if one.tokens}
    assert found.keys() == expected.keys()
    for window, load_LE in expected.items():
        assert np.array_equal(found[window], load_LE)


def _recorded_ids(model: Any, inputs: dict[str, Any], counter: LoadCounter) -> Any:
    with counter.paused():
        return _recorded(model, lambda: _run(model, **inputs)).experts_TLK


def test_windows_arrive_when_their_copies_are_done(model: Any) -> None:
    """A step waits for no copy; windows come in order, once each, as soon as they are there."""
    transfer, came = SlowTransfer(), list[int]()
    counter = LoadCounter(model, transfer=transfer, buffers=3, on_window=lambda one: came.append(one.window))
    for seed in range(3):
        _run(model, input_ids=_tokens(1, 4, seed))
        counter.step()
    assert (came, transfer.waits) == ([], 0)
    transfer.finish()
    counter.step()
    assert (came, transfer.waits) == ([0, 1, 2], 0)
    counter.close()
    assert came == [0, 1, 2, 3]
    assert counter.windows() == []


def test_a_fourth_window_waits_for_the_first(model: Any) -> None:
    """With all buffers on their way the oldest is waited for, and nothing is lost."""
    transfer = SlowTransfer()
    with LoadCounter(model, transfer=transfer, buffers=3) as counter:
        for seed in range(5):
            _run(model, input_ids=_tokens(1, 1 + seed, seed))
            counter.step()
        assert transfer.waits == 2
        assert [one.tokens for one in counter.windows()] == [1, 2]
        assert [one.tokens for one in counter.windows(wait=True)] == [3, 4, 5]


def test_windows_end_by_tokens(model: Any) -> None:
    """Places are counted with their padding, and a window ends with the step that fills it."""
    with LoadCounter(model, window_tokens=10, first_window=7) as counter:
        for length in (4, 7, 12, 3):
            _run(model, input_ids=_tokens(1, length))
            counter.step()
    found = [(one.window, one.tokens, one.steps) for one in counter.windows()]
    assert found == [(7, 11, 2), (8, 12, 1), (9, 3, 1)]


def test_windows_without_a_token_keep_ranks_in_step(model: Any) -> None:
    """A window of steps that ran nothing is there, with zeros; what follows the last step is not."""
    with LoadCounter(model) as counter:
        counter.step()
        _run(model, input_ids=_tokens(1, 3))
        counter.step()
    assert [(one.window, one.tokens) for one in counter.windows()] == [(0, 0), (1, 3)]


def test_a_window_is_what_the_service_takes(model: Any) -> None:
    """Its report has the number, the counts and the tokens, and the counts cannot be changed."""
    found = _only(_counted(model, lambda: _run(model, input_ids=_tokens(2, 3))))
    report = found.report()
    assert set(report) == {"window", "load", "tokens"}
    assert report["load"].shape == (3, EXPERTS)
    assert report["load"].sum() == 3 * TOP_K * report["tokens"] == 3 * TOP_K * 6
    with pytest.raises(ValueError, match="read-only"):
        found.load_LE[0, 0] = 1


def test_generation_counts_prompts_and_decode_steps(model: Any) -> None:
    """Left padding does not count; each decode step counts one token a row, as recorded."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])

    def run() -> None:
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        model.generate(_tokens(2, 4), attention_mask=mask, **options)

    with LoadCounter(model) as counter:
        trace = _recorded(model, run)
    found = _only(counter.windows())
    assert found.tokens == trace.num_tokens == 6 + 2 * 5
    assert np.array_equal(found.load_LE, _load_of(trace.experts_TLK))


def test_a_static_cache_is_counted(model: Any) -> None:
    """Its decode steps bring masks that do not tell, and count all the same."""

    def run() -> None:
        options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
        model.generate(_tokens(2, 4), max_new_tokens=4, do_sample=False, **options)

    assert _only(_counted(model, run)).tokens == 2 * (4 + 3)


class _CacheOf:
    """A cache that holds some tokens, and knows so on some device."""

    def __init__(self, num_tokens: int, device: str = "cpu") -> None:
        self.num_tokens = num_tokens
        self.layers = [SimpleNamespace(cumulative_length=torch.zeros(1, device=device))]

    def get_seq_length(self) -> int:
        """Tell, which must not be asked of a device."""
        assert self.layers[0].cumulative_length.device.type == "cpu"
        return self.num_tokens


@pytest.mark.parametrize(
    ("places", "mask", "cache", "expected"),
    [
        (3, [[0, 1, 1]], None, [[0, 1, 1]]),
        (3, [[0, 1, 1]], _CacheOf(0, "meta"), [[0, 1, 1]]),  # it covers the past, so there is none
        (2, [[0, 1, 1, 0]], _CacheOf(2), [[1, 0]]),
        (1, [[1, 1, 0, 0]], _CacheOf(2), [[0]]),
        (1, [[1, 1, 0, 0]], _CacheOf(2, "meta"), None),  # a decode step
        (1, [[[[1]]]], _CacheOf(2), None),
        (3, None, _CacheOf(2, "meta"), None),
    ],
)
def test_padding_is_read_without_asking_a_device(
    places: int, mask: Any, cache: _CacheOf | None, expected: Any
) -> None:
    """From the mask where it tells; a decode step whose mask does not feeds real tokens."""
    inputs = {
        "input_ids": _tokens(1, places),
        "attention_mask": None if mask is None else torch.tensor(mask),
        "past_key_values": cache,
    }
    kept_BN = places_kept(inputs, any_model=False)
    assert (None if kept_BN is None else kept_BN.int().tolist()) == expected


def test_padding_that_a_device_alone_tells_is_refused() -> None:
    """A second prefill into a static cache: its mask is wider, by how much the device knows."""
    inputs = {
        "input_ids": _tokens(1, 2),
        "attention_mask": torch.ones(1, 8),
        "past_key_values": _CacheOf(2, "meta"),
    }
    with pytest.raises(InputError, match="without waiting for the device"):
        places_kept(inputs, any_model=False)
    assert places_kept(inputs, any_model=True) is None


def test_places_can_be_named(model: Any) -> None:
    """A 4-D mask tells no padding and is refused, unless the caller says which places are real."""
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    with LoadCounter(model) as counter:
        with pytest.raises(InputError, match=r"mask of shape \(1, 1, 3, 3\).*batch\(kept="):
            _run(model, input_ids=_tokens(1, 3), attention_mask=mask)
        with counter.batch(kept=torch.tensor([[1, 1, 0]])):
            _run(model, input_ids=_tokens(1, 3), attention_mask=mask)
        with (
            counter.batch(kept=torch.ones(1, 5)),
            pytest.raises(InputError, match="saw 3 tokens, the mask has 5"),
        ):
            _run(model, input_ids=_tokens(1, 3))
    assert _only(counter.windows()).tokens == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_checkpointing_counts_once(model: Any, reentrant: bool) -> None:
    """Layers run again in the backward pass do not count, nor does evaluation; steps are the optimizer's."""
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with LoadCounter(model) as counter:
        counter.follow(optimizer)
        for step in range(2):
            for micro in range(2):
                batch = _tokens(2, 4, seed=2 * step + micro)
                model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            with counter.paused():
                model.eval()
                _run(model, input_ids=_tokens(3, 5))
                model.train()
    assert [(one.window, one.tokens, one.steps) for one in counter.windows()] == [(0, 16, 1), (1, 16, 1)]
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("placement_first", [True, False])
def test_replicas_count_as_their_expert(model: Any, placement_first: bool) -> None:
    """With replicas applied, before or after, counts are those of logical experts."""
    placement = Placement(
        physical_to_logical_map_LS=np.tile([5, 4, 3, 0, 2, 1, 0, 3], (3, 1)),
        device_of_slot_S=np.arange(8) // 4,
        num_experts=EXPERTS,
        num_devices=2,
    )
    expected = _recorded(model, lambda: _run(model, input_ids=_tokens(2, 9)))
    with (
        apply_placement(model, placement) if placement_first else nullcontext(),
        LoadCounter(model) as counter,
        nullcontext() if placement_first else apply_placement(model, placement),
    ):
        _run(model, input_ids=_tokens(2, 9))
    assert np.array_equal(_only(counter.windows()).load_LE, _load_of(expected.experts_TLK))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_a_compiled_model_is_counted(backend: str, attached: str) -> None:
    """Windows are those of the plain model, padding included, whoever came first."""
    model: Any = tiny_model("olmoe", num_layers=1)
    expected = [_recorded(model, lambda b=b: _run(model, **b)) for b in _padded_batches()]  # type: ignore[misc]
    torch.compiler.reset()
    before = LoadCounter(model) if attached == "before" else None
    compiled: Any = torch.compile(model, backend=backend)
    with before or LoadCounter(compiled) as counter:
        for batch in _padded_batches():
            _run(compiled, **batch)
            counter.step()
    torch.compiler.reset()
    for one, trace in zip(counter.windows(), expected, strict=True):
        assert np.array_equal(one.load_LE, _load_of(trace.experts_TLK))


def _padded_batches() -> list[dict[str, torch.Tensor]]:
    masks = [torch.tensor([[1] * 5, [0] * pad + [1] * (5 - pad)]) for pad in (0, 1, 3, 0)]
    return [{"input_ids": _tokens(2, 5, seed), "attention_mask": mask} for seed, mask in enumerate(masks)]


def test_counting_compiles_nothing_anew() -> None:
    """A model compiled whole is counted without a graph break, and windows cause no new compilation."""
    model: Any = tiny_model("olmoe", num_layers=1)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with LoadCounter(compiled) as counter, torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            _run(compiled, input_ids=_tokens(2, 5, seed))
            counter.step()
    torch.compiler.reset()
    assert [one.tokens for one in counter.windows()] == [10] * 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_training_counts_once() -> None:
    """Forward, backward with checkpointed layers, optimizer: each token counts once."""
    model: Any = tiny_model("olmoe", num_layers=2)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager")
    with LoadCounter(compiled) as counter:
        counter.follow(optimizer)
        for seed in range(2):
            batch = _tokens(2, 4, seed)
            compiled(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    torch.compiler.reset()
    assert [(one.tokens, int(one.load_LE.sum())) for one in counter.windows()] == [(8, 32), (8, 32)]


def test_a_graph_capture_is_told_what_it_cannot_keep(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays run no Python: what asks it about single passes is refused, plain counting is not."""
    refused: tuple[dict[str, Any], ...] = ({"window_tokens": 5}, {"step_per_pass": True}, {"every_steps": 2})
    for options in refused:
        with LoadCounter(model, **options):
            monkeypatch.setattr(loads, "is_capturing", lambda: True)
            with pytest.raises(InputError, match=f"{next(iter(options))} cannot be kept for a CUDA graph"):
                _run(model, input_ids=_tokens(1, 3))
            monkeypatch.undo()
    with LoadCounter(model) as counter:
        monkeypatch.setattr(loads, "is_capturing", lambda: True)
        _run(model, input_ids=_tokens(1, 3))
        with pytest.raises(InputError, match=r"step\(\) cannot be captured"):
            counter.step()
        monkeypatch.undo()
    assert _only(counter.windows()).tokens == 3


def test_the_memory_of_a_graph_outlives_the_counter(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was captured may be replayed after everything else has forgotten the counter."""
    counter = LoadCounter(model)
    memory = [weakref.ref(tensor) for tensor in counter._tally.memory()]
    monkeypatch.setattr(loads, "is_capturing", lambda: True)
    _run(model, input_ids=_tokens(1, 3))
    monkeypatch.undo()
    counter.close()
    del counter
    gc.collect()
    assert all(tensor() is not None for tensor in memory)


def test_tokens_of_a_graph_cannot_be_recorded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder refuses a pass that is captured, and a pause lets it through."""
    monkeypatch.setattr(tokens, "is_capturing", lambda: True)
    with Recorder(model, MemorySink(num_experts=EXPERTS)) as recorder:
        with pytest.raises(InputError, match=r"replays of a CUDA graph run no Python.*LoadCounter"):
            _run(model, input_ids=_tokens(1, 3))
        with recorder.paused():
            _run(model, input_ids=_tokens(1, 3))
    assert recorder.num_tokens == 0


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_wrapped_model_is_counted(model: Any, tmp_path: Path, wrapper: str) -> None:
    """DistributedDataParallel and FSDP, forward and backward: counts are those of the plain model."""
    expected = _recorded(model, lambda: _run(model, input_ids=_tokens(2, 4)))
    store = f"file://{tmp_path}/store"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = _wrapped(model, wrapper)
        with LoadCounter(wrapped) as counter:
            wrapped(input_ids=_tokens(2, 4)).logits.sum().backward()
            counter.step()
    finally:
        distributed.destroy_process_group()
    assert np.array_equal(_only(counter.windows()).load_LE, _load_of(expected.experts_TLK))


def _wrapped(model: Any, wrapper: str) -> Any:
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class _MapRouter(nn.Module):
    """Routes places before rows, by a map in which a token may lack an expert."""

    num_experts, top_k = 4, 2

    def __init__(self, map_PE: torch.Tensor) -> None:
        super().__init__()
        self.map_PE = map_PE

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.map_PE


class _MapModel(nn.Module):
    def __init__(self, map_PE: torch.Tensor) -> None:
        super().__init__()
        self.router = _MapRouter(map_PE)

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.router(input_ids)


def test_lost_experts_and_places_first() -> None:
    """A token that lost an expert counts as a token alone; rows and places keep their order."""
    chosen = [[0, 1], [2, 3], [0, 2], [0, 3], [1, 2], [1, 3]]  # places 0 to 2 of two rows, in turn
    map_PE = torch.zeros(6, 4, dtype=torch.bool)
    for place, ids in enumerate(chosen):
        map_PE[place, ids] = True
    map_PE[2, 2] = False
    family = GenericFamily(router="router", read="map", sequence_first=True)
    with LoadCounter(_MapModel(map_PE), family=family, step_per_pass=True) as counter:
        model = counter._layers[0].router
        model(torch.zeros(1))  # outside of a pass
    assert counter.windows() == []
    whole = _MapModel(map_PE)
    with LoadCounter(whole, family=family) as counter:
        whole(torch.zeros(2, 3, dtype=torch.int64))
        counter.step()
        with counter.batch(kept=torch.tensor([[True, False, False], [True, True, False]])):
            whole(torch.zeros(2, 3, dtype=torch.int64))
    first, second = counter.windows()
    # The map of a token that lacks an expert counts none of its pairs: which one was lost is not known.
    assert first.tokens == 6
    assert first.load_LE.tolist() == [[2, 3, 2, 3]]
    assert second.tokens == 3  # places 0, 1 and 3: (row 0, place 0), (row 1, place 0), (row 1, place 1)
    assert second.load_LE.tolist() == [[2, 1, 1, 2]]


def test_a_failure_can_end_the_counting_alone(model: Any) -> None:
    """With stop-recording a transfer that fails warns once and takes the hooks off; the model goes on."""

    class Lost(HostTransfer):
        def start(self, *args: Any) -> Any:
            raise RuntimeError("the device is lost")

    counter = LoadCounter(model, transfer=Lost(), on_error="stop-recording")
    _run(model, input_ids=_tokens(1, 3))
    with pytest.warns(RecordingStopped, match="the model goes on: the device is lost.*from number 0"):
        counter.step()
    assert str(counter.error) == "the device is lost"
    assert not any(module._forward_hooks for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(model, input_ids=_tokens(1, 3))
        counter.step()
        counter.close()


def test_a_compiler_that_does_not_see_the_hooks_is_told_of() -> None:
    """A model compiled and run before the counter came is refused at its first pass."""
    model: Any = tiny_model("olmoe", num_layers=1)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    _run(compiled, input_ids=_tokens(1, 3))
    with LoadCounter(compiled), pytest.raises(InputError, match="0 of the 1 MoE layers ran"):
        _run(compiled, input_ids=_tokens(1, 3))
    torch.compiler.reset()


def test_counting_first_in_inference_mode(model: Any) -> None:
    """What is allocated within inference mode serves outside of it."""
    with LoadCounter(model) as counter:
        with torch.inference_mode():
            model(_tokens(1, 3))
            counter.step()
        model(_tokens(1, 2)).logits.sum().backward()
        counter.step()
    assert [one.tokens for one in counter.windows()] == [3, 2]


@pytest.mark.parametrize(
    "options", [{"window_steps": 0}, {"every_steps": 0}, {"buffers": 0}, {"window_tokens": -1}]
)
def test_numbers_out_of_range_are_refused(model: Any, options: dict[str, Any]) -> None:
    """All of them are at least 1."""
    with pytest.raises(InputError, match="must be at least 1"):
        LoadCounter(model, **options)


def test_an_unknown_way_to_fail_is_refused(model: Any) -> None:
    """There are two."""
    with pytest.raises(InputError, match="neither 'raise' nor 'stop-recording'"):
        LoadCounter(model, on_error="ignore")  # type: ignore[arg-type]
