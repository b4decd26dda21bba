"""MMDiT, the transformer of Stable Diffusion 3: tokens of an image and of a text, with weights of their own, attend jointly.

Parameters are a flat dict with the names of diffusers' checkpoints. Shapes: as in `layers`; T tokens of the text.
"""

from collections.abc import Mapping

import torch

from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import MMDiTConfig
from gaugeblock.reference.torch import layers, modules
from gaugeblock.reference.torch.attention import attention, join_heads, split_heads
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.recomputation import recomputable

State = Mapping[str, torch.Tensor]

NORM_EPS = 1e-6  # of every norm
FREQUENCY_EMBEDDING_SIZE = 256  # of times
MLP_RATIO = 4  # width of a feed-forward network's hidden layer, in units of hidden_size
POSITIONS = "pos_embed.pos_embed"  # a buffer: fixed values, which training leaves alone

IMAGE_HEADS = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT_HEADS = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")

# what the code of Stable Diffusion 3 calls the modules; a "qkv" holds queries, keys and values one below the other
HEADS_OF_STABILITY = ("qkv", "qkv", "qkv", "ln_q", "ln_k")
STABILITY_PREFIX = "model.diffusion_model."
STABILITY_ENDS = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
STABILITY_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    **{f"attn.{name}": f"x_block.attn.{own}" for name, own in zip(IMAGE_HEADS, HEADS_OF_STABILITY, strict=True)},
    **{f"attn2.{name}": f"x_block.attn2.{own}" for name, own in zip(IMAGE_HEADS, HEADS_OF_STABILITY, strict=True)},
    **{f"attn.{name}": f"context_block.attn.{own}" for name, own in zip(TEXT_HEADS, HEADS_OF_STABILITY, strict=True)},
}


def mmdit(
    state: State,
    latents: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    pooled_projections: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    config: MMDiTConfig,
) -> torch.Tensor:
    """Predict the velocity (noise - data) in latents of a text at a time.

        x = patches of the latents, embedded, + the middle of the position table;  y = linear(tokens of the text)
        c = time embedding + pooled embedding
        x, y = block(x, y, c), num_layers times
        out = patches put together of linear(layer_norm_modulate(x, shift, scale)),  scale, shift = linear(silu(c))

    The table of positions is an entry of the state, as it is of checkpoints, and is used as it stands there. All tokens of the
    text count, padding too, as in training.

    Args:
        state: The parameters by name, shapes as in `state_shapes`, dtype of latents.
        latents: [batch_size, in_channels, height, width], floating; height and width are multiples of patch_size, up to
            pos_embed_max_size patches.
        encoder_hidden_states: [batch_size, num_text_tokens, joint_attention_dim], dtype of latents.
        pooled_projections: [batch_size, pooled_projection_dim], dtype of latents.
        timesteps: [batch_size], float32 or float64, in [0, 1000]: 1000 times the share of noise.
        config: The model.

    Returns:
        [batch_size, out_channels, height, width], dtype as latents; computed in float32 (float64 for float64 latents) and
        rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; or ranks, sizes or devices do not fit
            together.

    Source: Esser et al. 2024 (arXiv:2403.03206), section 4 and figure 2; diffusers SD3Transformer2DModel.
    """
    validation.mmdit(state, latents, encoder_hidden_states, pooled_projections, timesteps, config, state_shapes(config))
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    latents_BCHW = at_least_float32(latents)

    hidden_BSD = embed_patches(state, latents_BCHW, config=config)
    text_BTD = modules.linear(state, "context_embedder", at_least_float32(encoder_hidden_states))
    times_B, pooled_BF = timesteps.to(latents_BCHW.dtype), at_least_float32(pooled_projections)
    conditioning_BD = embed_conditions(state, times_B, pooled_BF)
    for index in range(config.num_layers):
        own_state = block_state(state, index)
        hidden_BSD, text_BTD = block(own_state, hidden_BSD, text_BTD, conditioning_BD, config=config, index=index)
    rows = latents.shape[2] // config.patch_size
    out_BCHW = final_layer(state, hidden_BSD, conditioning_BD, config=config, num_rows=rows)
    return out_BCHW.to(latents.dtype)


