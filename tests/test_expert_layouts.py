"""Layouts of experts' weights: names and meaning against transformers, round trips, and what is said of a wrong checkpoint."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from gaugeblock.reference.expert_checkpoints import resolve_expert_weights
from gaugeblock.reference.expert_layouts import LAYOUTS, ExpertWeights, from_w13, to_w13
from gaugeblock.reference.torch import experts

SIZES = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "moe_intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
DEEPSEEK = {
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 2, "v_head_dim": 4, "n_routed_experts": 3,
}  # fmt: skip
# model, how it is made, its layer's name, the layout of what it saves
MODELS = {
    "Mixtral": ({"num_local_experts": 3}, "block_sparse_moe", "mixtral-linear"),
    "Qwen3Moe": ({"num_experts": 3}, "mlp", "linear"),
    "Olmoe": ({"num_experts": 3}, "mlp", "linear"),
    "DeepseekV3": (DEEPSEEK, "mlp", "linear"),
    "GptOss": ({"num_local_experts": 3}, "mlp", "interleaved"),
    "Llama4Text": (
        {"num_local_experts": 3, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 12},
        "feed_forward",
        "transposed",
    ),
}


def model_of(name):
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**SIZES | MODELS[name][0])
    model = getattr(transformers, name.removesuffix("Text") + "ForCausalLM")(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_saves_computes_what_its_module_does(name, tmp_path):
    _, layer, layout = MODELS[name]
    model = model_of(name)
    model.set_experts_implementation("eager")  # its grouped products take no float64
    model.save_pretrained(tmp_path)
    ours = resolve_expert_weights(
        tmp_path / "model.safetensors", layout, prefix=f"model.layers.0.{layer}.experts.", num_experts=3
    )
    module = getattr(model.model.layers[0], layer.replace("block_sparse_moe", "mlp")).experts
    hidden = torch.randn(6, 8, dtype=torch.float64)
    ids = torch.tensor([[0, 1], [0, 2], [1, 2], [2, 1], [1, 0], [2, 0]])
    if name == "Llama4Text":  # its experts take a copy of the tokens each
        expected = module(hidden.repeat(3, 1)).view(3, 6, 8)[ids.T, torch.arange(6)].sum(0)
    else:
        expected = module(hidden, ids, torch.ones(6, 2, dtype=torch.float64))
    torch.testing.assert_close(
        evaluate(ours, hidden, ids), expected, rtol=1e-10, atol=1e-10
    )  # of float64; sums run in another order


def evaluate(weights, hidden, ids):
    if not weights.interleaved:
        return experts.fused_swiglu(hidden, weights.w13, weights.w2, torch.ones(ids.shape, dtype=hidden.dtype), ids)
    gate_up = torch.einsum("tkrh,th->tkr", weights.w13[ids], hidden) + weights.b13[ids]
    gate, up = gate_up[..., ::2].clamp(max=7), gate_up[..., 1::2].clamp(-7, 7)
    activation = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return (torch.einsum("tkhi,tki->tkh", weights.w2[ids], activation) + weights.b2[ids]).sum(1)


def test_what_transformers_holds_is_stacked():
    state = model_of("Qwen3Moe").state_dict()
    ours = to_w13(state, "stacked", prefix="model.layers.0.mlp.experts.")
    assert torch.equal(ours.w13, state["model.layers.0.mlp.experts.gate_up_proj"])
    assert torch.equal(ours.w2, state["model.layers.0.mlp.experts.down_proj"])


def checkpoint(layout, convert=lambda array: array, sizes=(3, 6, 8)):
    """Different numbers everywhere, in the shapes that the layout's documentation gives."""
    num_experts, inner, width = sizes
    shapes = {
        "linear": {"gate_proj.weight": (inner, width), "up_proj.weight": (inner, width), "down_proj.weight": (width, inner)},
        "mixtral-linear": {"w1.weight": (inner, width), "w3.weight": (inner, width), "w2.weight": (width, inner)},
        "stacked": {"gate_up_proj": (2 * inner, width), "down_proj": (width, inner)},
        "transposed": {"gate_up_proj": (width, 2 * inner), "down_proj": (inner, width)},
        "w13": {"w13_weight": (2 * inner, width), "w2_weight": (width, inner)},
    }
    shapes["interleaved"] = shapes["transposed"] | {"gate_up_proj_bias": (2 * inner,), "down_proj_bias": (width,)}
    shapes["w13-interleaved"] = shapes["w13"] | {"w13_bias": (2 * inner,), "w2_bias": (width,)}
    numbers = {name: (num_experts, *shape) for name, shape in shapes[layout].items()}
    tensors = {}
    for place, (name, shape) in enumerate(numbers.items()):
        values = np.arange(np.prod(shape)).reshape(shape).astype(np.float32) + 1000 * place
        if "linear" in layout:
            tensors |= {f"experts.{expert}.{name}": convert(values[expert]) for expert in range(num_experts)}
        else:
            tensors[f"experts.{name}"] = convert(values)
    return tensors


def equal(one, other):
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and np.array_equal(np.asarray(one[name]), np.asarray(other[name])) for name in one
    )


@pytest.mark.parametrize("sizes", [(3, 6, 8), (4, 4, 8), (2, 4, 4), (1, 1, 1)], ids=str)  # 2I = H; I = H; one of each
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, torch.tensor])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_again_is_the_same(layout, convert, sizes):
    tensors = checkpoint(layout, convert, sizes)
    ours = to_w13(tensors, layout)
    num_experts, inner, width = sizes
    assert ours.w13.shape == (num_experts, 2 * inner, width) and ours.w2.shape == (num_experts, width, inner)
    assert equal(from_w13(ours, layout), tensors)
    other = from_w13(ours, "w13-interleaved" if ours.interleaved else "linear", prefix="layer.")
    again = to_w13(other, "w13-interleaved" if ours.interleaved else "linear", prefix="layer.")
    assert equal(from_w13(again, layout), tensors)


