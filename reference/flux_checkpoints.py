"""Flux's checkpoints by black-forest-labs, whose entries are rows of ours joined: where the rows of each of ours lie."""

from collections.abc import Mapping

from gaugeblock.reference.configs import FluxConfig
from gaugeblock.reference.states import Shapes

Rows = tuple[str, int, int]  # an entry's name, its first row, and the one after the last

ENDS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {  # of a block with two streams
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
SINGLE = {  # of a block with one stream
    "norm.linear": "modulation.lin",
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
PLACES = {"to_q": 0, "to_k": 1, "to_v": 2, "proj_mlp": 3, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
"""Where what is joined in one entry begins, in units of hidden_size; all else has an entry of its own."""


def original_rows(shapes: Mapping[str, tuple[int, ...]], config: FluxConfig) -> dict[str, list[Rows]]:
    """Return for each parameter of ours, whose shapes are given, the rows of a checkpoint by black-forest-labs that are its."""
    return {name: _rows(name, shape[0], config.hidden_size) for name, shape in shapes.items()}


def original_shapes(shapes: Mapping[str, tuple[int, ...]], config: FluxConfig) -> Shapes:
    """Return the shape of every entry of a checkpoint by black-forest-labs."""
    found: Shapes = {}
    for name, rows in original_rows(shapes, config).items():
        for entry, _, end in rows:
            found[entry] = (max(end, *found.get(entry, (0,))[:1]), *shapes[name][1:])
    return found


def _rows(name: str, size: int, hidden_size: int) -> list[Rows]:
    module, _, kind = name.rpartition(".")
    if module in ENDS:
        entry = f"{ENDS[module]}.{kind}"
        # there the shift comes before the scale
        return [(entry, hidden_size, size), (entry, 0, hidden_size)] if module == "norm_out.linear" else [(entry, 0, size)]
    blocks, index, own_name = module.split(".", 2)
    is_double = blocks == "transformer_blocks"
    original = (DOUBLE if is_double else SINGLE)[own_name]
    kind = "scale" if "norm_" in own_name else kind
    first = PLACES.get(own_name.removeprefix("attn."), 0) * hidden_size
    return [(f"{'double' if is_double else 'single'}_blocks.{index}.{original}.{kind}", first, first + size)]
