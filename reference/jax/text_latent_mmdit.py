"""The text-latent MMDiT of LGDLM: tokens of a text and one latent vector, each with a time of its own, attend jointly.

Residual streams are several, and every branch reads, mixes and writes them as its input asks (hyper-connections, held to the
manifold of doubly stochastic matrices). Parameters are a flat dict with the names of public checkpoints.

Shapes: B batch_size, T tokens of the text, S tokens of a modality (T of the text, one of the latent), J = T + 1, D hidden_size,
C cond_dim, E latent_dim, V vocab_size, A heads, F features of a head, K residual streams, L those that they become.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gaugeblock.reference import states, validation
from gaugeblock.reference import text_latent_initials as initials
from gaugeblock.reference.configs import TextLatentMMDiTConfig
from gaugeblock.reference.jax import gated_activations, layers, modules, random
from gaugeblock.reference.jax.attention import attention, join_heads, split_heads
from gaugeblock.reference.jax.dit import INITIAL_WEIGHTS
from gaugeblock.reference.jax.hyper_connections import connection, divided_by_norm
from gaugeblock.reference.jax.precision import at_least_float32
from gaugeblock.reference.jax.recomputation import recomputable

NORM_EPS = 1e-5  # of every LayerNorm
NUM_HEADS, HEAD_SIZE = 8, 64  # of every model
FREQUENCY_EMBEDDING_SIZE = 256  # of times
MLP_RATIO = 4  # width of a feed-forward network's hidden layer, in units of hidden_size
MODALITIES = 2  # the text, then the latent
CHECKPOINT_PREFIX = "model"  # what the trainer's checkpoints put before each name

State = Mapping[str, jax.Array]
Connection = tuple[jax.Array, jax.Array]  # mixed streams [B, S, K, D], and how strongly each is written to, [B, S, K]


def text_latent_mmdit(
    state: State,
    text_tokens: jax.Array,
    latents: jax.Array,
    text_timesteps: jax.Array,
    latent_timesteps: jax.Array,
    attention_mask: jax.Array | None = None,
    *,
    config: TextLatentMMDiTConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `gaugeblock.reference.torch.text_latent_mmdit.text_latent_mmdit`."""
    shapes = state_shapes(config)
    validation.text_latent_mmdit(state, text_tokens, latents, text_timesteps, latent_timesteps, attention_mask, config, shapes)
    validation.text_latent_tokens_in_range(text_tokens, config)
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    latents_BE = at_least_float32(latents)
    times = [each.astype(latents_BE.dtype) for each in (text_timesteps, latent_timesteps)]

    text_BTD = embed_text(states.part(state, "text_encoder"), text_tokens)
    latent_B1D = embed_latents(states.part(state, "latent_encoder"), latents_BE)
    conditioning_BC = embed_times(states.part(state, "conditioning"), *times)
    streams = [jnp.repeat(each_BSD[:, :, None], config.num_residual_streams, axis=2) for each_BSD in (text_BTD, latent_B1D)]
    mask_BASJ = joint_mask(attention_mask)
    for index in range(config.n_blocks):
        streams = block(states.part(state, f"mmdit.blocks.{index}"), streams, conditioning_BC, mask_BASJ)
    text_BTD, latent_B1D = (
        divided_by_norm(streams_BSKD.sum(axis=2)) * state[f"mmdit.norms.{modality}.g"]
        for modality, streams_BSKD in enumerate(streams)
    )

    logits_BTV = modules.linear(state, "text_head", text_BTD)
    clusters_BTV = modules.linear(state, "text_head_clusters", text_BTD) if config.cluster_size else logits_BTV[..., :0]
    inner_B1I = gated_activations.gelu(modules.linear(state, "latent_head.0", latent_B1D))
    predicted_B1E = modules.linear(state, "latent_head.3", inner_B1I)
    return logits_BTV.astype(latents.dtype), predicted_B1E.astype(latents.dtype), clusters_BTV.astype(latents.dtype)


def embed_text(state: State, text_tokens: jax.Array) -> jax.Array:
    """Embed token ids [B, T] and their places, [B, T, D]."""
    return state["token_embed.weight"][text_tokens] + state["position_embed"][0, : text_tokens.shape[1]]


def embed_latents(state: State, latents: jax.Array) -> jax.Array:
    """Embed latents [B, E] as one token each, [B, 1, D]."""
    inner_B1I = modules.linear(state, "projection.0", latents[:, None])
    active_B1I = gated_activations.gelu(modules.layer_norm(state, "projection.1", inner_B1I, eps=NORM_EPS))
    return modules.linear(state, "projection.3", active_B1I) + state["position_embed"][0]