def test_bfloat16_keeps_its_bits():
    tensors = checkpoint("linear", lambda values: torch.tensor(values).bfloat16())
    back = from_w13(to_w13(tensors, "linear"), "linear")
    assert all(torch.equal(back[name].view(torch.int16), tensors[name].view(torch.int16)) for name in tensors)


def test_gates_come_first_and_interleaved_rows_stay():
    """By absolute values: a round trip would share a mistake of both directions."""
    linear = checkpoint("mixtral-linear", sizes=(3, 2, 4))
    w13 = to_w13(linear, "mixtral-linear").w13
    assert np.array_equal(w13[1], np.concatenate([linear["experts.1.w1.weight"], linear["experts.1.w3.weight"]]))
    interleaved = checkpoint("interleaved", sizes=(3, 2, 4))
    ours = to_w13(interleaved, "interleaved")
    assert ours.interleaved and not to_w13(linear, "mixtral-linear").interleaved
    assert np.array_equal(ours.w13[2, 1], interleaved["experts.gate_up_proj"][2, :, 1])
    assert np.array_equal(ours.w2[2, 1], interleaved["experts.down_proj"][2, :, 1])
    assert np.array_equal(ours.b13, interleaved["experts.gate_up_proj_bias"])


ZEROS = np.zeros((3, 12, 8), np.float32)
# layout, tensor, what stands there instead (None: nothing), what is said after the tensor's name
BAD = {
    "a missing tensor": ("stacked", "down_proj", None, "is missing: .*'stacked'.*; got experts.gate_up_proj"),
    "a missing expert": ("linear", "1.up_proj.weight", None, "is missing: .*num_experts=3"),
    "a bias too many": ("stacked", "bias", ZEROS, "is superfluous: .* has experts.gate_up_proj, experts.down_proj; got"),
    "one rank too few": ("stacked", "gate_up_proj", ZEROS[0], r"must be \[num_experts, .*, got \(12, 8\)"),
    "an odd number of rows": ("w13", "w13_weight", ZEROS[:, :-1], r"must hold as many gates as ups, got \(3, 11, 8\)"),
    "w2 transposed": ("stacked", "down_proj", ZEROS[:, :6], r"must be \[.*, hidden_size=8, .*_size=6\], got \(3, 6, 8\)"),
    "an expert of its own size": ("linear", "2.down_proj.weight", ZEROS[0], r"must be \[.*_size=6\], got \(12, 8\)"),
    "a bias of another size": ("interleaved", "down_proj_bias", ZEROS[:, :, 0], r"must be \[.*_size=8\], got \(3, 12\)"),
    "two dtypes": ("w13", "w2_weight", ZEROS.astype(np.float16)[:, :8, :6], "must be float32 like .*w13_weight, got float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_checkpoint_is_told_by_the_tensors_name(name):
    layout, tensor, instead, message = BAD[name]
    tensors = checkpoint(layout) | {f"experts.{tensor}": instead}
    with pytest.raises(ValueError, match=re.escape(f"experts.{tensor} ") + message):
        to_w13({name: each for name, each in tensors.items() if each is not None}, layout)


def test_a_missing_last_expert_is_told_where_their_number_is_known():
    tensors = {name: tensor for name, tensor in checkpoint("linear").items() if ".2." not in name}
    assert len(to_w13(tensors, "linear").w13) == 2
    with pytest.raises(ValueError, match=r"experts.2.gate_proj.weight is missing, and so are 2 others: .*num_experts=3"):
        to_w13(tensors, "linear", num_experts=3)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj must be \[num_experts=4"):
        to_w13(checkpoint("stacked"), "stacked", num_experts=4)


def test_other_tensors_are_left_alone_and_an_empty_checkpoint_is_told():
    tensors = checkpoint("stacked") | {"shared_expert.up_proj": ZEROS, "gate.weight": ZEROS}
    assert equal(from_w13(to_w13(tensors, "stacked"), "stacked"), checkpoint("stacked"))
    with pytest.raises(ValueError, match=r"mlp.experts.gate_up_proj is missing.*got none"):
        to_w13(tensors, "stacked", prefix="mlp.experts.")


WITHOUT = ExpertWeights(ZEROS, np.zeros((3, 8, 6), np.float32))
WITH = ExpertWeights(ZEROS, np.zeros((3, 8, 6), np.float32), ZEROS[:, :, 0], ZEROS[:, 0], interleaved=True)


@pytest.mark.parametrize(
    ("weights", "layout", "message"),
    [
        (WITHOUT, "interleaved", "w13 must have its rows gate and up in turn in layout 'interleaved', got gates first"),
        (WITH, "transposed", "w13 must have its rows gates first in layout 'transposed', got gate and up in turn"),
        (ExpertWeights(WITH.w13, WITH.w2, WITH.b13), "stacked", "b13 must be None in layout 'stacked'"),
        (ExpertWeights(WITH.w13, WITH.w2, interleaved=True), "interleaved", "b13 must be an array"),
        (ExpertWeights(ZEROS, ZEROS), "w13", "w2 must be [num_experts=3, hidden_size=8, intermediate_size=6], got (3, 12, 8)"),
        (WITHOUT, "qwen", "layout must be 'linear' or 'mixtral-linear' or "),
    ],
)
def test_a_layout_without_a_place_for_the_weights_is_told(weights, layout, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        from_w13(weights, layout)
