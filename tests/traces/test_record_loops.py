"""The recorder in generation and training loops: caches that step back, compiled models, steps, samples."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from placement.errors import InputError
from placement.runtime.families.registry import moe_layers_of
from placement.runtime.tiny import tiny_model
from traces.record import MemorySink, NullRecorder, Recorder
from traces.record.sampling import kept_sequences
from traces.trace import Trace

EXPERTS = 6


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture
def small_model() -> Any:
    """One layer: compilers take their time."""
    return tiny_model("olmoe", num_layers=1)


def _tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def _sink() -> MemorySink:
    return MemorySink(num_experts=EXPERTS)


def _run(model: Any, **inputs: Any) -> None:
    with torch.no_grad():
        model(**inputs)


def _recorded(model: Any, **inputs: Any) -> Trace:
    sink = _sink()
    with Recorder(model, sink):
        _run(model, **inputs)
    return sink.trace()


def _positions(trace: Trace) -> dict[int, list[int]]:
    assert trace.sequence_T is not None
    assert trace.position_T is not None
    return {
        int(sequence): trace.position_T[trace.sequence_T == sequence].tolist()
        for sequence in np.unique(trace.sequence_T)
    }


def test_speculative_decoding_records_what_ran(model: Any) -> None:
    """Candidates taken back were computed: their positions come again, in the same sequence."""
    prompt = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2]])
    sink = _sink()
    with Recorder(model, sink):
        text = model.generate(prompt, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=False)
    trace = sink.trace()
    positions = _positions(trace)
    assert list(positions) == [0]
    assert sorted(set(positions[0])) == list(range(text.shape[1] - 1))
    assert len(positions[0]) > text.shape[1] - 1
    last = {position: place for place, position in enumerate(positions[0])}
    final = trace.experts_TLK[[last[position] for position in range(text.shape[1] - 1)]]
    assert np.array_equal(final, _recorded(model, input_ids=text[:, :-1]).experts_TLK)


def test_a_cropped_cache_goes_on_in_its_sequence(model: Any) -> None:
    """Positions step back with the cache; the sequence stays."""
    sink = _sink()
    with Recorder(model, sink), torch.no_grad():
        cache = model(_tokens(1, 5), use_cache=True).past_key_values
        cache.crop(-3)
        model(_tokens(1, 2), past_key_values=cache)
    assert _positions(sink.trace()) == {0: [0, 1, 2, 3, 4, 2, 3]}


def test_beam_search_records_every_beam(model: Any) -> None:
    """Two prompts of three beams are six rows, each a sequence with every position once."""
    sink = _sink()
    with Recorder(model, sink):
        prompts = {"input_ids": _tokens(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}
        model.generate(**prompts, num_beams=3, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert _positions(sink.trace()) == {row: list(range(4 + 4)) for row in range(6)}


def test_a_static_cache_is_followed(model: Any) -> None:
    """A cache of fixed size tells its length; padding in its prefill does not show, so rows are named."""
    options = {"cache_implementation": "static", "disable_compile": True, "do_sample": False}
    sink = _sink()
    with Recorder(model, sink) as recorder:
        model.generate(_tokens(1, 4), max_new_tokens=4, **options)
        padded = {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), "pad_token_id": 0}
        with pytest.raises(InputError, match=r"attention mask of shape .* name the tokens"):
            model.generate(_tokens(2, 4), max_new_tokens=2, **padded, **options)
        with recorder.batch(sequence_ids=[7, 8]):
            model.generate(_tokens(2, 4), max_new_tokens=2, **padded, **options)
    positions = _positions(sink.trace())
    assert list(positions) == [0, 7, 8]
    assert positions[0] == list(range(7))
    assert positions[8] == list(range(5))


@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba"])
def test_hybrid_models_generate(model_type: str) -> None:
    """Models of recurrent and attention layers continue their sequences, left padding and all."""
    layers = {
        "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    }[model_type]
    model: Any = tiny_model(model_type, num_layers=2, mamba_dt_rank=4, mamba_d_state=4, **layers)
    sink = _sink()
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with Recorder(model, sink):
        model.generate(_tokens(2, 3), attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert _positions(sink.trace()) == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3, 4]}


@pytest.mark.parametrize("attached", ["before", "after"])
def test_a_compiled_model_is_recorded(small_model: Any, attached: str) -> None:
    """Ids are those of the plain model, whether the recorder came before the compiler or after it."""
    expected = _recorded(small_model, input_ids=_tokens(2, 5)).experts_TLK
    torch.compiler.reset()
    sink = _sink()
    recorder = Recorder(small_model, sink) if attached == "before" else None
    compiled: Any = torch.compile(small_model, backend="eager")
    with recorder or Recorder(compiled, sink):
        for _ in range(3):
            _run(compiled, input_ids=_tokens(2, 5))
    trace = sink.trace()
    assert np.array_equal(trace.experts_TLK, np.concatenate([expected] * 3))
    assert _positions(trace) == {row: list(range(5)) for row in range(6)}


def test_a_fully_compiled_model_is_recorded(small_model: Any) -> None:
    """Without a graph break: passes begin and end outside of what is compiled; nothing is compiled anew."""
    torch.compiler.reset()
    compiled: Any = torch.compile(small_model, backend="eager", fullgraph=True)
    sink = _sink()
    with Recorder(compiled, sink), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(4):
            _run(compiled, input_ids=_tokens(2, 5, seed))
    expected = np.concatenate(
        [_recorded(small_model, input_ids=_tokens(2, 5, seed)).experts_TLK for seed in range(4)]
    )
    assert np.array_equal(sink.trace().experts_TLK, expected)


def test_hooks_that_the_compiler_does_not_see_are_told_of(small_model: Any) -> None:
    """A model compiled and run before the recorder came is refused at its first pass, not skipped."""
    torch.compiler.reset()
    compiled: Any = torch.compile(small_model, backend="eager")
    _run(compiled, input_ids=_tokens(1, 3))
    with (
        Recorder(compiled, _sink()),
        pytest.raises(InputError, match=r"0 of the 1 MoE layers ran.*compiler\.reset"),
    ):
        _run(compiled, input_ids=_tokens(1, 3))
    torch.compiler.reset()


def test_a_model_compiled_in_place_is_refused(model: Any) -> None:
    """Its hooks are inside of what is compiled; the message says what works."""
    model.compile(backend="eager")
    with pytest.raises(InputError, match="OlmoeForCausalLM is compiled in place already"):
        Recorder(model, _sink())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_under_autocast(model: Any, dtype: torch.dtype) -> None:
    """Routers of bfloat16 weights and of autocast are recorded as they select."""
    model.to(dtype)
    sink, seen = _sink(), list[torch.Tensor]()
    for layer in moe_layers_of(model):
        layer.router.register_forward_hook(lambda router, args, output: seen.append(output[2]))
    with Recorder(model, sink), torch.autocast("cpu", dtype=torch.bfloat16):
        _run(model, input_ids=_tokens(2, 5))
    assert np.array_equal(sink.trace().experts_TLK, torch.stack(seen, dim=1).numpy())


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_accumulation_and_evaluation(model: Any, reentrant: bool) -> None:
    """Checkpointed micro-batches are recorded once, evaluations between them not at all."""
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sink = _sink()
    with Recorder(model, sink) as recorder:
        for step in range(2):
            for micro in range(2):
                batch = _tokens(2, 4, seed=2 * step + micro)
                model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with recorder.paused():
                model.eval()
                _run(model, input_ids=_tokens(3, 5))
                model.train()
    assert _positions(sink.trace()) == {row: list(range(4)) for row in range(8)}


def test_pauses_nest_and_a_cache_survives_them(model: Any) -> None:
    """Tokens of a pause are missing, and the sequence goes on behind them with its true positions."""
    sink = _sink()
    with Recorder(model, sink) as recorder, torch.no_grad():
        cache = model(_tokens(1, 3), use_cache=True).past_key_values
        with recorder.paused():
            with recorder.paused():
                model(_tokens(1, 1), past_key_values=cache)
            model(_tokens(1, 1), past_key_values=cache)
        model(_tokens(1, 1), past_key_values=cache)
        with pytest.raises(InputError, match="not paused"):
            recorder.resume()
    assert _positions(sink.trace()) == {0: [0, 1, 2, 5]}


def test_every_nth_pass_is_a_step_unless_told(model: Any) -> None:
    """Passes 0, 3 and 6 of seven are recorded."""
    sink = _sink()
    with Recorder(model, sink, every_steps=3):
        for seed in range(7):
            _run(model, input_ids=_tokens(1, 2, seed))
    expected = [_recorded(model, input_ids=_tokens(1, 2, seed)).experts_TLK for seed in (0, 3, 6)]
    assert np.array_equal(sink.trace().experts_TLK, np.concatenate(expected))


@pytest.mark.parametrize("by", ["step", "follow"])
def test_steps_are_those_of_the_optimizer(model: Any, by: str) -> None:
    """With two micro-batches a step, steps 0 and 2 of three are recorded whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sink = _sink()
    with Recorder(model, sink, every_steps=2) as recorder:
        if by == "follow":
            recorder.follow(optimizer)
        else:
            recorder.step()
            recorder.step()  # steps may have been done before: two on, still an even one
        for seed in range(6):
            model(input_ids=_tokens(1, 2, seed)).logits.sum().backward()
            if seed % 2:
                optimizer.step()
                if by == "step":
                    recorder.step()
    expected = [_recorded(model, input_ids=_tokens(1, 2, seed)).experts_TLK for seed in (0, 1, 4, 5)]
    assert np.array_equal(sink.trace().experts_TLK, np.concatenate(expected))
    assert not optimizer._optimizer_step_post_hooks  # type: ignore[attr-defined]


