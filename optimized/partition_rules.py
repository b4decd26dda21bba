"""How the parameters of a model lie over ranks that split its heads, hidden layers, channels and experts, for any framework.

A model's rules are an ordered list of patterns of names, of which the first that matches holds; each says by which size of the
model an axis is cut. What is cut by heads, features or experts that a rank computes with by itself goes together: the rows of a
first linear layer (Megatron's column parallelism), the columns of the second, whose products are parts of a sum over the ranks.

    rules = partition_rules.DIT
    partition_rules.require_divisible(config, rules, ranks=4)
    cut = partition_rules.cut_of("blocks.3.attn.qkv.weight", rules)  # its axis 0, three blocks of heads
    mine = partition_rules.part(weight, cut, rank=1, ranks=4)
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from gaugeblock.reference.configs import LanguageModelConfig, LLaDAConfig, SDARMoEConfig

Array = TypeVar("Array", bound=Any)


@dataclass(frozen=True)
class Cut:
    """The axis of a parameter of which each rank has a part, one axis at most."""

    axis: int
    size: str
    """By what the axis is cut: a size of the model by its name in the config, which the ranks divide."""
    blocks: int = 1
    """How many blocks of one width lie there one after the other, of each of which a rank has its part: queries, keys and values
    are 3, gate and up rows 2."""


Rules: TypeAlias = Sequence[tuple[str, Cut | None]]
"""Patterns of whole names, and how what they match is cut; None for what is whole on every rank."""

EMBEDDINGS_AND_ENDS: Rules = (
    (r"[xty]_embedder\..+", None),
    (r"final_layer\..+", None),
    (r"blocks\.\d+\.adaLN_modulation\.1\.(weight|bias)", None),
)
SELF_ATTENTION: Rules = (
    (r"blocks\.\d+\.attn\.qkv\.(weight|bias)", Cut(0, "num_heads", blocks=3)),
    (r"blocks\.\d+\.attn\.proj\.weight", Cut(1, "num_heads")),
    (r"blocks\.\d+\.attn\.proj\.bias", None),  # added once, to the sum
    (r"blocks\.\d+\.attn\.[qk]_norm\.(weight|bias)", None),  # of each head alike
)
DIT: Rules = (
    *EMBEDDINGS_AND_ENDS,
    *SELF_ATTENTION,
    (r"blocks\.\d+\.mlp\.fc1\.(weight|bias)", Cut(0, "intermediate_size")),
    (r"blocks\.\d+\.mlp\.fc2\.weight", Cut(1, "intermediate_size")),
    (r"blocks\.\d+\.mlp\.fc2\.bias", None),
)
STREAMS_ATTENTION = r"transformer_blocks\.\d+\.attn2?"  # of tokens of an image and of a text
STREAMS_FEED_FORWARD = r"transformer_blocks\.\d+\.ff(_context)?"
MMDIT: Rules = (
    (r"(pos_embed|time_text_embed|context_embedder|norm_out|proj_out)\..+", None),
    (r"transformer_blocks\.\d+\.norm1(_context)?\.linear\.(weight|bias)", None),
    (rf"{STREAMS_ATTENTION}\.(to_[qkv]|add_[qkv]_proj)\.(weight|bias)", Cut(0, "num_attention_heads")),
    (rf"{STREAMS_ATTENTION}\.norm_(added_)?[qk]\.weight", None),  # of each head alike: their gradients are sums over the ranks
    (rf"{STREAMS_ATTENTION}\.(to_out\.0|to_add_out)\.weight", Cut(1, "num_attention_heads")),
    (rf"{STREAMS_ATTENTION}\.(to_out\.0|to_add_out)\.bias", None),
    (rf"{STREAMS_FEED_FORWARD}\.net\.0\.proj\.(weight|bias)", Cut(0, "hidden_size")),  # a multiple of it, as of the heads
    (rf"{STREAMS_FEED_FORWARD}\.net\.2\.weight", Cut(1, "hidden_size")),
    (rf"{STREAMS_FEED_FORWARD}\.net\.2\.bias", None),
)
DIT_MOE: Rules = (
    *EMBEDDINGS_AND_ENDS,
    *SELF_ATTENTION,
    (r"blocks\.\d+\.moe\.gate\.weight", None),  # every rank routes every token
    (r"blocks\.\d+\.moe\.experts\.(gate_up_proj|down_proj)", Cut(0, "num_experts")),
    (r"blocks\.\d+\.moe\.shared_experts\.(gate|up)_proj\.weight", Cut(0, "shared_intermediate_size")),
    (r"blocks\.\d+\.moe\.shared_experts\.down_proj\.weight", Cut(1, "shared_intermediate_size")),
)
FLUX: Rules = (
    (r"(x_embedder|context_embedder|time_text_embed\..+|norm_out\.linear|proj_out)\.(weight|bias)", None),
    (r"(single_)?transformer_blocks\.\d+\.norm(1|1_context)?\.linear\.(weight|bias)", None),
    (r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj)\.(weight|bias)", Cut(0, "num_attention_heads")),
    (r"(single_)?transformer_blocks\.\d+\.attn\.norm(_added)?_[qk]\.weight", None),  # of each head alike
    (r"transformer_blocks\.\d+\.attn\.to_(out\.0|add_out)\.weight", Cut(1, "num_attention_heads")),
    (r"transformer_blocks\.\d+\.attn\.to_(out\.0|add_out)\.bias", None),
    (r"transformer_blocks\.\d+\.ff(_context)?\.net\.0\.proj\.(weight|bias)", Cut(0, "intermediate_size")),
    (r"transformer_blocks\.\d+\.ff(_context)?\.net\.2\.weight", Cut(1, "intermediate_size")),
    (r"transformer_blocks\.\d+\.ff(_context)?\.net\.2\.bias", None),
    # the last product takes attention's hidden_size features and the hidden layer's 4 * hidden_size side by side: 5 blocks of one
    # width, of each of which a rank has as many columns as its heads have features
    (r"single_transformer_blocks\.\d+\.proj_mlp\.(weight|bias)", Cut(0, "num_attention_heads", blocks=4)),
    (r"single_transformer_blocks\.\d+\.proj_out\.weight", Cut(1, "num_attention_heads", blocks=5)),
    (r"single_transformer_blocks\.\d+\.proj_out\.bias", None),
)
RESNET = r"(.+\.)?(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+"
RESNETS: Rules = (
    # a rank has whole groups of the second norm, which is its own, and of what is added before it
    (rf"{RESNET}\.(conv1|time_emb_proj|norm2)\.(weight|bias)", Cut(0, "norm_num_groups")),
    (rf"{RESNET}\.conv2\.weight", Cut(1, "norm_num_groups")),
    (rf"{RESNET}\.(norm1|conv_shortcut)\.(weight|bias)|{RESNET}\.conv2\.bias", None),
)
TRANSFORMER = r".+\.attentions\.\d+"
UNET_BLOCK = rf"{TRANSFORMER}\.transformer_blocks\.\d+"
UNET: Rules = (
    (r"(time_embedding|add_embedding|conv_in|conv_norm_out|conv_out)\..+", None),
    (r"(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv\.(weight|bias)", None),
    *RESNETS,
    (rf"{TRANSFORMER}\.(norm|proj_in|proj_out)\.(weight|bias)", None),
    (rf"{UNET_BLOCK}\.norm[123]\.(weight|bias)", None),
    (rf"{UNET_BLOCK}\.attn[12]\.to_[qkv]\.weight", Cut(0, "gcd_of_heads")),
    (rf"{UNET_BLOCK}\.attn[12]\.to_out\.0\.weight", Cut(1, "gcd_of_heads")),
    (rf"{UNET_BLOCK}\.attn[12]\.to_out\.0\.bias", None),
    # hidden features, four times the channels, are a multiple of the groups; first those that are gated, then the gates
    (rf"{UNET_BLOCK}\.ff\.net\.0\.proj\.(weight|bias)", Cut(0, "norm_num_groups", blocks=2)),
    (rf"{UNET_BLOCK}\.ff\.net\.2\.weight", Cut(1, "norm_num_groups")),
    (rf"{UNET_BLOCK}\.ff\.net\.2\.bias", None),
)
VAE: Rules = (
    (r"(post_)?quant_conv\.(weight|bias)", None),
    (r"(encoder|decoder)\.(conv_in|conv_norm_out|conv_out)\.(weight|bias)", None),
    (r"(encoder|decoder)\.(down|up)_blocks\.\d+\.(down|up)samplers\.0\.conv\.(weight|bias)", None),
    *RESNETS,
    (r"(encoder|decoder)\.mid_block\.attentions\.0\..+", None),  # has one head
)
CLIP_LAYER = r"text_model\.encoder\.layers\.\d+"
CLIP_TEXT: Rules = (
    (r"text_model\.(embeddings|final_layer_norm)\..+|text_projection\.weight", None),
    (rf"{CLIP_LAYER}\.layer_norm[12]\.(weight|bias)", None),
    (rf"{CLIP_LAYER}\.self_attn\.[qkv]_proj\.(weight|bias)", Cut(0, "num_attention_heads")),
    (rf"{CLIP_LAYER}\.self_attn\.out_proj\.weight", Cut(1, "num_attention_heads")),
    (rf"{CLIP_LAYER}\.mlp\.fc1\.(weight|bias)", Cut(0, "intermediate_size")),
    (rf"{CLIP_LAYER}\.mlp\.fc2\.weight", Cut(1, "intermediate_size")),
    (rf"{CLIP_LAYER}\.(self_attn\.out_proj|mlp\.fc2)\.bias", None),
)
DECODER_LAYER = r"model\.layers\.\d+"
DECODER_ATTENTION: Rules = (
    # the vocabulary: a rank finds some of the rows, and gives the logits of the same tokens
    (r"(model\.embed_tokens|lm_head)\.weight", Cut(0, "vocab_size")),
    (rf"model\.norm\.weight|{DECODER_LAYER}\.(input|post_attention)_layernorm\.weight", None),
    # heads of keys and values with all the consecutive heads of queries that they serve
    (rf"{DECODER_LAYER}\.self_attn\.[qkv]_proj\.(weight|bias)", Cut(0, "num_key_value_heads")),
    (rf"{DECODER_LAYER}\.self_attn\.o_proj\.weight", Cut(1, "num_key_value_heads")),
    (rf"{DECODER_LAYER}\.self_attn\.[qk]_norm\.weight", None),  # of each head alike: their gradients are sums over the ranks
)
DECODER: Rules = (
    *DECODER_ATTENTION,
    (rf"{DECODER_LAYER}\.mlp\.(gate|up)_proj\.weight", Cut(0, "intermediate_size")),
    (rf"{DECODER_LAYER}\.mlp\.down_proj\.weight", Cut(1, "intermediate_size")),
)
DECODER_EXPERTS: Rules = (
    (rf"{DECODER_LAYER}\.mlp\.gate\.weight", None),
    (rf"{DECODER_LAYER}\.mlp\.experts\.(gate_up_proj|down_proj)", Cut(0, "num_experts")),
)
DECODER_MOE: Rules = (*DECODER_ATTENTION, *DECODER_EXPERTS)
LLADA_LAYER = r"model\.transformer\.blocks\.\d+"
LLADA: Rules = (
    (r"model\.transformer\.(wte|ff_out)\.weight", Cut(0, "vocab_size")),
    (rf"model\.transformer\.ln_f\.weight|{LLADA_LAYER}\.(attn|ff)_norm\.weight", None),
    (rf"{LLADA_LAYER}\.[qkv]_proj\.weight", Cut(0, "num_key_value_heads")),
    (rf"{LLADA_LAYER}\.attn_out\.weight", Cut(1, "num_key_value_heads")),
    (rf"{LLADA_LAYER}\.(ff|up)_proj\.weight", Cut(0, "intermediate_size")),
    (rf"{LLADA_LAYER}\.ff_out\.weight", Cut(1, "intermediate_size")),
)
EXPERTS_OF_DECODER: Rules = (*DECODER_EXPERTS, (r".+", None))
"""Those of experts alone, where each rank has examples of its own."""
PAST: Rules = ((r"past_(keys|values)", Cut(2, "num_key_value_heads")),)
"""The keys and values of all layers that a rank keeps: of its own heads."""


def of_decoder(config: LanguageModelConfig) -> Rules:
    """The rules of a language model."""
    if isinstance(config, LLaDAConfig):
        return LLADA
    return DECODER_MOE if isinstance(config, SDARMoEConfig) else DECODER


def cut_of(name: str, rules: Rules) -> Cut | None:
    """How a parameter is cut.

    Raises:
        ValueError: No rule matches its name.
    """
    for pattern, cut in rules:
        if re.fullmatch(pattern, name):
            return cut
    raise ValueError(f"state must have parameters that a partition rule matches, got {name!r}")


def cuts_of(state: Mapping[str, Any], rules: Rules) -> dict[str, Cut | None]:
    """How each parameter is cut, by name.

    Raises:
        ValueError: No rule matches a name.
    """
    return {name: cut_of(name, rules) for name in state}


def require_divisible(config: Any, rules: Rules, ranks: int) -> None:
    """Check that the ranks divide every size by which something is cut.

    Raises:
        ValueError: They do not.
    """
    for size in dict.fromkeys(cut.size for _, cut in rules if cut is not None):
        require_multiple(size, getattr(config, size), ranks)


def require_multiple(name: str, size: int, ranks: int) -> None:
    """Check that a size can be dealt evenly to the ranks.

    Raises:
        ValueError: It cannot.
    """
    if size % ranks:
        raise ValueError(f"{name} must be a multiple of the {ranks} ranks that share it, got {size}")


def part(array: Array, cut: Cut | None, *, rank: int, ranks: int) -> Array:
    """A rank's part of a parameter: what lies in its part of each block, one after the other."""
    if cut is None:
        return array
    before, size, after = array.shape[: cut.axis], array.shape[cut.axis], array.shape[cut.axis + 1 :]
    each = size // cut.blocks // ranks
    grid = array.reshape(*before, cut.blocks, ranks, each, *after)
    return grid[(slice(None),) * (cut.axis + 1) + (rank,)].reshape(*before, cut.blocks * each, *after)