def embed_times(state: State, text_timesteps: jax.Array, latent_timesteps: jax.Array) -> jax.Array:
    """Embed a time [B] of the text and one of the latent, together, as what steers the blocks, [B, C]."""
    embedded = []
    for name, times_B in (("text_sigma_map", text_timesteps), ("latent_sigma_map", latent_timesteps)):
        waves_BF = layers.timestep_embedding(times_B, embedding_size=FREQUENCY_EMBEDDING_SIZE, frequency_shift=0)
        embedded.append(modules.two_linears(state, (f"{name}.mlp.0", f"{name}.mlp.2"), waves_BF))
    active_BC = jax.nn.silu(jnp.concatenate(embedded, axis=-1))
    return modules.two_linears(state, ("combine.0", "combine.2"), active_BC)


def joint_mask(attention_mask: jax.Array | None) -> jax.Array | None:
    """Return which of a text's tokens and its latent all of them see, [B, 1, 1, J], of which of the text's are no padding."""
    if attention_mask is None:
        return None
    return jnp.concatenate([attention_mask, jnp.ones_like(attention_mask[:, :1])], axis=1)[:, None, None]


@recomputable
def block(state: State, streams: Sequence[jax.Array], conditioning: jax.Array, mask: jax.Array | None) -> list[jax.Array]:
    """As `gaugeblock.reference.torch.text_latent_mmdit.block`."""
    active_BC = jax.nn.silu(conditioning)
    gates = jnp.split(modules.linear(state, "to_post_branch_gammas.2", active_BC)[:, None], 2 * MODALITIES, axis=-1)

    read, connections = connect_in(state, "attn_residual_fns", streams)
    attended = joint_attention(state, [
        adaptive_layer_norm(state, f"attn_layernorms.{modality}", read_BSD, active_BC)
        for modality, read_BSD in enumerate(read)
    ], mask)  # fmt: skip
    streams = connect_out(connections, attended, gates[:MODALITIES])

    read, connections = connect_in(state, "ff_residual_fns", streams)
    fed_forward = [
        feed_forward(
            state, f"feedforwards.{modality}", adaptive_layer_norm(state, f"ff_layernorms.{modality}", read_BSD, active_BC)
        )
        for modality, read_BSD in enumerate(read)
    ]
    return connect_out(connections, fed_forward, gates[MODALITIES:])


def connect_in(state: State, name: str, streams: Sequence[jax.Array]) -> tuple[tuple[jax.Array, ...], tuple[Connection, ...]]:
    """Return, of text and latent, what a branch reads of the streams, and what its result will be written to."""
    each = [connection(states.part(state, f"{name}.{modality}"), own) for modality, own in enumerate(streams)]
    return tuple(read_BSD for read_BSD, _, _ in each), tuple((mixed_BSKD, write_BSK) for _, mixed_BSKD, write_BSK in each)


def connect_out(connections: Sequence[Connection], branches: Sequence[jax.Array], gates: Sequence[jax.Array]) -> list[jax.Array]:
    """Write branches' results [B, S, D], gated by [B, 1, D], to the streams of text and latent."""
    return [
        mixed_BSKD + write_BSK[..., None] * (gate_B1D * branch_BSD)[:, :, None]
        for (mixed_BSKD, write_BSK), branch_BSD, gate_B1D in zip(connections, branches, gates, strict=True)
    ]


def adaptive_layer_norm(state: State, name: str, tokens: jax.Array, active: jax.Array) -> jax.Array:
    """Normalize tokens [B, S, D], then scale and shift them by linear(silu(c)); the scale is what there is, not 1 more."""
    scale_B1D, shift_B1D = jnp.split(modules.linear(state, f"{name}.to_cond.2", active)[:, None], 2, axis=-1)
    return layers.layer_norm(tokens, eps=NORM_EPS) * scale_B1D + shift_B1D


def joint_attention(state: State, tokens: Sequence[jax.Array], mask: jax.Array | None) -> list[jax.Array]:
    """Let all tokens of text [B, T, D] and latent [B, 1, D] attend to all that the mask shows, the text first."""
    thirds = []
    for modality, each_BSD in enumerate(tokens):
        qkv_BSI = modules.linear(state, f"joint_attn.to_qkv.{modality}", each_BSD)
        thirds.append([split_heads(third, NUM_HEADS) for third in jnp.split(qkv_BSI, 3, axis=-1)])
    query_BAJF, key_BAJF, value_BAJF = (jnp.concatenate(both, axis=2) for both in zip(*thirds, strict=True))
    attended_BJI = join_heads(attention(query_BAJF, key_BAJF, value_BAJF, mask=mask))
    parts = jnp.split(attended_BJI, [tokens[0].shape[1]], axis=1)
    return [modules.linear(state, f"joint_attn.to_out.{modality}", part_BSI) for modality, part_BSI in enumerate(parts)]


def feed_forward(state: State, name: str, tokens: jax.Array) -> jax.Array:
    """Apply the feed-forward network of that name to [B, S, D]."""
    return modules.linear(state, f"{name}.ff.2", gated_activations.gelu(modules.linear(state, f"{name}.ff.0.0", tokens)))


