"""The recorder writes down what the routers selected, for the right tokens, and leaves the model alone."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

from placement.cli.trace_record import record
from placement.errors import InputError, PlacementError
from placement.plan import Placement
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.hook import apply_placement
from placement.runtime.samples import resolve_model, sample_texts
from placement.runtime.tiny import tiny_model
from traces.record import MemorySink, NullRecorder, Recorder, record_text, recorder_for
from traces.record import text as record_module
from traces.store import read_dataset
from traces.trace import Trace

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
DENSE: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"decoder_sparse_step": 2},
}
EXPERTS = 6


pytestmark = pytest.mark.usefixtures("one_torch_thread")


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def _sink(**options: Any) -> MemorySink:
    return MemorySink(**({"num_experts": EXPERTS} | options))


def _run(model: Any, **inputs: Any) -> None:
    with torch.no_grad():
        model(**inputs)


def _routing_by_hand(model: nn.Module, **inputs: Any) -> np.ndarray[Any, Any]:
    """Experts of every place from what goes into each router, computed here: ``[places, layers, k]``."""
    layers: Any = moe_layers_of(model)
    seen: list[torch.Tensor] = []
    hooks = [
        layer.router.register_forward_pre_hook(lambda router, args: seen.append(args[0])) for layer in layers
    ]
    _run(model, **inputs)
    for hook in hooks:
        hook.remove()
    choices = [
        (hidden.reshape(-1, hidden.shape[-1]) @ layer.router.weight.T).topk(layer.top_k, dim=1).indices
        for hidden, layer in zip(seen, layers, strict=True)
    ]
    return torch.stack(choices, dim=1).numpy()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_recorded_ids_are_what_the_routers_select(model_type: str) -> None:
    """Ids equal the top-k of each router's input times its weight, dense layers left out."""
    model = tiny_model(model_type, num_layers=4, **DENSE.get(model_type, {}))
    inputs = {"input_ids": _tokens(3, 7)}
    sink = _sink()
    with Recorder(model, sink):
        _run(model, **inputs)
    trace = sink.trace()
    assert trace.experts_TLK.dtype == np.uint8
    assert np.array_equal(trace.experts_TLK, _routing_by_hand(model, **inputs))


def test_more_than_256_experts_take_two_bytes() -> None:
    """Ids over 255 survive."""
    model = tiny_model("olmoe", num_experts=300, num_layers=1)
    inputs = {"input_ids": _tokens(4, 30)}
    sink = _sink(num_experts=300)
    with Recorder(model, sink):
        _run(model, **inputs)
    trace = sink.trace()
    assert trace.experts_TLK.dtype == np.uint16
    assert trace.experts_TLK.max() > 255
    assert np.array_equal(trace.experts_TLK, _routing_by_hand(model, **inputs))


def test_each_row_of_a_prefill_is_a_sequence(model: Any) -> None:
    """Two passes of two rows are four sequences, positions from 0, row by row."""
    sink = _sink()
    with Recorder(model, sink) as recorder:
        _run(model, input_ids=_tokens(2, 3))
        _run(model, input_ids=_tokens(2, 2))
    trace = sink.trace()
    assert _list(trace.sequence_T) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert _list(trace.position_T) == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
    assert trace.domain_T is None
    assert (recorder.num_tokens, recorder.num_sequences) == (10, 4)


def _list(values: Any) -> list[int]:
    return list(values.tolist())


