"""Every family is recorded from a whole forward pass, and models of no family by their routers' names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from routing_reference import randomise_biases, reference_top_k
from torch import nn

from placement.errors import InputError
from placement.runtime.families.generic import GenericFamily
from placement.runtime.families.registry import family_of, moe_layers_of, supported_families
from placement.runtime.families.training import FRAMEWORKS
from placement.runtime.tiny import tiny_model
from traces.record import MemorySink, Recorder, record_text

FAMILIES = tuple(sorted(set(supported_families()) - {one.model_type for one in FRAMEWORKS}))
EXPERTS, TOP_K, WIDTH, VOCABULARY = 8, 2, 16, 32


def _tokens(rows: int = 2, places: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, places), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_recorded_ids_follow_the_familys_rule(model_type: str) -> None:
    """A pass of every family, a padded row in it: ids are those of the rule, padding is left out."""
    model = tiny_model(model_type, num_layers=2, num_experts=EXPERTS, top_k=TOP_K)
    randomise_biases(model)
    layers = moe_layers_of(model)
    expected: list[Any] = []

    def refer(router: nn.Module, args: Any, kwargs: Any) -> None:
        expected.append(reference_top_k(model_type, router, (*args, *kwargs.values()), TOP_K))

    for layer in layers:
        layer.router.register_forward_pre_hook(refer, with_kwargs=True)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    sink = MemorySink(num_experts=layers[0].num_experts)
    with Recorder(model, sink), torch.no_grad():
        model(input_ids=_tokens(), attention_mask=mask)
    trace = sink.trace()
    kept = mask.flatten().numpy() == 1
    assert np.array_equal(np.sort(trace.experts_TLK, axis=2), np.stack(expected, axis=1)[kept])
    assert trace.sequence_T is not None
    assert trace.sequence_T.tolist() == [0] * 6 + [1] * 4


class TokenChoiceTopKRouter(nn.Module):
    """Stand-in for torchtitan's router: (scores, ids, tokens per expert)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.num_experts, self.top_k = EXPERTS, TOP_K

    def forward(
        self, x: torch.Tensor, expert_bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens by the sigmoid of their scores, plus a bias that only selects."""
        scores = self.gate(x).float().sigmoid()
        _, index = torch.topk(scores + (expert_bias if expert_bias is not None else 0), k=TOP_K, dim=1)
        counts = torch.histc(index.float().view(-1), bins=EXPERTS, min=0, max=EXPERTS)
        return scores.gather(1, index), index, counts


class TopKRouter(nn.Module):
    """Stand-in for Megatron Core's router: (probabilities, bool map), tokens place by place."""

    def __init__(self, layer_number: int, capacity: int | None = None) -> None:
        super().__init__()

        class TransformerConfig:
            num_moe_experts = EXPERTS
            moe_router_topk = TOP_K

        self.config = TransformerConfig()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.topk, self.layer_number, self.capacity = TOP_K, layer_number, capacity

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route tokens by softmax; beyond the capacity of an expert a token loses it."""
        logits = x.reshape(-1, WIDTH) @ self.weight.T
        index = logits.topk(TOP_K, dim=1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, True)
        if self.capacity is not None:
            chosen &= chosen.cumsum(dim=0) <= self.capacity
        return logits.softmax(dim=1) * chosen, chosen


class _Layer(nn.Module):
    """A residual layer that only routes, under the framework's own attribute names."""

    def __init__(self, block: str, router: nn.Module) -> None:
        super().__init__()
        self.add_module(block, nn.ModuleDict({"router": router}))
        self._block = block

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Add something that depends on the routing."""
        flat = hidden if isinstance(self.router, TopKRouter) else hidden.reshape(-1, WIDTH)
        weights = self.router(flat)[0].sum(dim=1)
        return hidden * (1 + weights.reshape(hidden.shape[:2])).unsqueeze(-1)

    @property
    def router(self) -> nn.Module:
        """The layer's router."""
        found: nn.Module = getattr(self, self._block)["router"]
        return found


class Torchtitan(nn.Module):
    """A model of torchtitan's making: `forward(tokens)`, layers in a dictionary, no configuration."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(i): _Layer("moe", TokenChoiceTopKRouter()) for i in (1, 2)})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Run the layers."""
        hidden: torch.Tensor = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            hidden = layer(hidden)
        return hidden


class GPTModel(nn.Module):
    """A model of Megatron Core's making: activations are ``[places, rows, width]``."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(_Layer("mlp", TopKRouter(n, capacity)) for n in (3, 4))

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the layers."""
        hidden: torch.Tensor = self.embedding(input_ids).transpose(0, 1)
        layers: Any = self.decoder.layers
        for layer in layers:
            hidden = layer(hidden)
        return hidden


def _sink() -> MemorySink:
    return MemorySink(num_experts=EXPERTS)


def test_a_torchtitan_model_is_recorded() -> None:
    """It is known by its routers' class; ids are those of the second output, rows are sequences."""
    model, sink, seen = Torchtitan(), _sink(), list[torch.Tensor]()
    assert family_of(model).model_type == "torchtitan"
    with Recorder(model, sink), torch.no_grad():
        for layer in model.layers.values():
            layer.router.register_forward_hook(lambda router, args, output: seen.append(output[1]))
        model(_tokens())
    trace = sink.trace()
    assert np.array_equal(trace.experts_TLK, torch.stack(seen, dim=1).numpy())
    assert trace.sequence_T is not None
    assert trace.position_T is not None
    assert trace.sequence_T.tolist() == [0] * 6 + [1] * 6
    assert trace.position_T.tolist() == [*range(6)] * 2
    assert [layer.decoder_layer for layer in moe_layers_of(model)] == [1, 2]


def test_a_megatron_model_is_recorded_row_by_row() -> None:
    """Ids come from the map, and tokens that the routers saw place by place are put into their rows."""
    model, sink = GPTModel(), _sink()
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        with Recorder(model, sink):
            model(_tokens(), torch.arange(6).expand(2, 6), causal)
        layer: Any = model.decoder.layers[0]  # type: ignore[index]
        expected = (model.embedding(_tokens().flatten()) @ layer.router.weight.T).topk(TOP_K, dim=1).indices
    trace = sink.trace()
    assert np.array_equal(np.sort(trace.experts_TLK[:, 0], axis=1), expected.sort(dim=1).values.numpy())
    assert trace.sequence_T is not None
    assert trace.sequence_T.tolist() == [0] * 6 + [1] * 6
    assert [layer.decoder_layer for layer in moe_layers_of(model)] == [2, 3]


def test_tokens_that_lost_an_expert_are_refused() -> None:
    """A map with fewer experts than top-k is no routing of ours: capacity must be off."""
    model = GPTModel(capacity=1)
    recorder = Recorder(model, _sink())
    with torch.no_grad():
        model(_tokens(), torch.arange(6).expand(2, 6), None)
    with pytest.raises(InputError, match="tokens have another number of experts than top-k"):
        recorder.close()


def test_a_part_of_the_batch_needs_its_shape() -> None:
    """Where routers see a part of the tokens only, the caller says which rows and places those are."""

    class Half(Torchtitan):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens[:, :3].reshape(3, 2))

    model, sink = Half(), _sink()
    with Recorder(model, sink) as recorder, torch.no_grad():
        with pytest.raises(InputError, match=r"routers saw 6 tokens, but the batch is \(2, 6\)"):
            model(_tokens())
        with recorder.batch(shape=(3, 2), sequence_ids=[4, 5, 6]):
            model(_tokens())
    trace = sink.trace()
    assert trace.sequence_T is not None
    assert trace.sequence_T.tolist() == [4, 4, 5, 5, 6, 6]