@settings(max_examples=20, deadline=None)
@given(
    rank=st.integers(0, 1000),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    flush_tokens=st.sampled_from([1, 7, 1000]),
)
def test_sequences_are_sampled_whole(rank: int, share: float, flush_tokens: int) -> None:
    """Each sequence is there with all its tokens or not at all, however the recording is buffered."""
    model = tiny_model("mixtral", num_layers=1)
    whole, part = _sink(), _sink()
    options: dict[str, Any] = {"sample_sequences": share, "rank": rank, "flush_tokens": flush_tokens}
    with Recorder(model, whole), Recorder(model, part, **options) as recorder:
        for seed in range(4):
            _run(model, input_ids=_tokens(5, 3, seed))
    kept_T = kept_sequences(np.repeat(np.arange(20), 3), share, rank=rank)
    assert recorder.num_tokens == kept_T.sum()
    if kept_T.any():
        expected = whole.trace().select_tokens(np.flatnonzero(kept_T))
        assert part.trace().digest == expected.digest


def test_shares_are_kept_and_ranks_differ() -> None:
    """A tenth of a hundred thousand sequences is a tenth, and another rank chooses others."""
    sequences = np.arange(100_000)
    first, second = (kept_sequences(sequences, 0.1, rank=rank) for rank in (0, 1))
    assert abs(first.mean() - 0.1) < 0.005
    assert abs((first & second).mean() - 0.01) < 0.002
    assert kept_sequences(sequences, 1.0, rank=0).all()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_out_of_range_is_refused(model: Any, share: float) -> None:
    """There is no recording of nothing, nor of more than everything."""
    with pytest.raises(InputError, match="is no share over 0 and up to 1"):
        Recorder(model, _sink(), sample_sequences=share)


def test_the_recorder_that_is_off_takes_every_call(model: Any) -> None:
    """Code written for a recorder runs with the one that does nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    off = NullRecorder().stop_on_signals()
    public = {name for name in dir(Recorder) if not name.startswith("_")}
    assert public <= set(dir(NullRecorder))
    with off, off.paused(), off.batch(shape=(1, 2)):
        off.pause()
        off.resume()
        off.step()
        off.follow(optimizer)
        off.flush()
    assert off.error is None
    assert not any(module._forward_hooks for module in nn.Module.modules(model))