@pytest.mark.parametrize("give_positions", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_dropped(model: Any, side: str, give_positions: bool) -> None:
    """Padded places leave no record; positions count real tokens, given as position_ids or not."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    inputs = {"input_ids": _tokens(3, 4), "attention_mask": mask}
    if give_positions:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    sink = _sink()
    with Recorder(model, sink):
        _run(model, **inputs)
    trace = sink.trace()
    assert _list(trace.sequence_T) == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert _list(trace.position_T) == [0, 1, 0, 1, 2, 3, 0, 1, 2]
    assert np.array_equal(trace.experts_TLK, _routing_by_hand(model, **inputs)[mask.flatten() == 1])


def test_generation_with_a_cache_continues_sequences(model: Any) -> None:
    """Decode steps continue their rows: prompts of 2 and 4 real tokens, five more each, the last not run."""
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    sink = _sink()
    with Recorder(model, sink):
        model.generate(_tokens(2, 4), attention_mask=mask, **options)
    trace = sink.trace()
    by_sequence = {
        sequence: _list(trace.position_T[trace.sequence_T == sequence])  # type: ignore[index]
        for sequence in np.unique(trace.sequence_T)  # type: ignore[arg-type]
    }
    assert by_sequence == {0: list(range(2 + 5)), 1: list(range(4 + 5))}


def test_generated_tokens_are_routed_as_in_one_pass(model: Any) -> None:
    """The ids recorded step by step are those of the finished text run at once."""
    step_by_step, at_once = _sink(), _sink()
    with Recorder(model, step_by_step):
        text = model.generate(_tokens(1, 4), max_new_tokens=6, do_sample=False, use_cache=True)
    with Recorder(model, at_once):
        _run(model, input_ids=text[:, :-1])
    assert np.array_equal(step_by_step.trace().experts_TLK, at_once.trace().experts_TLK)


def test_a_cache_can_be_filled_in_pieces_and_in_turns(model: Any) -> None:
    """Two caches used in turns keep their own sequences; positions go on from each cache's length."""
    sink = _sink()
    with Recorder(model, sink), torch.no_grad():
        first = model(_tokens(1, 3), use_cache=True).past_key_values
        second = model(_tokens(2, 2), use_cache=True).past_key_values
        model(_tokens(1, 2), past_key_values=first, use_cache=True)
        model(_tokens(2, 1), past_key_values=second, use_cache=True)
        model(_tokens(1, 1), past_key_values=first, use_cache=True)
    trace = sink.trace()
    assert _list(trace.sequence_T) == [0, 0, 0, 1, 1, 2, 2, 0, 0, 1, 2, 0]
    assert _list(trace.position_T) == [0, 1, 2, 0, 1, 0, 1, 3, 4, 2, 2, 5]


def test_a_cache_returned_in_a_tuple_is_followed(model: Any) -> None:
    """Without return_dict the cache comes back in a tuple, and its sequence goes on all the same."""
    sink = _sink()
    with Recorder(model, sink), torch.no_grad():
        _, cache = model(_tokens(1, 3), use_cache=True, return_dict=False)
        model(_tokens(1, 1), past_key_values=cache)
    assert _list(sink.trace().sequence_T) == [0, 0, 0, 0]


def test_a_cache_from_before_the_recording_starts_new_sequences(model: Any) -> None:
    """Joining a generation midway gives its rows numbers, and keeps their true positions."""
    with torch.no_grad():
        cache = model(_tokens(2, 3), use_cache=True).past_key_values
    sink = _sink()
    with Recorder(model, sink):
        _run(model, input_ids=_tokens(2, 1), past_key_values=cache)
        _run(model, input_ids=_tokens(2, 1), past_key_values=cache)
    trace = sink.trace()
    assert _list(trace.sequence_T) == [0, 1, 0, 1]
    assert _list(trace.position_T) == [3, 3, 4, 4]


def test_packed_rows_are_cut_where_positions_restart(model: Any) -> None:
    """A row of three texts told apart by position_ids is three sequences."""
    sink = _sink()
    with Recorder(model, sink):
        _run(
            model,
            input_ids=_tokens(2, 5),
            position_ids=torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]),
        )
    assert _list(sink.trace().sequence_T) == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3]