def embed_patches(state: State, latents: torch.Tensor, *, config: MMDiTConfig) -> torch.Tensor:
    """Embed patches of latents [B, C, H, W] as tokens that know their place, [B, S, D]."""
    patches_BSI = layers.patchify(latents, patch_size=config.patch_size)
    # the paper's convolution, whose stride is its kernel's size, is one matrix product a patch
    hidden_BSD = layers.linear(patches_BSI, state["pos_embed.proj.weight"].flatten(1), state["pos_embed.proj.bias"])
    rows, columns = (size // config.patch_size for size in latents.shape[2:])
    return hidden_BSD + middle_of_positions(state[POSITIONS], rows, columns, config=config)


def positions(config: MMDiTConfig) -> torch.Tensor:
    """Return the fixed table of positions [1, pos_embed_max_size**2, D] that checkpoints have, float32.

    Places are as far apart as makes a square of `sample_size` as long as the whole table.

    Source: diffusers models/embeddings.py, PatchEmbed.
    """
    size, like = config.pos_embed_max_size, torch.zeros(config.hidden_size)
    spacing = config.sample_size / config.patch_size / size
    return layers.sincos_position_embedding(size, like=like, spacing=spacing)[None]


def middle_of_positions(table: torch.Tensor, rows: int, columns: int, *, config: MMDiTConfig) -> torch.Tensor:
    """Cut so many rows and columns, [rows * columns, D], out of the middle of a square table of positions [1, S, D]."""
    size = config.pos_embed_max_size
    top, left = (size - rows) // 2, (size - columns) // 2
    table_YXD = table.reshape(size, size, config.hidden_size)
    return table_YXD[top : top + rows, left : left + columns].reshape(rows * columns, config.hidden_size)


def embed_conditions(state: State, timesteps: torch.Tensor, pooled_projections: torch.Tensor) -> torch.Tensor:
    """Embed times [B] and whole texts [B, F], in the dtype of the state, as what steers the blocks, [B, D]."""
    waves_BF = layers.timestep_embedding(timesteps, embedding_size=FREQUENCY_EMBEDDING_SIZE, frequency_shift=0)
    time, text = (f"time_text_embed.{embedder}_embedder" for embedder in ("timestep", "text"))
    time_BD = modules.two_linears(state, (f"{time}.linear_1", f"{time}.linear_2"), waves_BF)
    return time_BD + modules.two_linears(state, (f"{text}.linear_1", f"{text}.linear_2"), pooled_projections)


@recomputable
def block(
    state: State,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    conditioning: torch.Tensor,
    *,
    config: MMDiTConfig,
    index: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one block: joint attention, then a feed-forward network, for image and text each with weights of its own.

        x', y' = layer_norm_modulate(x), layer_norm_modulate(y)
        a, b = joint_attention(x', y')
        x = x + gate_1 * a;  x = x + gate_2 * gelu_mlp(layer_norm_modulate(x));  of y and b the same

    with shift, scale and gate of each from linear(silu(c)), once for the image and once for the text. In the blocks of
    `dual_attention_layers` x gets, before the feed-forward network, gate_3 * self_attention(layer_norm_modulate(x)) as well,
    of the x that came in. The last block leaves the text as it came in, since nothing reads it.

    Args:
        state: The block's parameters by their own names (`attn.to_q.weight`), as `block_state` returns them.
        hidden_states: [batch_size, num_tokens, hidden_size], floating; all other arrays have its dtype.
        encoder_hidden_states: [batch_size, num_text_tokens, hidden_size].
        conditioning: [batch_size, hidden_size].
        config: The model.
        index: Which block it is, from 0.

    Returns:
        hidden_states, encoder_hidden_states: As they came; computed in float32 (float64 for float64 inputs) and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or index is no integer.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or there is no such block.

    Source: Esser et al. 2024 (arXiv:2403.03206), figure 2 b; diffusers JointTransformerBlock.
    """
    shapes = block_shapes(config, index)
    validation.mmdit_block(state, hidden_states, encoder_hidden_states, conditioning, config, index, shapes)
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    hidden_BSD, text_BTD = at_least_float32(hidden_states), at_least_float32(encoder_hidden_states)
    active_BD = torch.nn.functional.silu(at_least_float32(conditioning))
    is_dual, is_last = index in config.dual_attention_layers, index == config.num_layers - 1

    steering = modules.linear(state, "norm1.linear", active_BD).chunk(9 if is_dual else 6, dim=-1)
    shift_1_BD, scale_1_BD, gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = steering[:6]
    text_steering = modules.linear(state, "norm1_context.linear", active_BD).chunk(2 if is_last else 6, dim=-1)
    # the last block's has no gate, and the scale comes first
    text_shift_1_BD, text_scale_1_BD = text_steering[::-1] if is_last else text_steering[:2]

    attended_BSD, text_attended_BTD = joint_attention(
        states.part(state, "attn"),
        layers.layer_norm_modulate(hidden_BSD, shift_1_BD, scale_1_BD, eps=NORM_EPS),
        layers.layer_norm_modulate(text_BTD, text_shift_1_BD, text_scale_1_BD, eps=NORM_EPS),
        config=config,
    )
    if is_dual:
        shift_3_BD, scale_3_BD, gate_3_BD = steering[6:]
        modulated_BSD = layers.layer_norm_modulate(hidden_BSD, shift_3_BD, scale_3_BD, eps=NORM_EPS)
        more_BSD = self_attention(states.part(state, "attn2"), modulated_BSD, config=config)
        hidden_BSD = layers.gated_residual(hidden_BSD, more_BSD, gate_3_BD)
    hidden_BSD = layers.gated_residual(hidden_BSD, attended_BSD, gate_1_BD)
    hidden_BSD = feed_forward(states.part(state, "ff"), hidden_BSD, shift_2_BD, scale_2_BD, gate_2_BD)
    if not is_last:
        text_gate_1_BD, text_shift_2_BD, text_scale_2_BD, text_gate_2_BD = text_steering[2:]
        text_attended_BTD = modules.linear(state, "attn.to_add_out", text_attended_BTD)
        text_BTD = layers.gated_residual(text_BTD, text_attended_BTD, text_gate_1_BD)
        text_BTD = feed_forward(states.part(state, "ff_context"), text_BTD, text_shift_2_BD, text_scale_2_BD, text_gate_2_BD)
    return hidden_BSD.to(hidden_states.dtype), text_BTD.to(hidden_states.dtype)


def joint_attention(
    state: State, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, *, config: MMDiTConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let all tokens of image [B, S, D] and text [B, T, D] attend to all, image first.

    The image's result is projected; the text's is not yet, for the last block's has no projection.
    """
    of_image = split_into_heads(state, IMAGE_HEADS, hidden_states, config=config)
    of_text = split_into_heads(state, TEXT_HEADS, encoder_hidden_states, config=config)
    attended_BND = join_heads(attention(*(torch.cat(both, dim=2) for both in zip(of_image, of_text, strict=True))))
    num_patches = hidden_states.shape[1]
    return modules.linear(state, "to_out.0", attended_BND[:, :num_patches]), attended_BND[:, num_patches:]


def self_attention(state: State, hidden_states: torch.Tensor, *, config: MMDiTConfig) -> torch.Tensor:
    """Let the tokens of the image [B, S, D] attend to each other."""
    heads = split_into_heads(state, IMAGE_HEADS, hidden_states, config=config)
    return modules.linear(state, "to_out.0", join_heads(attention(*heads)))


def split_into_heads(
    state: State, names: tuple[str, ...], tokens: torch.Tensor, *, config: MMDiTConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return heads of queries, keys and values of tokens [B, S, D], [B, A, S, F] each; of the first two maybe normalized."""
    to_query, to_key, to_value, norm_query, norm_key = names
    query_BASF, key_BASF, value_BASF = (
        split_heads(modules.linear(state, name, tokens), config.num_attention_heads) for name in (to_query, to_key, to_value)
    )
    if config.qk_norm is not None:
        query_BASF = modules.rms_norm(state, norm_query, query_BASF, eps=NORM_EPS)
        key_BASF = modules.rms_norm(state, norm_key, key_BASF, eps=NORM_EPS)
    return query_BASF, key_BASF, value_BASF


def feed_forward(
    state: State, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """Add the gated feed-forward network of the modulated tokens [B, S, D]."""
    modulated_BSD = layers.layer_norm_modulate(hidden_states, shift, scale, eps=NORM_EPS)
    inner = (state[f"net.{name}"] for name in ("0.proj.weight", "0.proj.bias", "2.weight", "2.bias"))
    return layers.gated_residual(hidden_states, layers.gelu_mlp(modulated_BSD, *inner), gate)


def final_layer(
    state: State, hidden_states: torch.Tensor, conditioning: torch.Tensor, *, config: MMDiTConfig, num_rows: int
) -> torch.Tensor:
    """Turn tokens [B, S, D] into an image [B, out_channels, H, W] of so many rows of patches, modulated by [B, D]."""
    active_BD = torch.nn.functional.silu(conditioning)
    scale_BD, shift_BD = modules.linear(state, "norm_out.linear", active_BD).chunk(2, dim=-1)
    modulated_BSD = layers.layer_norm_modulate(hidden_states, shift_BD, scale_BD, eps=NORM_EPS)
    patches_BSI = modules.linear(state, "proj_out", modulated_BSD)
    return layers.unpatchify(patches_BSI, patch_size=config.patch_size, num_rows=num_rows)


def state_shapes(config: MMDiTConfig) -> states.Shapes:
    """Return the shape of every parameter, and of the table of positions, by name."""
    hidden_size, linear, under = config.hidden_size, states.linear_shapes, states.under
    shapes: states.Shapes = {POSITIONS: (1, config.pos_embed_max_size**2, hidden_size)}
    shapes |= under("pos_embed.proj", states.convolution_shapes(hidden_size, config.in_channels, config.patch_size))
    for name, width in (("timestep", FREQUENCY_EMBEDDING_SIZE), ("text", config.pooled_projection_dim)):
        shapes |= under(f"time_text_embed.{name}_embedder.linear_1", linear(hidden_size, width))
        shapes |= under(f"time_text_embed.{name}_embedder.linear_2", linear(hidden_size, hidden_size))
    shapes |= under("context_embedder", linear(hidden_size, config.joint_attention_dim))
    for index in range(config.num_layers):
        shapes |= under(f"transformer_blocks.{index}", block_shapes(config, index))
    shapes |= under("norm_out.linear", linear(2 * hidden_size, hidden_size))
    return shapes | under("proj_out", linear(config.patch_size**2 * config.out_channels, hidden_size))


def block_shapes(config: MMDiTConfig, index: int) -> states.Shapes:
    """Return the shape of every parameter of one block by its own name."""
    hidden_size, linear, under = config.hidden_size, states.linear_shapes, states.under
    is_dual, is_last = index in config.dual_attention_layers, index == config.num_layers - 1
    shapes = under("norm1.linear", linear((9 if is_dual else 6) * hidden_size, hidden_size))
    shapes |= under("norm1_context.linear", linear((2 if is_last else 6) * hidden_size, hidden_size))
    shapes |= under("attn", heads_shapes(IMAGE_HEADS, config)) | under("attn", heads_shapes(TEXT_HEADS, config))
    shapes |= under("attn.to_out.0", linear(hidden_size, hidden_size))
    if not is_last:
        shapes |= under("attn.to_add_out", linear(hidden_size, hidden_size))
    if is_dual:
        shapes |= under("attn2", heads_shapes(IMAGE_HEADS, config)) | under("attn2.to_out.0", linear(hidden_size, hidden_size))
    for name in ("ff",) if is_last else ("ff", "ff_context"):
        shapes |= under(f"{name}.net.0.proj", linear(MLP_RATIO * hidden_size, hidden_size))
        shapes |= under(f"{name}.net.2", linear(hidden_size, MLP_RATIO * hidden_size))
    return shapes


def heads_shapes(names: tuple[str, ...], config: MMDiTConfig) -> states.Shapes:
    """Return the shape of every parameter that `split_into_heads` needs."""
    shapes: states.Shapes = {}
    for name in names[:3]:
        shapes |= states.under(name, states.linear_shapes(config.hidden_size, config.hidden_size))
    if config.qk_norm is not None:
        shapes |= {f"{name}.weight": (config.attention_head_dim,) for name in names[3:]}
    return shapes


def block_state(state: State, index: int) -> dict[str, torch.Tensor]:
    """Return the entries of one block, by the block's own names."""
    return states.part(state, f"transformer_blocks.{index}")


def load_state(state: State, *, config: MMDiTConfig) -> dict[str, torch.Tensor]:
    """Return a checkpoint of diffusers or of Stability AI's own code in diffusers' layout, as `mmdit` takes it.

    Parameters keep their dtype. What a file of Stability AI holds beside the transformer is left out.

    Args:
        state: Floating arrays by name, as diffusers' (`transformer_blocks.0.attn.to_q.weight`) or as Stability AI's
            (`model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight`, with or without the first two parts).
        config: The model.

    Raises:
        TypeError: An entry is not a floating array.
        ValueError: An entry is missing, unexpected or of another shape.

    Source: Stability-AI/sd3.5 mmditx.py; diffusers scripts/convert_sd3_to_diffusers.py.
    """
    shapes = state_shapes(config)
    if any(name.startswith(STABILITY_PREFIX) for name in state):
        state = states.part(state, STABILITY_PREFIX.removesuffix("."))
    if not any(name.startswith("joint_blocks.") for name in state):
        validation.state_entries(state, shapes)
        return {name: state[name] for name in shapes}
    names = {name: stability_name(name) for name in shapes}
    joined = {own: (3 * shapes[name][0], *shapes[name][1:]) if ".qkv." in own else shapes[name] for name, own in names.items()}
    validation.state_entries(state, joined)
    loaded = {name: state[own] for name, own in names.items()}
    scale_first = ("norm_out", f"transformer_blocks.{config.num_layers - 1}.norm1_context")
    for name, own in names.items():
        if ".qkv." in own:
            place = next(place for place, end in enumerate(("q", "k", "v")) if f".to_{end}." in name or f".add_{end}_" in name)
            loaded[name] = loaded[name].chunk(3)[place]
        elif name.startswith(scale_first):  # theirs have the shift first, as all others
            loaded[name] = torch.cat(loaded[name].chunk(2)[::-1])
    return loaded


def stability_name(name: str) -> str:
    """Return what Stability AI's code calls the entry that holds a parameter."""
    if name == POSITIONS:
        return "pos_embed"
    module, _, kind = name.rpartition(".")
    if module in STABILITY_ENDS:
        return f"{STABILITY_ENDS[module]}.{kind}"
    _, index, own_name = module.split(".", 2)
    return f"joint_blocks.{index}.{STABILITY_BLOCK[own_name]}.{kind}"