def state_shapes(config: TextLatentMMDiTConfig) -> states.Shapes:
    """Return the shape of every parameter by name."""
    hidden_size, cond_dim, latent_dim = config.hidden_size, config.cond_dim, config.latent_dim
    linear, under = states.linear_shapes, states.under
    shapes: states.Shapes = {
        "text_encoder.token_embed.weight": (config.vocab_size, hidden_size),
        "text_encoder.position_embed": (1, config.max_seq_len, hidden_size),
    }
    shapes |= under("latent_encoder.projection.0", linear(2 * hidden_size, latent_dim))
    shapes |= under("latent_encoder.projection.1", states.norm_shapes(2 * hidden_size))
    shapes |= under("latent_encoder.projection.3", linear(hidden_size, 2 * hidden_size))
    shapes |= {"latent_encoder.position_embed": (1, 1, hidden_size)}
    for name in ("text_sigma_map", "latent_sigma_map"):
        shapes |= under(f"conditioning.{name}.mlp.0", linear(cond_dim, FREQUENCY_EMBEDDING_SIZE))
        shapes |= under(f"conditioning.{name}.mlp.2", linear(cond_dim, cond_dim))
    shapes |= under("conditioning.combine.0", linear(4 * cond_dim, 2 * cond_dim))
    shapes |= under("conditioning.combine.2", linear(cond_dim, 4 * cond_dim))
    for index in range(config.n_blocks):
        shapes |= under(f"mmdit.blocks.{index}", block_shapes(config))
    shapes |= {f"mmdit.norms.{modality}.g": (hidden_size,) for modality in range(MODALITIES)}
    shapes |= under("text_head", linear(config.vocab_size, hidden_size))
    shapes |= under("latent_head.0", linear(2 * hidden_size, hidden_size))
    shapes |= under("latent_head.3", linear(latent_dim, 2 * hidden_size))
    return shapes | (under("text_head_clusters", linear(config.vocab_size, hidden_size)) if config.cluster_size else {})


def block_shapes(config: TextLatentMMDiTConfig) -> states.Shapes:
    """Return the shape of every parameter of one block by its own name."""
    hidden_size, cond_dim, inner_size = config.hidden_size, config.cond_dim, NUM_HEADS * HEAD_SIZE
    linear, under = states.linear_shapes, states.under
    shapes = under("to_post_branch_gammas.2", linear(2 * MODALITIES * hidden_size, cond_dim))
    for modality in range(MODALITIES):
        for branch in ("attn", "ff"):
            shapes |= under(
                f"{branch}_residual_fns.{modality}", states.connection_shapes(config.num_residual_streams, hidden_size)
            )
            shapes |= under(f"{branch}_layernorms.{modality}.to_cond.2", linear(2 * hidden_size, cond_dim))
        shapes |= under(f"joint_attn.to_qkv.{modality}", linear(3 * inner_size, hidden_size, bias=False))
        shapes |= under(f"joint_attn.to_out.{modality}", linear(hidden_size, inner_size, bias=False))
        shapes |= under(f"feedforwards.{modality}.ff.0.0", linear(MLP_RATIO * hidden_size, hidden_size))
        shapes |= under(f"feedforwards.{modality}.ff.2", linear(hidden_size, MLP_RATIO * hidden_size))
    return shapes


def initial_state(config: TextLatentMMDiTConfig, *, seed: int) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.text_latent_mmdit.initial_state`."""
    shapes = state_shapes(config)
    state = {}
    for place, (name, shape) in enumerate(shapes.items()):
        key: dict[str, Any] = {"seed": seed, "step": 0, "example": place, "purpose": INITIAL_WEIGHTS}
        constant, deviation = (initials.of_name(table, name) for table in (initials.CONSTANTS, initials.DEVIATIONS))
        if constant is not None:
            state[name] = jnp.full(shape, constant, jnp.float32)
        elif deviation is not None:
            state[name] = deviation * random.normal(shape, **key)
        elif name.endswith(initials.SCALE_AND_SHIFT):
            state[name] = jnp.repeat(jnp.array([1, 0], jnp.float32), shape[0] // 2)
        elif name.endswith(initials.STATIC_ALPHA):
            identity = jnp.eye(shape[0], dtype=jnp.float32)
            state[name] = jnp.concatenate([identity[:, [int(random.bits((), **key)) % shape[0]]], identity], axis=1)
        else:
            fan_in = shapes[name.replace(".bias", ".weight")][1]
            state[name] = fan_in**-0.5 * (2 * random.uniform(shape, **key) - 1)
    return state


def load_state(state: State, *, config: TextLatentMMDiTConfig) -> dict[str, jax.Array]:
    """As `gaugeblock.reference.torch.text_latent_mmdit.load_state`."""
    shapes = state_shapes(config)
    of_trainer = states.part(state, CHECKPOINT_PREFIX)
    state = of_trainer if len(of_trainer) == len(state) else state
    validation.state_entries(state, shapes)
    return {name: state[name] for name in shapes}