def test_the_caller_can_name_the_tokens(model: Any) -> None:
    """Ids per row or per place, -1 for padding, positions and domains as given."""
    sink = _sink(domain_names=("a", "b"))
    with Recorder(model, sink) as recorder:
        with recorder.batch(sequence_ids=[7, 3], domains=[1, 0]):
            _run(model, input_ids=_tokens(2, 2))
        with recorder.batch(sequence_ids=[[5, 5, -1, 9]], positions=[[10, 11, 0, 4]], domains=[[0, 1, 0, 1]]):
            _run(model, input_ids=_tokens(1, 4))
        _run(model, input_ids=_tokens(1, 1))
    trace = sink.trace()
    assert _list(trace.sequence_T) == [7, 7, 3, 3, 5, 5, 9, 10]
    assert _list(trace.position_T) == [0, 1, 0, 1, 10, 11, 4, 0]
    assert _list(trace.domain_T) == [1, 1, 0, 0, 0, 1, 1, -1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"sequence_ids": [1, 2, 3]}, r"sequence_ids has shape \(3,\), the batch 2 rows of 4 places"),
        ({"positions": [0, 1]}, r"positions has shape \(2,\)"),
        ({"domains": [0.5, 1.5]}, "domains holds float64 values, not integers"),
    ],
)
def test_names_that_do_not_fit_are_refused(model: Any, labels: dict[str, Any], message: str) -> None:
    """The forward pass of a batch of another shape says so."""
    with (
        Recorder(model, _sink()) as recorder,
        recorder.batch(**labels),
        pytest.raises(InputError, match=message),
    ):
        _run(model, input_ids=_tokens(2, 4))


def test_a_mask_that_hides_padding_is_refused_unless_tokens_are_named(model: Any) -> None:
    """A 4-D mask does not tell padding apart; naming the tokens does."""
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    sink = _sink()
    with Recorder(model, sink) as recorder:
        with pytest.raises(
            InputError, match=r"mask of shape \(1, 1, 3, 3\): pass one of shape \(1, 3\), or name"
        ):
            _run(model, input_ids=_tokens(1, 3), attention_mask=mask)
        with recorder.batch(sequence_ids=[[0, 0, -1]]):
            _run(model, input_ids=_tokens(1, 3), attention_mask=mask)
    assert sink.trace().num_tokens == 2


def test_embeddings_can_be_given_for_ids(model: Any) -> None:
    """A pass over inputs_embeds is recorded like one over ids; one over neither is refused."""
    by_id, by_embedding = _sink(), _sink()
    with Recorder(model, by_id):
        _run(model, input_ids=_tokens(2, 3))
    with Recorder(model, by_embedding):
        _run(model, inputs_embeds=model.model.embed_tokens(_tokens(2, 3)))
    assert np.array_equal(by_id.trace().experts_TLK, by_embedding.trace().experts_TLK)
    with Recorder(model, _sink()), pytest.raises(InputError, match="without input_ids or inputs_embeds"):
        _run(model)


def test_logical_ids_are_recorded_while_a_placement_is_applied(model: Any) -> None:
    """Slots never reach the trace, whichever of the two was put on first."""
    placement = Placement(
        physical_to_logical_map_LS=np.tile(np.roll(np.arange(EXPERTS), 1), (3, 1)),
        device_of_slot_S=np.arange(EXPERTS) // 3,
        num_experts=EXPERTS,
        num_devices=2,
    )
    expected = _routing_by_hand(model, input_ids=_tokens(2, 5))
    for placement_first in (True, False):
        sink = _sink()
        with (
            apply_placement(model, placement) if placement_first else nullcontext(),
            Recorder(model, sink),
            nullcontext() if placement_first else apply_placement(model, placement),
        ):
            _run(model, input_ids=_tokens(2, 5))
        assert np.array_equal(sink.trace().experts_TLK, expected)


