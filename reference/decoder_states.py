"""The parameters of the language models: names and shapes, and LLaDA's other names for the same ones."""

from collections.abc import Mapping
from typing import TypeVar

from gaugeblock.reference import moe_states, states
from gaugeblock.reference.configs import LanguageModelConfig, SDARMoEConfig

Entry = TypeVar("Entry")

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
LLADA_AROUND_LAYERS = {
    "model.embed_tokens": "model.transformer.wte",
    "model.norm": "model.transformer.ln_f",
    "lm_head": "model.transformer.ff_out",
}
LLADA_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def state_shapes(config: LanguageModelConfig) -> states.Shapes:
    """Return the shape of every parameter by its name in transformers, of SDAR and Dream."""
    shapes: states.Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        shapes |= states.under(f"model.layers.{index}", layer_shapes(config))
    return shapes | {"model.norm.weight": (config.hidden_size,), "lm_head.weight": (config.vocab_size, config.hidden_size)}


def layer_shapes(config: LanguageModelConfig) -> states.Shapes:
    """Return the shape of every parameter of one layer by its own name."""
    width = config.hidden_size
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    modules = {
        f"self_attn.{name}": states.linear_shapes(count * config.head_dim, width, bias=config.has_qkv_bias)
        for name, count in zip(PROJECTIONS, heads, strict=True)
    }
    modules["self_attn.o_proj"] = states.linear_shapes(width, heads[0] * config.head_dim, bias=False)
    if config.has_qk_norm:
        modules |= {f"self_attn.{name}_norm": {"weight": (config.head_dim,)} for name in "qk"}
    modules |= {name: {"weight": (width,)} for name in ("input_layernorm", "post_attention_layernorm")}
    return states.of_modules(modules) | states.under("mlp", feed_forward_shapes(config))


def feed_forward_shapes(config: LanguageModelConfig) -> states.Shapes:
    """Return the shape of every parameter of a layer's feed-forward network, which is dense or an MoE layer."""
    width = config.hidden_size
    if isinstance(config, SDARMoEConfig):
        sizes = {
            "num_experts": config.num_experts,
            "hidden_size": width,
            "intermediate_size": config.moe_intermediate_size,
            "two_intermediate_sizes": 2 * config.moe_intermediate_size,
        }
        return {name: tuple(sizes[axis] for axis in axes) for name, axes in moe_states.QWEN3.items()}
    inner = config.intermediate_size
    return {"gate_proj.weight": (inner, width), "up_proj.weight": (inner, width), "down_proj.weight": (width, inner)}


def llada_shapes(config: LanguageModelConfig) -> states.Shapes:
    """Return the shape of every parameter by its name in LLaDA's checkpoints."""
    return {llada_name(name): shape for name, shape in state_shapes(config).items()}


def llada_as_transformers(state: Mapping[str, Entry], config: LanguageModelConfig) -> dict[str, Entry]:
    """Return the entries of LLaDA's checkpoint by the names of transformers."""
    return {name: state[llada_name(name)] for name in state_shapes(config)}


def llada_name(name: str) -> str:
    """Return LLaDA's name of a parameter of transformers' Llama."""
    module, _, kind = name.rpartition(".")
    if module in LLADA_AROUND_LAYERS:
        return f"{LLADA_AROUND_LAYERS[module]}.{kind}"
    index, _, own = module.removeprefix("model.layers.").partition(".")
    return f"model.transformer.blocks.{index}.{LLADA_IN_LAYER[own]}.{kind}"


def layer_as_transformers(own: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries of one layer by transformers' own names, of LLaDA's; those that have them already keep them."""
    names = {theirs: ours for ours, theirs in LLADA_IN_LAYER.items()}
    found = {}
    for name, entry in own.items():
        module, _, kind = name.rpartition(".")
        found[f"{names.get(module, module)}.{kind}"] = entry
    return found
