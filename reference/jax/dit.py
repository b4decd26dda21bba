"""DiT: a transformer on patches of latents, steered by a time and a class through adaLN-Zero.

Parameters are a flat dict with the names of the paper's code. Shapes: as in `layers`.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import DiTConfig
from gaugeblock.reference.jax import layers, random
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.recomputation import recomputable

NORM_EPS = 1e-6  # of a block's first LayerNorm and of the final one; that of the second is the config's
INITIAL_WEIGHTS = 2**32 - 1  # purpose of the draws (`random`): the last one, since those of trainers count from 0

# what diffusers calls the modules of the paper's code
DIFFUSERS_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
DIFFUSERS_EMBEDDINGS = {  # a copy in every block
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
DIFFUSERS_BLOCK = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
    "adaLN_modulation.1": ("norm1.linear",),
}


def dit(
    state: Mapping[str, jax.Array],
    latents: jax.Array,
    timesteps: jax.Array,
    class_labels: jax.Array,
    *,
    config: DiTConfig,
) -> jax.Array:
    """As `gaugeblock.reference.torch.dit.dit`."""
    validation.dit(state, latents, timesteps, class_labels, config, state_shapes(config))
    validation.class_labels_in_range(class_labels, config.num_classes)
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    latents_BCHW = at_least_float32(latents)

    hidden_BSD = embed_patches(state, latents_BCHW, config=config)
    conditioning_BD = embed_conditions(state, timesteps.astype(latents_BCHW.dtype), class_labels, config=config)
    for index in range(config.depth):
        hidden_BSD = block(block_state(state, index), hidden_BSD, conditioning_BD, config=config)
    out_BCHW = final_layer(state, hidden_BSD, conditioning_BD, config=config)
    return out_BCHW.astype(latents.dtype)


def embed_patches(state: Mapping[str, jax.Array], latents: jax.Array, *, config: DiTConfig) -> jax.Array:
    """Embed patches of latents [B, in_channels, input_size, input_size] as tokens that know their place, [B, S, D]."""
    patches_BSI = layers.patchify(latents, patch_size=config.patch_size)
    # the paper's convolution, whose stride is its kernel's size, is one matrix product a patch
    weight_DI = state["x_embedder.proj.weight"].reshape(config.hidden_size, -1)
    hidden_BSD = layers.linear(patches_BSI, weight_DI, state["x_embedder.proj.bias"])
    return hidden_BSD + layers.sincos_position_embedding(config.input_size // config.patch_size, like=hidden_BSD)


def embed_conditions(
    state: Mapping[str, jax.Array], timesteps: jax.Array, class_labels: jax.Array, *, config: DiTConfig
) -> jax.Array:
    """Embed times [B], in the dtype of the state, and class labels [B] as what steers the blocks, [B, D]."""
    waves_BF = layers.timestep_embedding(
        timesteps, embedding_size=config.frequency_embedding_size, frequency_shift=config.frequency_shift
    )
    inner_BD = layers.linear(waves_BF, state["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.bias"])
    active_BD = jax.nn.silu(inner_BD)
    time_BD = layers.linear(active_BD, state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])
    return time_BD + state["y_embedder.embedding_table.weight"][class_labels]


@recomputable
def block(state: Mapping[str, jax.Array], hidden_states: jax.Array, conditioning: jax.Array, *, config: DiTConfig) -> jax.Array:
    """As `gaugeblock.reference.torch.dit.block`."""
    validation.dit_block(state, hidden_states, conditioning, block_shapes(config))
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    hidden_BSD, active_BD = at_least_float32(hidden_states), jax.nn.silu(at_least_float32(conditioning))

    modulation_B6D = layers.linear(active_BD, state["adaLN_modulation.1.weight"], state["adaLN_modulation.1.bias"])
    shift_1_BD, scale_1_BD, gate_1_BD, shift_2_BD, scale_2_BD, gate_2_BD = jnp.split(modulation_B6D, 6, axis=-1)
    attended_BSD = layers.self_attention(
        layers.layer_norm_modulate(hidden_BSD, shift_1_BD, scale_1_BD, eps=NORM_EPS),
        *(state[f"attn.{name}"] for name in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")),
        num_heads=config.num_heads,
    )
    hidden_BSD, modulated_BSD = layers.gated_residual_layer_norm_modulate(
        hidden_BSD, attended_BSD, gate_1_BD, shift_2_BD, scale_2_BD, eps=config.norm_eps
    )
    mlp_BSD = layers.gelu_mlp(
        modulated_BSD, *(state[f"mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    )
    return layers.gated_residual(hidden_BSD, mlp_BSD, gate_2_BD).astype(hidden_states.dtype)


def final_layer(
    state: Mapping[str, jax.Array], hidden_states: jax.Array, conditioning: jax.Array, *, config: DiTConfig
) -> jax.Array:
    """Turn tokens [B, S, D] into an image [B, out_channels, input_size, input_size], modulated by the conditioning [B, D]."""
    modulation_B2D = layers.linear(
        jax.nn.silu(conditioning),
        state["final_layer.adaLN_modulation.1.weight"],
        state["final_layer.adaLN_modulation.1.bias"],
    )
    shift_BD, scale_BD = jnp.split(modulation_B2D, 2, axis=-1)
    modulated_BSD = layers.layer_norm_modulate(hidden_states, shift_BD, scale_BD, eps=NORM_EPS)
    patches_BSI = layers.linear(modulated_BSD, state["final_layer.linear.weight"], state["final_layer.linear.bias"])
    return layers.unpatchify(patches_BSI, patch_size=config.patch_size)


def state_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order of the paper's code."""
    return shapes_around_blocks(block_shapes(config), config=config)


