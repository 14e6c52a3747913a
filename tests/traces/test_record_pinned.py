"""Passes leave through a ring of host memory as they would at once: the same tokens, in order."""

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_transfers import SlowTransfer

from placement.errors import InputError
from placement.runtime.tiny import tiny_model
from traces.record import MemorySink, Recorder, RecordingStopped
from traces.record.background import BackgroundWriter
from traces.record.pinned import Landing, PinnedRing
from traces.record.transfer import HostTransfer

EXPERTS = 6
PATIENCE_S = 20.0


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def _sink(num_experts: int = EXPERTS) -> MemorySink:
    return MemorySink(num_experts=num_experts)


def _run(model: Any, **inputs: Any) -> None:
    with torch.no_grad():
        model(**inputs)


class HeldSink(MemorySink):
    """Takes nothing until it is let."""

    def __init__(self) -> None:
        super().__init__(num_experts=EXPERTS)
        self.free = threading.Event()
        self.closed = False

    def append(self, *args: Any, **kwargs: Any) -> None:
        """Wait, then take."""
        if not self.free.wait(PATIENCE_S):
            raise TimeoutError("the sink was never let go")
        super().append(*args, **kwargs)

    def close(self) -> None:
        """Remember it."""
        self.closed = True


class FullSink(MemorySink):
    """Fails so many times, as a full disk does."""

    def __init__(self, times: int) -> None:
        super().__init__(num_experts=EXPERTS)
        self.times, self.num_closed = times, 0

    def append(self, *args: Any, **kwargs: Any) -> None:
        """Fail, or take."""
        self.times -= 1
        if self.times >= 0:
            raise OSError("no space left on device")
        super().append(*args, **kwargs)

    def close(self) -> None:
        """Count it."""
        self.num_closed += 1


# -- the ring ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 600),
    sizes=st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=3), max_size=25),
    slow=st.booleans(),
    data=st.data(),
)
def test_what_landed_stays_until_released(
    capacity: int, sizes: list[list[int]], slow: bool, data: st.DataObject
) -> None:
    """Whatever is put in and given back in whatever order, what is held is whole; an empty ring takes it."""
    ring = PinnedRing(SlowTransfer() if slow else HostTransfer(), capacity_bytes=capacity)
    held: list[tuple[Landing, list[torch.Tensor]]] = []
    for number, parts in enumerate(sizes):
        tensors = [torch.full((size,), number + 2, dtype=torch.int16) for size in parts]
        landing = ring.put(tensors)
        while landing is None:
            assert held
            _let_go(held, data.draw(st.integers(0, len(held) - 1)))
            landing = ring.put(tensors)
        held.append((landing, tensors))
    while held:
        _let_go(held, 0)


def _let_go(held: list[tuple[Landing, list[torch.Tensor]]], at: int) -> None:
    landing, tensors = held.pop(at)
    landing.wait()
    assert all(torch.equal(there, put) for there, put in zip(landing.tensors, tensors, strict=True))
    landing.release()


def test_room_comes_back_oldest_first() -> None:
    """Four pieces of 64 bytes fill the ring; releasing the second gives room only after the first."""
    ring = PinnedRing(HostTransfer(), capacity_bytes=256)
    piece = [torch.zeros(64, dtype=torch.uint8)]
    landings = [ring.put(piece) for _ in range(4)]
    assert ring.put(piece) is None
    _released(landings[1])
    assert ring.put(piece) is None
    _released(landings[0])
    assert [ring.put(piece) is None for _ in range(3)] == [False, False, True]
    assert ring.capacity_bytes == 256


def _released(landing: Landing | None) -> None:
    assert landing is not None
    landing.release()


def test_a_ring_grows_for_what_never_fits() -> None:
    """More than its size makes it twice as large as that; what was in it before stays whole."""
    ring = PinnedRing(HostTransfer(), capacity_bytes=64)
    small, large = torch.arange(64, dtype=torch.uint8), torch.arange(100, dtype=torch.int64)
    first, second, third = (ring.put([tensor]) for tensor in (small, large, large))
    assert first is not None
    assert second is not None
    assert third is not None
    assert ring.capacity_bytes == 2 * 832
    assert torch.equal(first.tensors[0], small)
    first.release()
    assert ring.put([large]) is None
    assert torch.equal(second.tensors[0], large)


def test_a_ring_holds_something() -> None:
    """Nothing is no size."""
    with pytest.raises(InputError, match="a ring of 0 bytes holds nothing"):
        PinnedRing(HostTransfer(), capacity_bytes=0)


def test_a_ring_made_in_inference_mode_serves_outside_of_it() -> None:
    """Its memory is written to in both."""
    ring = PinnedRing(HostTransfer())
    with torch.inference_mode():
        first = ring.put([torch.arange(3)])
    second = ring.put([torch.arange(4, requires_grad=False)])
    assert first is not None
    assert second is not None
    assert first.tensors[0].tolist() + second.tensors[0].tolist() == [0, 1, 2, 0, 1, 2, 3]


