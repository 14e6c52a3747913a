"""Names of tensors in every known layout: what each is part of, and how it depends on the experts' order."""

from __future__ import annotations

import pytest

from placement.checkpoint.layouts import Kind, match_tensor, sounds_like_experts

NUMBERED = [
    "model.layers.3.mlp.experts.17.gate_proj.weight",
    "model.layers.3.mlp.experts.17.down_proj.weight_scale_inv",
    "model.layers.3.mlp.experts.17.up_proj.qzeros",
    "model.layers.3.block_sparse_moe.experts.17.w1.weight",
    "model.layers.3.feed_forward.experts.17.w2.weight",
    "model.language_model.layers.3.mlp.experts.17.up_proj.weight",
    "backbone.layers.3.mixer.experts.17.up_proj.weight",
    "layers.3.ffn.experts.17.w3.scale",
    "decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight",
    "module.decoder.layers.3.mlp.experts.linear_fc2.weight17",
    "transformer.layers.3.mlp.deepspeed_moe.experts.deepspeed_experts.17.dense_h_to_4h.bias",
    "decoder.block.3.layer.2.mlp.experts.expert_17.wi.weight",
]

STACKED = [
    ("model.layers.3.mlp.experts.gate_up_proj", Kind.ROWS),
    ("model.layers.3.mlp.experts.gate_up_proj_bias", Kind.ROWS),
    ("model.layers.3.mlp.experts.down_proj_blocks", Kind.ROWS),
    ("model.layers.3.mlp.experts.down_proj_scales", Kind.ROWS),
    ("model.layers.3.mlp.experts.down_proj_scale_inv", Kind.ROWS),
    ("model.layers.3.mlp.experts.fc1.weight", Kind.ROWS),
    ("model.llm.layers.3.mlp.experts.w13_weight_scale", Kind.ROWS),
    ("model.layers.3.feed_forward.experts.down_proj", Kind.ROWS),
    ("model.layers.3.experts.gate_up_proj", Kind.ROWS),
    ("model.layers.3.mlp.switch_mlp.gate_proj.scales", Kind.ROWS),
    ("model.layers.3.block_sparse_moe.input_linear.weight", Kind.ROWS),
    ("model.layers.3.moe.up_proj.weight_scale_inv", Kind.ROWS),
    ("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", Kind.ROWS),
    ("decoder.layers.3.mlp.experts.weight1", Kind.FLAT),
    ("transformer.blocks.3.ffn.experts.mlp.v1", Kind.CHUNKS),
    ("model.layers.3.mlp.gate.weight", Kind.ROWS),
    ("model.layers.3.mlp.gate.wg.weight", Kind.ROWS),
    ("model.layers.3.mlp.gate.e_score_correction_bias", Kind.ROWS),
    ("model.layers.3.mlp.e_score_correction_bias", Kind.ROWS),
    ("model.layers.3.mlp.experts.e_score_correction_bias", Kind.ROWS),
    ("model.layers.3.mlp.moe_statics.e_score_correction_bias", Kind.LAST),
    ("model.layers.3.mlp.expert_bias", Kind.ROWS),
    ("model.layers.3.moe.router.expert_bias", Kind.ROWS),
    ("model.layers.3.moe.router_bias", Kind.ROWS),
    ("model.layers.3.mlp.router.weight", Kind.ROWS),
    ("model.layers.3.mlp.router.bias", Kind.ROWS),
    ("model.layers.3.mlp.router.gate.weight", Kind.ROWS),
    ("model.layers.3.mlp.router.classifier.weight", Kind.ROWS),
    ("model.layers.3.block_sparse_moe.router.layer.weight", Kind.ROWS),
    ("model.layers.3.feed_forward.router.weight", Kind.ROWS),
    ("model.layers.3.router.proj.weight", Kind.ROWS),
    ("model.layers.3.router.per_expert_scale", Kind.ROWS),
    ("decoder.layers.3.mlp.router.local_tokens_per_expert", Kind.ROWS),
    ("transformer.layers.3.mlp.deepspeed_moe.gate.wg.weight", Kind.ROWS),
    ("layers.3.ffn.gate.tid2eid", Kind.IDS),
    ("model.layers.3.router.scale", Kind.KEPT),
    ("model.layers.3.mlp.shared_experts.gate_proj.weight", Kind.KEPT),
    ("model.layers.3.mlp.shared_expert_gate.weight", Kind.KEPT),
    ("model.layers.3.shared_mlp.input_linear.weight", Kind.KEPT),
    ("model.layers.3.self_attention.experts.router.layer.weight", Kind.KEPT),
    ("transformer.layers.3.mlp.deepspeed_moe.coefficient.weight", Kind.KEPT),
]


@pytest.mark.parametrize("name", NUMBERED)
def test_a_tensor_of_one_expert_is_renamed_by_its_number(name: str) -> None:
    """The layer's number stays, the expert's becomes another, whatever the tensor is called after it."""
    match = match_tensor(name)
    assert match is not None
    assert match.rule is not None
    assert (match.layer, match.expert, match.rule.kind) == (3, 17, Kind.NUMBERED)
    assert match.renumbered(name, 205) == name.replace("17", "205")
    other = match_tensor(name.replace("17", "4"))
    assert other is not None
    assert other.rest == match.rest


@pytest.mark.parametrize(("name", "kind"), STACKED)
def test_tensors_of_all_experts_and_routers(name: str, kind: Kind) -> None:
    """Each is recognised as what it is."""
    match = match_tensor(name)
    assert match is not None
    assert match.rule is not None
    assert (match.layer, match.expert, match.rule.kind) == (3, -1, kind)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.self_attn.q_proj.weight",
        "model.layers.3.self_attn.gate.weight",
        "model.layers.3.mlp.gate_proj.weight",
        "model.layers.3.post_mlp_layernorm.weight",
        "backbone.layers.3.mixer.in_proj.weight",
        "model.layers.3.mlp.shared.up_proj.weight",
    ],
)
def test_other_tensors_of_a_layer_follow_no_rule(name: str) -> None:
    """Attention, dense blocks, norms: nothing to permute, and nothing that sounds like it."""
    match = match_tensor(name)
    assert match is not None
    assert match.rule is None
    assert not sounds_like_experts(match.rest)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_tensors_outside_layers_are_none(name: str) -> None:
    """Embeddings and heads are no part of a layer."""
    assert match_tensor(name) is None


@pytest.mark.parametrize(
    ("rest", "blocks", "expected"),
    [
        ("mlp.experts.gate_up_lut", (), True),
        ("mlp.router.router_mlp.2.weight", (), True),
        ("mlp.router_gate.weight", (), True),
        ("mlp.gate.qweight", (), False),
        ("mlp.gate.qweight", ("mlp",), True),
        ("self_attn.gate.weight", ("mlp",), False),
        ("mlp.gate_norm.weight", ("mlp",), False),
    ],
)
def test_unknown_names_that_sound_like_experts(rest: str, blocks: tuple[str, ...], expected: bool) -> None:
    """Experts and routers anywhere; a gate only within a block that has experts."""
    assert sounds_like_experts(rest, blocks=blocks) is expected