def shapes_around_blocks(block: Mapping[str, tuple[int, ...]], *, config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model whose blocks have parameters of these shapes."""
    hidden_size, patch_size = config.hidden_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (hidden_size, config.in_channels, patch_size, patch_size),
        "x_embedder.proj.bias": (hidden_size,),
        "t_embedder.mlp.0.weight": (hidden_size, config.frequency_embedding_size),
        "t_embedder.mlp.0.bias": (hidden_size,),
        "t_embedder.mlp.2.weight": (hidden_size, hidden_size),
        "t_embedder.mlp.2.bias": (hidden_size,),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, hidden_size),
    }
    for index in range(config.depth):
        shapes |= states.under(f"blocks.{index}", block)
    return shapes | {
        "final_layer.linear.weight": (patch_size**2 * config.out_channels, hidden_size),
        "final_layer.linear.bias": (patch_size**2 * config.out_channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * hidden_size, hidden_size),
        "final_layer.adaLN_modulation.1.bias": (2 * hidden_size,),
    }


def block_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of one block by its own name."""
    hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
    return {
        "attn.qkv.weight": (3 * hidden_size, hidden_size),
        "attn.qkv.bias": (3 * hidden_size,),
        "attn.proj.weight": (hidden_size, hidden_size),
        "attn.proj.bias": (hidden_size,),
        "mlp.fc1.weight": (intermediate_size, hidden_size),
        "mlp.fc1.bias": (intermediate_size,),
        "mlp.fc2.weight": (hidden_size, intermediate_size),
        "mlp.fc2.bias": (hidden_size,),
        "adaLN_modulation.1.weight": (6 * hidden_size, hidden_size),
        "adaLN_modulation.1.bias": (6 * hidden_size,),
    }


def block_state(state: Mapping[str, jax.Array], index: int) -> dict[str, jax.Array]:
    """Return the entries of one block, by the block's own names: `blocks.3.attn.qkv.weight` as `attn.qkv.weight`."""
    return states.part(state, f"blocks.{index}")


def initial_state(config: DiTConfig, *, seed: int) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.dit.initial_state`."""
    state = {}
    for place, (name, shape) in enumerate(state_shapes(config).items()):
        key = {"seed": seed, "step": 0, "example": place, "purpose": INITIAL_WEIGHTS}
        if name.endswith(".bias") or "adaLN_modulation" in name or name.startswith("final_layer"):
            state[name] = jnp.zeros(shape, jnp.float32)
        elif name.startswith(("t_embedder", "y_embedder")):
            state[name] = 0.02 * random.normal(shape, **key)
        else:
            bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
            state[name] = bound * (2 * random.uniform(shape, **key) - 1)
    return state


def load_state(state: Mapping[str, jax.Array], *, config: DiTConfig) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.dit.load_state`."""
    state = dict(state)
    for name in ("pos_embed", "pos_embed.pos_embed"):
        if name in state:
            check_position_table(state.pop(name), config=config)
    if any(name.startswith("transformer_blocks.") for name in state):
        return from_diffusers(state, config=config)
    validation.state_entries(state, state_shapes(config))
    return {name: state[name] for name in state_shapes(config)}


def check_position_table(table: jax.Array, *, config: DiTConfig) -> None:
    """Raise ValueError unless a checkpoint's table [1, S, D] is that of `layers.sincos_position_embedding`."""
    validation.position_table(table, config.num_patches, config.hidden_size)
    fixed_SD = layers.sincos_position_embedding(config.input_size // config.patch_size, like=table)
    # two libraries' sines may round to neighbours: half an eps apart, since no value is above 1
    if not bool((jnp.abs(at_least_float32(table[0] - fixed_SD)) <= jnp.finfo(table.dtype).eps / 2).all()):
        raise ValueError("state must have the fixed position table or none, got other values")


def from_diffusers(state: Mapping[str, jax.Array], *, config: DiTConfig) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.dit.from_diffusers`."""
    shapes = state_shapes(config)
    parts = {name: diffusers_names(name, config=config) for name in shapes}
    diffusers_shapes = {
        part: (shape[0] // 3, *shape[1:]) if "attn.qkv" in name else shape
        for name, shape in shapes.items()
        for part in parts[name]
    }
    validation.state_entries(state, diffusers_shapes)
    paper_state = {}
    for name in shapes:
        first, *others = parts[name]
        if "attn.qkv" in name:
            paper_state[name] = jnp.concatenate([state[part] for part in parts[name]])
            continue
        for other in others:
            if not bool((state[other] == state[first]).all()):
                raise ValueError(f"state must have {other} equal to {first}, got another embedding for each block")
        paper_state[name] = state[first]
    return paper_state


def diffusers_names(name: str, *, config: DiTConfig) -> list[str]:
    """Return what diffusers calls a parameter of the paper's: three names for `attn.qkv`, one a block for an embedding."""
    module, _, kind = name.rpartition(".")
    if module in DIFFUSERS_EMBEDDINGS:
        embeddings = [f"transformer_blocks.{index}.norm1.emb" for index in range(config.depth)]
        return [f"{embedding}.{DIFFUSERS_EMBEDDINGS[module]}.{kind}" for embedding in embeddings]
    if module in DIFFUSERS_ENDS:
        return [f"{DIFFUSERS_ENDS[module]}.{kind}"]
    _, index, own_name = module.split(".", 2)
    return [f"transformer_blocks.{index}.{part}.{kind}" for part in DIFFUSERS_BLOCK[own_name]]