# -- the recorder --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    batches=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=6),
    flush_tokens=st.integers(1, 40),
    capacity=st.sampled_from([1, 300, 1000, 1 << 16]),
    sample_every=st.integers(1, 3),
    every_steps=st.integers(1, 2),
    num_experts=st.sampled_from([EXPERTS, 300]),
    data=st.data(),
)
def test_a_ring_changes_nothing(
    batches: list[tuple[int, int]],
    flush_tokens: int,
    capacity: int,
    sample_every: int,
    every_steps: int,
    num_experts: int,
    data: st.DataObject,
) -> None:
    """Padded passes through a small, slow ring and a thread make the very trace that they make at once."""
    model = tiny_model("mixtral", num_layers=2, num_experts=num_experts)
    plain, ringed = _sink(num_experts), _sink(num_experts)
    ring = PinnedRing(SlowTransfer(), capacity_bytes=capacity)
    options: dict[str, Any] = {
        "flush_tokens": flush_tokens,
        "sample_every": sample_every,
        "every_steps": every_steps,
    }
    with Recorder(model, plain, **options), Recorder(model, ringed, ring=ring, **options) as recorder:
        for seed, (rows, length) in enumerate(batches):
            inputs = {"input_ids": _tokens(rows, length, seed)}
            if data.draw(st.booleans()):
                mask = torch.ones(rows, length, dtype=torch.int64)
                mask[0, : length // 2] = 0
                inputs["attention_mask"] = mask
            _run(model, **inputs)
    expected, found = plain.trace(), ringed.trace()
    assert found.digest == expected.digest
    assert found.experts_TLK.dtype == expected.experts_TLK.dtype
    assert (recorder.num_tokens, recorder.num_dropped) == (expected.num_tokens, 0)


def test_sequences_go_on_through_a_ring(model: Any) -> None:
    """A generation recorded step by step through a ring is the one recorded at once, positions and all."""
    plain, ringed = _sink(), _sink()
    ring = PinnedRing(SlowTransfer(), capacity_bytes=1000)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with Recorder(model, plain), Recorder(model, ringed, ring=ring, flush_tokens=3):
        model.generate(_tokens(2, 4), attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert ringed.trace().digest == plain.trace().digest


def test_a_step_waits_for_no_copy(model: Any) -> None:
    """While the ring has room, passes end with all copies still under way; closing waits for them."""
    transfer, sink = SlowTransfer(), _sink()
    recorder = Recorder(model, sink, ring=PinnedRing(transfer))
    for seed in range(5):
        _run(model, input_ids=_tokens(1, 4, seed))
    assert (transfer.waits, len(transfer.under_way)) == (0, 5)
    recorder.close()
    assert sink.trace().num_tokens == 20
    assert transfer.under_way == []


def test_a_flush_hands_everything_over(model: Any) -> None:
    """What is in the background and what still waits are there when it returns, in order."""
    sink = _sink()
    with Recorder(model, sink, ring=PinnedRing(SlowTransfer()), flush_tokens=8) as recorder:
        for seed in range(3):
            _run(model, input_ids=_tokens(1, 5, seed))
        recorder.flush()
        assert recorder.num_tokens == 15
    assert sink.trace().position_T.tolist() == [0, 1, 2, 3, 4] * 3  # type: ignore[union-attr]


def test_a_full_ring_drops_if_told_to(model: Any) -> None:
    """While the sink takes nothing, passes without room are left out whole and counted."""
    sink = HeldSink()
    ring = PinnedRing(HostTransfer(), capacity_bytes=2 * 64)  # a pass of 4 tokens takes 3 x 4 x 2 bytes
    with Recorder(model, sink, ring=ring, when_full="drop", flush_tokens=1) as recorder:
        for seed in range(4):
            _run(model, input_ids=_tokens(1, 4, seed))
        assert recorder.num_dropped == 8
        sink.free.set()
        recorder.flush()
        _run(model, input_ids=_tokens(1, 4, 4))
    whole = _sink()
    with Recorder(model, whole):
        for seed in (0, 1, 4):
            _run(model, input_ids=_tokens(1, 4, seed))
    assert np.array_equal(sink.trace().experts_TLK, whole.trace().experts_TLK)


def test_a_full_ring_waits_otherwise(model: Any) -> None:
    """The model goes on when the sink has taken the oldest pass; every token is there."""
    sink = HeldSink()
    ring = PinnedRing(HostTransfer(), capacity_bytes=2 * 64)
    later = threading.Timer(0.05, sink.free.set)
    with Recorder(model, sink, ring=ring, flush_tokens=1) as recorder:
        for seed in range(2):
            _run(model, input_ids=_tokens(1, 4, seed))
        assert recorder.num_tokens == 0
        later.start()
        _run(model, input_ids=_tokens(1, 4, 2))
        assert sink.free.is_set()
    later.join(PATIENCE_S)
    assert (sink.trace().num_tokens, recorder.num_dropped) == (12, 0)


def test_waiting_passes_are_written_before_the_ring_waits(model: Any) -> None:
    """A ring smaller than the flush threshold does not wait for itself."""
    sink = _sink()
    ring = PinnedRing(HostTransfer(), capacity_bytes=64)
    with Recorder(model, sink, ring=ring, flush_tokens=1000):
        for seed in range(4):
            _run(model, input_ids=_tokens(1, 4, seed))
    assert sink.trace().num_tokens == 16


def test_a_ring_full_of_others_is_told_of(model: Any) -> None:
    """Nobody here could make room, so nobody waits for it."""
    ring = PinnedRing(HostTransfer(), capacity_bytes=64)
    assert ring.put([torch.zeros(64, dtype=torch.uint8)]) is not None
    with Recorder(model, _sink(), ring=ring), pytest.raises(InputError, match="give each recorder its own"):
        _run(model, input_ids=_tokens(1, 4))


def test_a_failure_in_the_background_is_raised_by_a_later_pass(model: Any) -> None:
    """Once; its room in the ring is given back, and the recording goes on."""
    sink = FullSink(times=1)
    ring = PinnedRing(HostTransfer(), capacity_bytes=64)
    with Recorder(model, sink, ring=ring, flush_tokens=1) as recorder:
        _run(model, input_ids=_tokens(1, 4, 0))
        with pytest.raises(OSError, match="no space left"):
            recorder.flush()
        _run(model, input_ids=_tokens(1, 4, 1))
        recorder.flush()
        _run(model, input_ids=_tokens(1, 4, 2))
    assert sink.trace().num_tokens == 8


def test_a_failure_in_the_background_can_end_the_recording(model: Any) -> None:
    """With stop-recording the next pass warns once, closes the sink and takes the hooks off."""
    sink = FullSink(times=100)
    ring = PinnedRing(HostTransfer(), capacity_bytes=64)
    recorder = Recorder(model, sink, ring=ring, flush_tokens=1, on_error="stop-recording")
    _run(model, input_ids=_tokens(1, 4, 0))
    with pytest.warns(RecordingStopped, match="no space left.*0 tokens were handed over, up to 4 are lost"):
        _run(model, input_ids=_tokens(1, 4, 1))  # the ring is full, so it waits for the first to fail
    assert isinstance(recorder.error, OSError)
    assert sink.num_closed == 1
    assert not any(module._forward_hooks for module in model.modules())
    recorder.close()
    assert sink.num_closed == 1


def test_a_failure_shows_at_the_latest_at_the_end(model: Any) -> None:
    """Closing raises what the background could not write, and closes the sink all the same."""
    sink = FullSink(times=100)
    recorder = Recorder(model, sink, ring=PinnedRing(HostTransfer()), flush_tokens=1)
    _run(model, input_ids=_tokens(1, 4))
    with pytest.raises(OSError, match="no space left"):
        recorder.close()
    assert sink.num_closed == 1


def test_an_unknown_answer_to_a_full_ring_is_refused(model: Any) -> None:
    """There are two."""
    with pytest.raises(InputError, match="neither 'wait' nor 'drop'"):
        Recorder(model, _sink(), when_full="block")  # type: ignore[arg-type]


def test_jobs_run_in_order_and_the_first_failure_is_told() -> None:
    """Later jobs are run after one that failed; a second failure is not told again."""
    done: list[int] = []

    def job(number: int, fails: bool) -> None:
        done.append(number)
        if fails:
            raise KeyError(number)

    writer = BackgroundWriter()
    for number, fails in enumerate((False, True, False, True)):
        writer.submit(lambda number=number, fails=fails: job(number, fails))  # type: ignore[misc]
    with pytest.raises(KeyError, match="1"):
        writer.wait_for_all()
    assert done == [0, 1, 2, 3]
    assert writer.wait_for_one() is False
    writer.drop()


def test_the_end_of_the_interpreter_writes_what_is_under_way() -> None:
    """A script that never closes: the thread ends its work, and the rest is written after it."""
    script = """
import torch
from placement.runtime.tiny import tiny_model
from traces.record import MemorySink, Recorder
from traces.record.pinned import PinnedRing
from traces.record.transfer import HostTransfer

class Told(MemorySink):
    def close(self):
        print(self.trace().num_tokens)

model = tiny_model("olmoe", num_layers=1)
recorder = Recorder(model, Told(num_experts=6), ring=PinnedRing(HostTransfer()), flush_tokens=8)
with torch.no_grad():
    for _ in range(3):
        model(torch.zeros(1, 5, dtype=torch.int64))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "15\n"
