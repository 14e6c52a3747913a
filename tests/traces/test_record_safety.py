"""Recordings end well: on signals, at exit, on full disks; ranks record into one data set."""

import atexit
import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from placement.errors import InputError
from traces.record import MemorySink, Recorder, RecordingStopped, recorder_for
from traces.store import read_dataset, writer
from traces.trace import Trace

EXPERTS = 6


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def _train_step(model: Any, seed: int) -> None:
    batch = _tokens(2, 4, seed)
    model(input_ids=batch, labels=batch).loss.backward()


def _step(model: Any, seed: int) -> None:
    """A forked child's step: autograd's threads, which other tests may have started, survive no fork."""
    with torch.no_grad():
        model(_tokens(2, 4, seed))


def _expected(model: Any, seeds: range) -> Trace:
    sink = MemorySink(num_experts=EXPERTS)
    with Recorder(model, sink), torch.no_grad():
        for seed in seeds:
            model(_tokens(2, 4, seed))
    return sink.trace()


def _forked(*works: Callable[[], None]) -> list[int]:
    """Exit codes of child processes that run these together; a signal's number is negative."""
    children = []
    for work in works:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads around
            child = os.fork()
        if child == 0:
            code = 1
            try:
                atexit._clear()
                work()
                atexit._run_exitfuncs()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


class _FullDisk(MemorySink):
    """Takes one batch, then no more."""

    closed = False

    def append(self, *args: Any, **kwargs: Any) -> None:
        """Fail from the second time on."""
        if self._batches:
            raise InputError("trace: the disk is full")
        super().append(*args, **kwargs)

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def test_a_full_disk_ends_the_recording_and_not_the_training(model: Any) -> None:
    """One warning, no hook left, gradients of every step; what was taken is readable."""
    sink = _FullDisk(num_experts=EXPERTS)
    recorder = Recorder(model, sink, flush_tokens=8, on_error="stop-recording")
    _train_step(model, 0)
    with pytest.warns(RecordingStopped, match=r"goes on: trace: the disk is full \(8 tokens .* 8 are lost"):
        _train_step(model, 1)
    for seed in range(2, 4):
        _train_step(model, seed)
    recorder.close()
    assert str(recorder.error) == "trace: the disk is full"
    assert sink.closed
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert sink.trace().digest == _expected(model, range(1)).digest
    assert model.lm_head.weight.grad is not None


def test_a_full_disk_is_raised_where_asked(model: Any) -> None:
    """The default of the class: nobody takes a part for the whole."""
    recorder = Recorder(model, _FullDisk(num_experts=EXPERTS), flush_tokens=8)
    _train_step(model, 0)
    with pytest.raises(InputError, match="disk is full"):
        _train_step(model, 1)
    recorder.close()
    with pytest.raises(InputError, match="on_error 'ignore' is neither"):
        Recorder(model, MemorySink(num_experts=EXPERTS), on_error="ignore")  # type: ignore[arg-type]


def test_a_data_set_on_a_full_disk_stays_valid(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer's own failure: the model goes on, and the fragments before it are a data set."""
    recorder = recorder_for(model, tmp_path / "set")
    _train_step(model, 0)
    recorder.flush()
    recorder._sink.flush()  # type: ignore[union-attr]

    def full(*args: Any, **kwargs: Any) -> Any:
        raise InputError("no space left on device")

    _train_step(model, 1)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "store", full)
        patch.setattr(writer.Spool, "append", full)
        with pytest.warns(RecordingStopped, match="no space left on device"):
            recorder.close()
    _train_step(model, 2)
    assert np.array_equal(read_dataset(tmp_path / "set").experts_TLK, _expected(model, range(1)).experts_TLK)


def test_a_wrong_batch_does_not_end_a_training_run(model: Any, tmp_path: Path) -> None:
    """Labels that do not fit end the recording with a warning as well."""
    recorder = recorder_for(model, tmp_path / "set")
    with (
        pytest.warns(RecordingStopped, match="sequence_ids has shape"),
        recorder.batch(sequence_ids=[1, 2, 3]),
    ):
        _train_step(model, 0)
    assert isinstance(recorder.error, InputError)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_after_the_flush(model: Any, tmp_path: Path, number: int) -> None:
    """The process dies of the signal as it would have, and every step before it is in the data set."""

    def work() -> None:
        # Whatever ran in this process before (Ray, say) may have left a handler of its own.
        signal.signal(number, signal.SIG_DFL)
        recorder_for(model, tmp_path / "set").stop_on_signals()
        for seed in range(3):
            _step(model, seed)
        os.kill(os.getpid(), number)
        _step(model, 3)

    assert _forked(work) == [-number]
    assert np.array_equal(read_dataset(tmp_path / "set").experts_TLK, _expected(model, range(3)).experts_TLK)