@settings(max_examples=30, deadline=None)
@given(
    batches=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=6),
    flush_tokens=st.integers(1, 40),
    sample_every=st.integers(1, 5),
)
def test_buffering_and_sampling_lose_nothing(
    batches: list[tuple[int, int]], flush_tokens: int, sample_every: int
) -> None:
    """However it is buffered, the trace is every n-th token of the unbuffered one."""
    model = tiny_model("mixtral", num_layers=1)
    whole, part = _sink(), _sink()
    with (
        Recorder(model, whole),
        Recorder(model, part, flush_tokens=flush_tokens, sample_every=sample_every),
    ):
        for seed, (rows, length) in enumerate(batches):
            _run(model, input_ids=_tokens(rows, length, seed))
    expected = whole.trace().select_tokens(slice(None, None, sample_every))
    assert part.trace().digest == expected.digest


def test_training_passes_are_recorded_once(model: Any) -> None:
    """Gradient checkpointing runs layers twice; tokens are recorded once, and gradients flow."""
    model.train()
    model.activation_checkpointing_enable()
    sink = _sink()
    with Recorder(model, sink):
        model(input_ids=_tokens(2, 4)).logits.sum().backward()
    assert sink.trace().num_tokens == 8
    assert moe_layers_of(model)[0].router.weight.grad is not None


def test_a_failed_pass_is_not_recorded(model: Any) -> None:
    """Tokens of a forward pass that raised are dropped; the next pass is recorded whole."""
    sink = _sink()
    with Recorder(model, sink):
        with pytest.raises(IndexError):
            _run(model, input_ids=torch.tensor([[1000]]))
        _run(model, input_ids=_tokens(1, 2))
    assert sink.trace().num_tokens == 2


def test_the_bare_decoder_and_positional_arguments_are_recorded(model: Any) -> None:
    """Calling the decoder itself, by position, works like calling the model."""
    sink = _sink()
    with Recorder(model, sink), torch.no_grad():
        model.base_model(_tokens(2, 3), torch.tensor([[1, 1, 1], [0, 1, 1]]))
    assert _list(sink.trace().position_T) == [0, 1, 2, 0, 1]


def test_closing_takes_every_hook_off(model: Any) -> None:
    """After the block, nothing is recorded and no hook is left; closing again does nothing."""
    sink = _sink()
    with Recorder(model, sink) as recorder:
        _run(model, input_ids=_tokens(1, 2))
    recorder.close()
    _run(model, input_ids=_tokens(1, 5))
    assert sink.trace().num_tokens == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_sink_is_closed_even_when_it_fails(model: Any) -> None:
    """A sink that cannot take tokens is still closed, and its failure is the caller's to see."""

    class Broken(MemorySink):
        closed = False

        def append(self, *args: Any, **kwargs: Any) -> None:
            raise InputError("disk full")

        def close(self) -> None:
            self.closed = True

    sink = Broken(num_experts=EXPERTS)
    recorder = Recorder(model, sink)
    _run(model, input_ids=_tokens(1, 2))
    with pytest.raises(InputError, match="disk full"):
        recorder.close()
    assert sink.closed


def test_outputs_are_not_touched(model: Any) -> None:
    """Logits are the same bits with and without a recorder."""
    with torch.no_grad():
        expected = model(_tokens(2, 6)).logits
        with Recorder(model, _sink()):
            actual = model(_tokens(2, 6)).logits
    assert torch.equal(actual, expected)


def test_bad_numbers_are_refused(model: Any) -> None:
    """Sampling and buffering need at least 1."""
    with pytest.raises(InputError, match="sample_every 0 and every_steps 1 must be at least 1"):
        Recorder(model, _sink(), sample_every=0)


def test_an_empty_recording_is_refused() -> None:
    """A trace has tokens."""
    with pytest.raises(InputError, match="nothing was recorded"):
        _sink().trace()


def test_off_means_no_hook(model: Any) -> None:
    """Without a path there is a recorder with the same methods that does nothing."""
    with recorder_for(model, None) as recorder, recorder.batch(sequence_ids=[1]):
        assert isinstance(recorder, NullRecorder)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        _run(model, input_ids=_tokens(3, 2))
        recorder.flush()
    assert (recorder.num_tokens, recorder.num_sequences) == (0, 0)