class _Odd(nn.Module):
    """A model of nobody's: two gates that return whatever they are told to."""

    def __init__(self, returned: Any, names: tuple[str, ...] = ("gate",)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            for name in names:
                gate = nn.Linear(WIDTH, EXPERTS)
                gate.forward = lambda x: returned  # type: ignore[method-assign]
                block.add_module(name, gate)

    def forward(self, batch: dict[str, torch.Tensor]) -> None:
        """Call every gate."""
        for block in self.blocks:
            for gate in block.children():
                gate(batch["x"])


_IDS = torch.tensor([[0, 3], [5, 1], [2, 7], [4, 6]])
_MAP = torch.zeros(4, EXPERTS, dtype=torch.bool).scatter(1, _IDS, True)
_SCORES = torch.rand(4, EXPERTS, generator=torch.Generator().manual_seed(0)) + _MAP


@pytest.mark.parametrize(
    ("returned", "options"),
    [
        (_IDS, {"top_k": 2}),
        ((torch.rand(4, 2), _IDS), {"top_k": 2}),
        ({"weights": torch.rand(4, 2), "index": _IDS}, {"top_k": 2, "output": "index"}),
        ((_SCORES, _MAP), {"top_k": 2, "read": "map"}),
        ((_SCORES, _MAP), {"top_k": 2}),
        (_SCORES, {"top_k": 2}),
        ([_SCORES.reshape(2, 2, EXPERTS), None], {"top_k": 2, "read": "scores"}),
        ((_IDS.int(), torch.rand(4, 2)), {"top_k": 2, "read": "ids", "output": 0}),
    ],
)
def test_whatever_a_router_returns_is_read(returned: Any, options: dict[str, Any]) -> None:
    """Ids, a map or scores, alone or among others, flat or by row, make the same trace."""
    sink = _sink()
    model = _Odd(returned)
    with Recorder(model, sink, family=GenericFamily(router="blocks.*.gate", **options)):
        model({"x": torch.zeros(2, 2, WIDTH)})
    expected = np.sort(np.stack([_IDS.numpy()] * 2, axis=1), axis=2)
    assert np.array_equal(np.sort(sink.trace().experts_TLK, axis=2), expected)


@pytest.mark.parametrize(
    ("returned", "options", "message"),
    [
        (_SCORES, {}, "router blocks.0.gate .Linear. does not tell its top_k; give it"),
        (
            _SCORES,
            {"top_k": 2, "read": "ids"},
            "returned float32 .4, 8.: neither ids of 2 experts nor a map of 8",
        ),
        ("text", {"top_k": 2}, "returned no tensor"),
        (
            _IDS,
            {"top_k": 2, "router": "blocks.*.router"},
            "no module of _Odd matches .*: blocks.0.gate, blocks.1",
        ),
    ],
)
def test_routers_that_cannot_be_read_are_refused(
    returned: Any, options: dict[str, Any], message: str
) -> None:
    """What is missing is named: the pattern, the top-k, the shape of what came back."""
    model = _Odd(returned)
    family = GenericFamily(**({"router": "blocks.*.gate"} | options))
    with pytest.raises(InputError, match=message), Recorder(model, _sink(), family=family):
        model({"x": torch.zeros(2, 2, WIDTH)})


def test_two_routers_of_a_layer_are_refused() -> None:
    """A pattern that matches twice in a layer does not say which routing is meant."""
    family = GenericFamily(router="blocks.*", router_class="Linear", top_k=2)
    with pytest.raises(
        InputError, match=r"two routers of one layer match: blocks\.0\.gate, blocks\.0\.other"
    ):
        Recorder(_Odd(_IDS, ("gate", "other")), _sink(), family=family)


def test_a_transformers_model_can_be_recorded_by_names() -> None:
    """A model type without an adapter makes the same trace as with one, padding and caches included."""
    model = tiny_model("olmoe", num_experts=EXPERTS)
    by_family, by_name = _sink(), _sink()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    generic = GenericFamily(router="layers.*.mlp.gate")
    with Recorder(model, by_family), Recorder(model, by_name, family=generic):
        model.generate(_tokens(), attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert by_name.trace().digest == by_family.trace().digest


def test_wrappers_do_not_show_in_names() -> None:
    """A router inside a wrapper is found by its own name, once."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = inner

        def forward(self, x: torch.Tensor) -> Any:
            return self._checkpoint_wrapped_module(x)

    model = _Odd(_IDS)
    for block in model.blocks:
        block.gate = Wrapper(block.gate)  # type: ignore[assignment]
    layers = GenericFamily(router="blocks.?.gate", top_k=2).moe_layers(model)
    assert [type(layer.router) for layer in layers] == [nn.Linear, nn.Linear]


@pytest.fixture(scope="module")
def seeing_model() -> Any:
    """A model of pictures and text: Qwen3-VL's language model is a MoE model, its vision tower is not."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    language = tiny_model("qwen3_vl_moe_text", num_layers=2, vocab_size=256, context=32).config.to_dict()
    tower = {"depth": 1, "hidden_size": 16, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4}
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=language, vision_config=tower)
    factory: Any = AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory.from_config(config, dtype=torch.float32).eval()


def test_the_language_model_of_a_seeing_model_is_recorded(seeing_model: Any) -> None:
    """Its three-dimensional positions are left aside: tokens count by the mask."""
    assert family_of(seeing_model).model_type == "qwen3_vl_moe_text"
    sink = MemorySink(num_experts=6)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with Recorder(seeing_model, sink), torch.no_grad():
        seeing_model(input_ids=_tokens(2, 4), attention_mask=mask)
    trace = sink.trace()
    assert trace.sequence_T is not None
    assert trace.position_T is not None
    assert trace.sequence_T.tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.position_T.tolist() == [0, 1, 2, 3, 0, 1]


def test_a_seeing_checkpoint_is_recorded_over_text(seeing_model: Any, tmp_path: Path) -> None:
    """It is loaded whole, and its context is that of its language model."""
    seeing_model.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_bytes(bytes(range(65, 105)))
    report = record_text(tmp_path / "model", [tmp_path / "text.txt"], tmp_path / "set")
    assert (report.num_tokens, report.num_sequences, report.num_layers) == (40, 2, 2)