def test_a_handler_that_was_there_gets_its_signal(model: Any) -> None:
    """The program's own handler runs after the flush, and is back in place afterwards."""
    sink, seen = MemorySink(num_experts=EXPERTS), list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        own = signal.getsignal(signal.SIGTERM)
        recorder = Recorder(model, sink).stop_on_signals(signal.SIGTERM).stop_on_signals(signal.SIGTERM)
        _train_step(model, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    recorder.close()
    assert sink.trace().num_tokens == 8


def test_ctrl_c_stays_a_keyboard_interrupt(model: Any) -> None:
    """Python's own handler of SIGINT raises as ever, in the loop, after the flush."""
    sink = MemorySink(num_experts=EXPERTS)
    Recorder(model, sink).stop_on_signals()
    _train_step(model, 0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert sink.trace().num_tokens == 8


def test_a_signal_in_the_middle_of_a_write_waits_for_its_end(model: Any) -> None:
    """Tokens are handed over once and whole; then the signal takes its course."""

    class Interrupted(MemorySink):
        def append(self, *args: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().append(*args, **kwargs)

    sink = Interrupted(num_experts=EXPERTS)
    recorder = Recorder(model, sink).stop_on_signals()
    _train_step(model, 0)
    with pytest.raises(KeyboardInterrupt):
        recorder.flush()
    assert sink.trace().num_tokens == recorder.num_tokens == 8


def test_signals_outside_the_main_thread_are_refused(model: Any) -> None:
    """Python takes handlers in the main thread alone; the message says so."""
    raised: list[InputError] = []

    def work() -> None:
        with Recorder(model, MemorySink(num_experts=EXPERTS)) as recorder:
            try:
                recorder.stop_on_signals()
            except InputError as exc:
                raised.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [str(one) for one in raised] == [
        "signals can be handled in the main thread alone; call stop_on_signals there"
    ]


def test_the_end_of_the_interpreter_flushes(model: Any, tmp_path: Path) -> None:
    """A script that forgot to close, or that ends by sys.exit, leaves all of its tokens."""

    def work() -> None:
        recorder_for(model, tmp_path / "set")
        _step(model, 0)

    assert _forked(work) == [0]
    assert read_dataset(tmp_path / "set").num_tokens == 8


def test_a_forked_child_leaves_its_parents_recording_alone(model: Any, tmp_path: Path) -> None:
    """A data loader's worker that ends does not write what the parent will write."""
    recorder = recorder_for(model, tmp_path / "set")
    _train_step(model, 0)
    assert _forked(recorder.close) == [0]
    recorder.close()
    assert read_dataset(tmp_path / "set").num_tokens == 8


def test_an_exception_in_the_loop_keeps_what_was_recorded(model: Any, tmp_path: Path) -> None:
    """The context manager closes, and the exception goes on."""

    def loop() -> None:
        with recorder_for(model, tmp_path / "set"):
            _train_step(model, 0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert read_dataset(tmp_path / "set").num_tokens == 8


def test_a_recording_is_continued(model: Any, tmp_path: Path) -> None:
    """Appended sequences have numbers of their own, and all tokens are there in order."""
    for seed in range(2):
        with recorder_for(model, tmp_path / "set", append=True):
            _train_step(model, seed)
    trace = read_dataset(tmp_path / "set")
    assert trace.sequence_T is not None
    assert trace.sequence_T.tolist() == np.repeat(range(4), 4).tolist()
    assert np.array_equal(trace.experts_TLK, _expected(model, range(2)).experts_TLK)


def test_a_killed_recording_is_resumed(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SIGKILL leaves what was handed over in the spool; resuming recovers it, says so and numbers on."""

    def work() -> None:
        recorder = recorder_for(model, tmp_path / "set")
        _step(model, 0)
        recorder.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    assert _forked(work) == [-signal.SIGKILL]
    with recorder_for(model, tmp_path / "set", resume=True):
        _train_step(model, 1)
    assert "resumed after 0 stored tokens: 8 more recovered from 1 spooled batches" in caplog.text
    trace = read_dataset(tmp_path / "set")
    assert trace.sequence_T is not None
    assert trace.sequence_T.tolist() == np.repeat(range(4), 4).tolist()
    assert np.array_equal(trace.experts_TLK, _expected(model, range(2)).experts_TLK)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_ranks_record_into_one_data_set(model: Any, tmp_path: Path, wrapper: str) -> None:
    """Two processes of one training run: tokens come with their rank, in turn, and an old set is replaced."""

    def rank_of(rank: int) -> Callable[[], None]:
        def work() -> None:
            store = f"file://{tmp_path}/{wrapper}"
            distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            wrapped = _wrapped(model, wrapper)
            with recorder_for(wrapped, tmp_path / "set", overwrite=True) as recorder:
                for seed in range(rank, 4, 2):
                    _step(wrapped, seed)
            assert recorder.num_tokens == 16
            distributed.barrier()
            distributed.destroy_process_group()

        return work

    with recorder_for(model, tmp_path / "set"):
        _train_step(model, 9)
    assert _forked(rank_of(0), rank_of(1)) == [0, 0]
    trace = read_dataset(tmp_path / "set")
    assert trace.rank_T is not None
    expected = _expected(model, range(4)).experts_TLK.reshape(2, 2, 8, 3, 2)
    for rank in range(2):
        assert np.array_equal(trace.experts_TLK[trace.rank_T == rank].reshape(2, 8, 3, 2), expected[:, rank])


def _wrapped(model: Any, wrapper: str) -> Any:
    if wrapper == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=distributed.init_device_mesh("cpu", (2,)))
    return fully_shard(model, mesh=distributed.init_device_mesh("cpu", (2,)))