def test_every_rank_writes_its_own_shard(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, given or told by the launcher, share a folder; sequences are numbered per rank."""
    monkeypatch.setenv("RANK", "1")
    for rank, rows in ((0, 1), (None, 2)):
        with recorder_for(model, tmp_path / "set", rank=rank, model_name="tiny"):
            _run(model, input_ids=_tokens(rows, 2))
    trace = read_dataset(tmp_path / "set")
    assert _list(trace.rank_T) == [0, 0, 1, 1, 1, 1]
    assert _list(trace.sequence_T) == [0, 0, 0, 0, 1, 1]
    assert (trace.model_name, trace.moe_layer_ids) == ("tiny", (0, 1, 2))


def test_a_launcher_rank_that_is_none_is_refused(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RANK that is no number is named, and nothing is written."""
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK='first' is not a process rank"):
        recorder_for(model, tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level model of 3 layers, 6 experts, context 16."""
    folder = tmp_path_factory.mktemp("record") / "tiny"
    tiny_model("olmoe", vocab_size=256, context=16).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two domains: 40 and 20 bytes."""
    files = [tmp_path / "latin.txt", tmp_path / "digits.txt"]
    files[0].write_bytes(bytes(range(65, 105)))
    files[1].write_bytes(b"0123456789" * 2)
    return files


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("name", ["set", "trace.npz"])
def test_text_is_recorded_file_by_file(
    checkpoint: Path, texts: list[Path], tmp_path: Path, name: str, batch_size: int
) -> None:
    """Sequences of 16 + 16 + 8 and 16 + 4 bytes, whatever the batch and the kind of output."""
    done: list[tuple[int, int]] = []
    report = record_text(
        checkpoint, texts, tmp_path / name, batch_size=batch_size, progress=lambda *step: done.append(step)
    )
    trace = _read(tmp_path / name)
    lengths = [16, 16, 8, 16, 4]
    assert _list(trace.sequence_T) == np.repeat(range(5), lengths).tolist()
    assert _list(trace.position_T) == [position for length in lengths for position in range(length)]
    assert _list(trace.domain_T) == [0] * 40 + [1] * 20
    assert (trace.domain_names, trace.model_name) == (("latin", "digits"), "tiny")
    assert (report.num_tokens, report.num_sequences, report.interrupted) == (60, 5, False)
    assert done[-1] == (60, 60)
    first = _routing_by_hand(
        tiny_model("olmoe", vocab_size=256, context=16), input_ids=torch.arange(65, 81).unsqueeze(0)
    )
    assert np.array_equal(trace.experts_TLK[:16], first)


def _read(path: Path) -> Trace:
    if path.is_dir():
        return read_dataset(path)
    with np.load(path, allow_pickle=False) as stored:
        return Trace(
            experts_TLK=stored["topk"],
            num_experts=int(stored["num_experts"]),
            sequence_T=stored["sequence"],
            position_T=stored["position"],
            domain_T=stored["domain"],
            domain_names=tuple(stored["domain_names"].tolist()),
            model_name=str(stored["model_name"]),
            moe_layer_ids=tuple(stored["moe_layer_ids"].tolist()),
        )


def test_files_of_one_stem_are_one_domain(checkpoint: Path, texts: list[Path], tmp_path: Path) -> None:
    """a/x.txt and b/x.txt are the same domain."""
    other = tmp_path / "more" / "latin.txt"
    other.parent.mkdir()
    other.write_bytes(b"abc")
    record_text(checkpoint, [*texts, other], tmp_path / "set", context=8)
    trace = read_dataset(tmp_path / "set")
    assert trace.domain_names == ("latin", "digits")
    assert _list(trace.domain_T[-3:]) == [0, 0, 0]  # type: ignore[index]


def test_an_output_that_is_there_is_kept_unless_overwritten(
    checkpoint: Path, texts: list[Path], tmp_path: Path
) -> None:
    """Neither a data set nor a file is replaced unasked."""
    for name in ("set", "trace.npz"):
        record_text(checkpoint, texts, tmp_path / name)
        with pytest.raises(InputError, match=rf"{name}.*choose another output or overwrite it"):
            record_text(checkpoint, texts[:1], tmp_path / name)
        assert _read(tmp_path / name).num_tokens == 60
        record_text(checkpoint, texts[:1], tmp_path / name, overwrite=True)
        assert _read(tmp_path / name).num_tokens == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "a batch of 0 sequences"),
        ({"context": 17}, "17 tokens exceeds the model's 16"),
        ({"out": Path("nowhere/trace.npz")}, "there is no folder nowhere"),
    ],
)
def test_bad_options_write_nothing(
    checkpoint: Path, texts: list[Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Mistakes are found before the model runs."""
    with pytest.raises(InputError, match=message):
        record_text(checkpoint, texts, **({"out": tmp_path / "set"} | options))
    assert not (tmp_path / "set").exists()


def _interrupt_after(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the middle of the pass after so many."""
    real, calls = record_module._run_batch, iter(range(100))

    def interrupted(run: Any, rows: Any, *, seed: int) -> None:
        if next(calls) == passes:
            raise KeyboardInterrupt
        real(run, rows, seed=seed)

    monkeypatch.setattr(record_module, "_run_batch", interrupted)


@pytest.mark.parametrize("name", ["set", "trace.npz"])
def test_ctrl_c_keeps_what_was_recorded(
    checkpoint: Path, texts: list[Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five sequences were run: they are there, and the report says it was interrupted."""
    _interrupt_after(2, monkeypatch)
    report = record_text(checkpoint, texts, tmp_path / name, batch_size=1)
    assert (report.num_tokens, report.num_sequences, report.interrupted) == (32, 2, True)
    assert _list(_read(tmp_path / name).sequence_T) == [0] * 16 + [1] * 16


@pytest.mark.parametrize("name", ["set", "trace.npz"])
def test_ctrl_c_before_anything_leaves_nothing(
    checkpoint: Path, texts: list[Path], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a token there is no data set, and that is an error."""
    _interrupt_after(0, monkeypatch)
    with pytest.raises(PlacementError, match="interrupted before any token was recorded"):
        record_text(checkpoint, texts, tmp_path / name, batch_size=1)
    assert not (tmp_path / name).exists()


def _run_cli(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(record)
    return CliRunner().invoke(app, arguments)


def test_the_command_records_and_prints_json(checkpoint: Path, texts: list[Path], tmp_path: Path) -> None:
    """Several files may follow one --text; results go to stdout as one object."""
    result = _run_cli(
        "--model",
        str(checkpoint),
        "--text",
        *map(str, texts),
        "-o",
        str(tmp_path / "set"),
        "--context",
        "10",
        "--batch-size",
        "3",
        "--json",
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {
        "path": str(tmp_path / "set"),
        "tokens": 60,
        "sequences": 6,
        "num_layers": 3,
        "num_experts": 6,
        "top_k": 2,
        "domain_names": ["latin", "digits"],
        "interrupted": False,
    }
    assert read_dataset(tmp_path / "set").num_tokens == 60


def test_the_command_says_that_it_was_interrupted(
    checkpoint: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends with exit code 0 and a line that says what is there."""
    _interrupt_after(1, monkeypatch)
    result = _run_cli(
        "--model", str(checkpoint), "--text", str(texts[0]), "-o", str(tmp_path / "set"), "--batch-size", "1"
    )
    assert result.exit_code == 0, result.output
    assert "16 tokens of 1 sequences, 3 layers, top-2 of 6 experts\ninterrupted: " in result.stdout


@pytest.mark.model
def test_the_sample_model_routes_domains_differently(tmp_path: Path) -> None:
    """byte16 on four bundled texts: every expert is used, and Japanese is routed unlike Python."""
    chosen = [file for file in sample_texts() if file.stem in {"french", "german", "japanese", "python"}]
    parts = [tmp_path / file.name for file in chosen]
    for part, file in zip(parts, chosen, strict=True):
        part.write_bytes(file.read_bytes()[:2048])
    record_text(resolve_model("byte16"), parts, tmp_path / "set", context=1024)
    trace = read_dataset(tmp_path / "set")
    assert trace.experts_TLK.shape == (4 * 2048, 6, 2)
    load_DLE = np.array(
        [
            [
                np.bincount(trace.experts_TLK[trace.domain_T == domain, layer].ravel(), minlength=16)
                for layer in range(6)
            ]
            for domain in range(4)
        ]
    )
    assert (load_DLE.sum(axis=0) > 0).all()
    share_DLE = load_DLE / load_DLE.sum(axis=2, keepdims=True)
    japanese, python = (trace.domain_names.index(name) for name in ("japanese", "python"))
    assert np.abs(share_DLE[japanese] - share_DLE[python]).sum(axis=1).mean() > 0.5


def test_generated_tokens_are_decode_traffic(checkpoint: Path, texts: list[Path], tmp_path: Path) -> None:
    """Three tokens after each prompt of 13 or less, in its sequence and domain, repeatable by the seed."""
    for name, batch_size in (("set", 2), ("again", 2)):
        report = record_text(checkpoint, texts, tmp_path / name, generate=3, batch_size=batch_size)
    trace = read_dataset(tmp_path / "set")
    lengths = [13, 13, 13, 1, 13, 7]
    assert report.num_tokens == sum(lengths) + 3 * 6
    assert trace.sequence_T is not None
    assert trace.position_T is not None
    assert trace.domain_T is not None
    for sequence, length in enumerate(lengths):
        chosen = trace.sequence_T == sequence
        assert _list(trace.position_T[chosen]) == list(range(length + 3))
        assert set(_list(trace.domain_T[chosen])) == {int(sequence > 3)}
    assert trace.digest == read_dataset(tmp_path / "again").digest


def test_generated_tokens_are_drawn_and_run(checkpoint: Path, tmp_path: Path) -> None:
    """Generated tokens are routed as in one pass over prompt and answer; another seed answers otherwise."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(b"abcdef")
    texts_seen: list[torch.Tensor] = []
    loaded = record_module.load_checkpoint

    def watched(*args: Any, **kwargs: Any) -> Any:
        model: Any = loaded(*args, **kwargs)
        model.model.register_forward_pre_hook(
            lambda decoder, args, kwargs: texts_seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "load_checkpoint", watched)
        for seed in (1, 2):
            record_text(checkpoint, [prompt], tmp_path / f"set{seed}", generate=8, seed=seed)
    first, second = torch.cat(texts_seen[:9], dim=1), torch.cat(texts_seen[9:], dim=1)
    assert first.shape == (1, 14)
    assert not torch.equal(first, second)
    expected = _routing_by_hand(tiny_model("olmoe", vocab_size=256, context=16), input_ids=first)
    assert np.array_equal(read_dataset(tmp_path / "set1").experts_TLK, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generate": -1}, "-1 tokens to generate"),
        ({"generate": 16}, "16 tokens to generate after at least 1 of text exceed the model's context of 16"),
        ({"generate": 8, "context": 9}, "8 tokens to generate after 9 of text exceed"),
        ({"append": True, "overwrite": True}, "overwrite and append exclude each other"),
        ({"append": True, "out": Path("t.npz")}, "t.npz is one file, which cannot be continued"),
        ({"sample_sequences": 1e-9}, "no token was chosen by the sampling"),
    ],
)
def test_bad_ways_of_recording_write_nothing(
    checkpoint: Path, texts: list[Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    """Each is one line, and no folder is left."""
    with pytest.raises(InputError, match=message):
        record_text(checkpoint, texts, **({"out": tmp_path / "set"} | options))
    assert not (tmp_path / "set").exists()


def test_text_can_be_appended(checkpoint: Path, texts: list[Path], tmp_path: Path) -> None:
    """The same text again is new sequences."""
    for _ in range(2):
        record_text(checkpoint, texts, tmp_path / "set", append=True)
    trace = read_dataset(tmp_path / "set")
    assert _list(trace.sequence_T) == np.repeat(range(10), [16, 16, 8, 16, 4] * 2).tolist()


def test_an_interrupted_recording_goes_on_where_it_ended(
    checkpoint: Path, texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, it makes the data set that it would have made at once; resumed again, it adds nothing."""
    with monkeypatch.context() as patch:
        _interrupt_after(2, patch)
        record_text(checkpoint, texts, tmp_path / "set", batch_size=1)
    report = record_text(checkpoint, texts, tmp_path / "set", resume=True)
    assert (report.num_tokens, report.num_sequences) == (28, 5)
    record_text(checkpoint, texts, tmp_path / "whole")
    assert read_dataset(tmp_path / "set").digest == read_dataset(tmp_path / "whole").digest
    assert record_text(checkpoint, texts, tmp_path / "set", resume=True).num_tokens == 0


def test_sampled_sequences_are_whole(checkpoint: Path, texts: list[Path], tmp_path: Path) -> None:
    """Half of the sequences, each with all of its tokens."""
    record_text(checkpoint, texts, tmp_path / "set", context=4, sample_sequences=0.5)
    trace = read_dataset(tmp_path / "set")
    assert trace.sequence_T is not None
    numbers, counts = np.unique(trace.sequence_T, return_counts=True)
    assert 0 < len(numbers) < 15
    assert set(counts.tolist()) == {4}


def test_a_checkpoint_without_an_adapter_is_recorded_by_name(
    checkpoint: Path, texts: list[Path], tmp_path: Path
) -> None:
    """A model type that nobody knows is refused with the way out, and --router takes it."""
    import transformers

    class Unknown(transformers.OlmoeConfig):  # type: ignore[misc]
        model_type = "unheard_of"

    class UnknownForCausalLM(transformers.OlmoeForCausalLM):  # type: ignore[misc]
        config_class = Unknown

    transformers.AutoConfig.register("unheard_of", Unknown, exist_ok=True)
    transformers.AutoModelForCausalLM.register(Unknown, UnknownForCausalLM, exist_ok=True)
    folder = tmp_path / "unheard"
    known: Any = record_module.load_checkpoint(checkpoint)
    unknown: Any = UnknownForCausalLM(Unknown(**known.config.to_diff_dict() | {"model_type": "unheard_of"}))
    unknown.load_state_dict(known.state_dict())
    unknown.save_pretrained(folder)
    common = ["--model", str(folder), "--text", str(texts[0]), "-o", str(tmp_path / "set")]
    refused = _run_cli(*common)
    assert isinstance(refused.exception, InputError)
    assert "unsupported model type 'unheard_of'" in str(refused.exception)
    assert "trace record --router" in str(refused.exception)
    result = _run_cli(*common, "--router", "layers.*.mlp.gate", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_experts"] == 6
    record_text(checkpoint, texts[:1], tmp_path / "by_family")
    assert np.array_equal(
        read_dataset(tmp_path / "set").experts_TLK, read_dataset(tmp_path / "by_family").experts_TLK
    )


def test_options_of_named_routers_need_one(checkpoint: Path, texts: list[Path], tmp_path: Path) -> None:
    """--top-k alone says nothing."""
    result = _run_cli("--model", str(checkpoint), "--text", str(texts[0]), "--top-k", "2")
    assert "describe routers found by --router" in str(result.exception)
