"""GPT-2 whose MLPs in some blocks are MoE layers, which began as copies of these MLPs.

Parameters are a flat dict with the names of public checkpoints (`transformer.h.0.attn.c_attn.weight`), but for the experts, which
are stacked (`transformer.h.8.mlp.experts.c_fc.weight`, `upcycled_checkpoints`), and the head, which is the table of tokens. As
there, matrices are [in, out]. Dropout, which the public model has in training, is left out.

Shapes: B batch_size, S tokens of a sequence, D hidden_size, A num_heads, F features of a head, I intermediate_size, V vocab_size,
L num_moe_layers, E num_experts, K top_k.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from gaugeblock.reference import moe_states, states, upcycled_checkpoints, validation
from gaugeblock.reference.configs import UpcycledGPT2Config
from gaugeblock.reference.torch import modules, upcycling
from gaugeblock.reference.torch.attention import attention, join_heads, split_heads
from gaugeblock.reference.torch.auxiliary_losses import assignments
from gaugeblock.reference.torch.biased_moe_layers import upcycled_gpt2_moe
from gaugeblock.reference.torch.clip_text import causal_mask
from gaugeblock.reference.torch.experts import gelu
from gaugeblock.reference.torch.layers import linear
from gaugeblock.reference.torch.precision import at_least_float32
from gaugeblock.reference.torch.recomputation import recomputable

HEAD = "lm_head.weight"
TOKENS = "transformer.wte.weight"
MASK = re.compile(r"\.attn\.(masked_)?bias$")  # what old checkpoints hold of attention

State = Mapping[str, torch.Tensor]


class Routing(NamedTuple):
    """What the router of a layer says of tokens, in float32 at least."""

    router_logits: torch.Tensor
    """[B, S, E], without noise."""
    router_probs: torch.Tensor
    """[B, S, E], with it in training."""
    entropy: torch.Tensor
    """[B, S], in nats, of the probabilities without noise."""
    load: torch.Tensor
    """[B, E], each expert's part of the assignments of a sequence."""


def upcycled_gpt2(
    state: State, input_ids: torch.Tensor, noise: torch.Tensor, *, training: bool, config: UpcycledGPT2Config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predict the token after each token of a sequence.

        x = token embedding + position embedding
        x = x + attention of each token to itself and those before it, of ln_1(x)
        x = x + mlp(y), or x + upcycled_gpt2_moe(y, noise), y = ln_2(x);  both num_hidden_layers times
        logits = ln_f(x) @ token table^T

    Args:
        state: The parameters by name, shapes as in `state_shapes`, all of one floating dtype.
        input_ids: [batch_size, num_tokens], int32 or int64 in 0 .. vocab_size - 1, num_tokens 1 to max_position_embeddings.
        noise: [batch_size, num_tokens, num_moe_layers, num_experts], floating: what is added to the routers' logits in training,
            draws of a normal distribution that is as wide as `noisy_routers.noise_std_at` has it. It gets no gradient.
        training: Whether there is noise, and with `top_k` 1 a gradient through the experts' weights (`noisy_routers.ste_topk`).
        config: The model.

    Returns:
        logits: [batch_size, num_tokens, vocab_size], dtype of the state; computed in float32 (float64 for a float64 state) and
            rounded once. The rest is of float32 (float64 for a float64 state).
        router_logits: [batch_size, num_tokens, num_moe_layers, num_experts], without noise, for the z-loss.
        router_probs: [batch_size, num_tokens, num_moe_layers, num_experts], with noise in training, for the balance loss.
        entropy: [batch_size, num_tokens, num_moe_layers], of the probabilities without noise, in nats.
        load: [batch_size, num_moe_layers, num_experts], each expert's part of the assignments of a sequence; no gradient.

    Raises:
        TypeError: An argument is not an array of the dtype above.
        ValueError: An entry of the state is missing, unexpected or of another shape; ranks, sizes or devices do not fit
            together; or an id names no token.

    Source: Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3; transformers
    models/gpt2/modeling_gpt2.py, GPT2LMHeadModel; sumitdotml/moe-emergence, `moe_emergence/gpt2_moe.py`.
    """
    validation.upcycled_gpt2(state, input_ids, noise, config, state_shapes(config))
    validation.gpt2_input_ids_in_range(input_ids, config)
    dtype = state[TOKENS].dtype
    state = {name: at_least_float32(parameter) for name, parameter in state.items()}
    input_ids = input_ids.long()

    hidden_BSD = embed_tokens(state, input_ids)
    mask_BAST = causal_mask(input_ids, None)
    noise_BSLE = noise.detach().to(hidden_BSD.dtype)
    routings: list[Routing] = []
    for index in range(config.num_hidden_layers):
        own = states.part(state, f"transformer.h.{index}")
        if index in config.moe_layers:
            noise_BSE = noise_BSLE[:, :, len(routings)]
            hidden_BSD, routing = moe_block(own, hidden_BSD, mask_BAST, noise_BSE, training=training, config=config)
            routings.append(routing)
        else:
            hidden_BSD = dense_block(own, hidden_BSD, mask_BAST, config=config)
    normalized_BSD = modules.layer_norm(state, "transformer.ln_f", hidden_BSD, eps=config.layer_norm_eps)
    return linear(normalized_BSD, state[TOKENS]).to(dtype), *of_all_layers(routings, noise_BSLE)


def embed_tokens(state: State, input_ids: torch.Tensor) -> torch.Tensor:
    """Embed token ids [B, S] and their places, [B, S, D]."""
    return state[TOKENS][input_ids] + state["transformer.wpe.weight"][: input_ids.shape[1]]


@recomputable
def dense_block(state: State, hidden_states: torch.Tensor, mask: torch.Tensor, *, config: UpcycledGPT2Config) -> torch.Tensor:
    """Apply a block of GPT-2 to [B, S, D] under a mask [1, 1, S, S]: attention, then an MLP.

    x = x + attention(ln_1(x))
    x = x + c_proj(gelu(c_fc(ln_2(x)))), GELU by tanh
    """
    hidden_BSD = attend(state, hidden_states, mask, config=config)
    normalized_BSD = modules.layer_norm(state, "ln_2", hidden_BSD, eps=config.layer_norm_eps)
    inner_BSI = gelu(projection(state, "mlp.c_fc", normalized_BSD), "tanh")
    return hidden_BSD + projection(state, "mlp.c_proj", inner_BSI)


@recomputable
def moe_block(
    state: State,
    hidden_states: torch.Tensor,
    mask: torch.Tensor,
    noise: torch.Tensor,
    *,
    training: bool,
    config: UpcycledGPT2Config,
) -> tuple[torch.Tensor, Routing]:
    """Apply a block of GPT-2 to [B, S, D], with noise [B, S, E]: attention, then an MoE layer.

    x = x + attention(ln_1(x))
    x = x + upcycled_gpt2_moe(ln_2(x), noise)
    """
    hidden_BSD = attend(state, hidden_states, mask, config=config)
    normalized_BSD = modules.layer_norm(state, "ln_2", hidden_BSD, eps=config.layer_norm_eps)
    tokens, noise_of_tokens = normalized_BSD.flatten(0, 1), noise.flatten(0, 1)
    out, logits, ids, probs, entropy, _ = upcycled_gpt2_moe(
        tokens, states.part(state, "mlp"), noise_of_tokens, top_k=config.top_k, noise_std=1.0, training=training
    )
    routing = routing_of(logits.view(noise.shape), probs.view(noise.shape), entropy, ids)
    return hidden_BSD + out.view(hidden_BSD.shape), routing


def routing_of(router_logits: torch.Tensor, router_probs: torch.Tensor, entropy: torch.Tensor, topk_ids: torch.Tensor) -> Routing:
    """Return what a router says of sequences: its logits and probabilities [B, S, E], entropy [B * S] and ids [B * S, K]."""
    batch_size, num_tokens, num_experts = router_logits.shape
    ids_BSK = topk_ids.view(batch_size, num_tokens, topk_ids.shape[1])
    counted_BS = torch.ones(ids_BSK.shape[:2], dtype=torch.bool, device=topk_ids.device)
    load_BE = assignments(ids_BSK, counted_BS, num_experts).to(router_logits.dtype) / (num_tokens * topk_ids.shape[1])
    return Routing(router_logits, router_probs, entropy.view(batch_size, num_tokens), load_BE)


def of_all_layers(routings: list[Routing], noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, probabilities, entropy and load of all layers with experts; `noise` has their axes, should there be none."""
    if not routings:
        return noise, noise, noise.sum(dim=-1), noise.sum(dim=1)
    logits, probs, entropies, loads = zip(*routings, strict=True)
    return torch.stack(logits, 2), torch.stack(probs, 2), torch.stack(entropies, 2), torch.stack(loads, 1)


def attend(state: State, hidden_states: torch.Tensor, mask: torch.Tensor, *, config: UpcycledGPT2Config) -> torch.Tensor:
    """Add attention to [B, S, D]: x + c_proj(attention(thirds of c_attn(ln_1(x))))."""
    normalized_BSD = modules.layer_norm(state, "ln_1", hidden_states, eps=config.layer_norm_eps)
    thirds = projection(state, "attn.c_attn", normalized_BSD).chunk(3, dim=-1)
    query_BASF, key_BASF, value_BASF = (split_heads(each, config.num_attention_heads) for each in thirds)
    attended_BSD = join_heads(attention(query_BASF, key_BASF, value_BASF, mask=mask))
    return hidden_states + projection(state, "attn.c_proj", attended_BSD)


def projection(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Apply the layer of that name, whose matrix is [in, out], to the last axis."""
    return linear(inputs, state[f"{name}.weight"].mT, state[f"{name}.bias"])


def state_shapes(config: UpcycledGPT2Config) -> states.Shapes:
    """Return the shape of every parameter by name.

    Raises:
        TypeError: `config` is not an UpcycledGPT2Config.
    """
    validation.upcycled_gpt2_config(config)
    hidden_size = config.hidden_size
    shapes: states.Shapes = {
        TOKENS: (config.vocab_size, hidden_size),
        "transformer.wpe.weight": (config.max_position_embeddings, hidden_size),
    }
    for index in range(config.num_hidden_layers):
        shapes |= states.under(f"transformer.h.{index}", block_shapes(config, has_experts=index in config.moe_layers))
    return shapes | states.under("transformer.ln_f", states.norm_shapes(hidden_size))


def block_shapes(config: UpcycledGPT2Config, *, has_experts: bool) -> states.Shapes:
    """Return the shape of every parameter of one block by its own name."""
    sizes, hidden_size, layer = layer_sizes(config), config.hidden_size, moe_states.UPCYCLED_GPT2
    if has_experts:
        mlp = {name: tuple(sizes[axis] for axis in axes) for name, axes in layer.items()}
    else:
        mlp = {name: tuple(sizes[axis] for axis in layer[f"experts.{name}"][1:]) for name in moe_states.OF_AN_EXPERT}
    return states.of_modules(
        {
            "ln_1": states.norm_shapes(hidden_size),
            "attn.c_attn": {"weight": (hidden_size, 3 * hidden_size), "bias": (3 * hidden_size,)},
            "attn.c_proj": {"weight": (hidden_size, hidden_size), "bias": (hidden_size,)},
            "ln_2": states.norm_shapes(hidden_size),
            "mlp": mlp,
        }
    )


def layer_sizes(config: UpcycledGPT2Config) -> dict[str, int]:
    """Return the sizes of an MoE layer by the names of their axes."""
    return {name: getattr(config, name) for name in ("num_experts", "hidden_size", "intermediate_size")}


def expert_names(config: UpcycledGPT2Config) -> tuple[str, ...]:
    """Return the names of the parameters whose first axis is of the experts of a layer, those of a layer together."""
    return tuple(f"transformer.h.{index}.mlp.experts.{name}" for index in config.moe_layers for name in moe_states.OF_AN_EXPERT)


def upcycled_state(
    dense: State, *, config: UpcycledGPT2Config, seed: int, perturbation_std: float = 1e-3
) -> dict[str, torch.Tensor]:
    """Make the state at which training starts: that of a dense GPT-2, and in MoE layers its MLPs copied, and new routers.

    Args:
        dense: The parameters of a GPT-2 of these sizes, as of `load_state`, floating.
        config: The model that is made.
        seed: Of the run; each layer has draws of its own (`upcycling.upcycling_draws`).
        perturbation_std: As of `upcycling.upcycle`.

    Raises: as it, and
        TypeError: An entry of `dense` is not a floating array, or `config` not an UpcycledGPT2Config.
        ValueError: An entry of `dense` is missing, unexpected or of another shape, or the seed is out of its range (`random`).

    Source: Komatsuzaki et al. 2022 (arXiv:2212.05055), section 3; sumitdotml/moe-emergence, `moe_emergence/gpt2_moe.py`.
    """
    validation.upcycled_gpt2_config(config)
    validation.state_entries(dense, state_shapes(replace(config, moe_layers=())), name="dense")
    state = dict(dense)
    for index in config.moe_layers:
        mlp = f"transformer.h.{index}.mlp"
        draws = upcycling.upcycling_draws(**layer_sizes(config), seed=seed, layer=index)
        layer = upcycling.upcycle(states.part(dense, mlp), draws, perturbation_std=perturbation_std)
        state = {name: each for name, each in state.items() if not name.startswith(f"{mlp}.")} | states.under(mlp, layer)
    return {name: state[name] for name in state_shapes(config)}


def load_state(state: State, *, config: UpcycledGPT2Config) -> dict[str, torch.Tensor]:
    """Return a checkpoint as `upcycled_gpt2` takes it: of a GPT-2, or of the public upcycled one, whose experts are one by one.

    Parameters keep their dtype. Names may lack `transformer.`, and what is no parameter is left out: masks of attention, where a
    router's schedule is, and the head, which is the table of tokens.

    Args:
        state: Arrays by name, as transformers' GPT2LMHeadModel or GPT2Model or moe-emergence saves them.
        config: The model.

    Raises:
        TypeError: An entry is not a floating array.
        ValueError: An entry is missing, unexpected or of another shape, or the head is not the table of tokens.

    Source: transformers models/gpt2/modeling_gpt2.py; sumitdotml/moe-emergence, `moe_emergence/gpt2_moe.py`.
    """
    state = {
        name if name.startswith(("transformer.", HEAD)) else f"transformer.{name}": entry
        for name, entry in state.items()
        if not MASK.search(name)
    }
    if HEAD in state:
        check_head(state.pop(HEAD), state.get(TOKENS))
    for index in config.moe_layers:
        mlp = f"transformer.h.{index}.mlp"
        layer = upcycled_checkpoints.from_public(state, prefix=f"{mlp}.", num_experts=config.num_experts).state
        state = {name: each for name, each in state.items() if not name.startswith(f"{mlp}.")} | states.under(mlp, layer)
    validation.state_entries(state, state_shapes(config))
    return {name: state[name] for name in state_shapes(config)}


def check_head(head: torch.Tensor, tokens: torch.Tensor | None) -> None:
    """Raise ValueError unless the head of a checkpoint is its table of tokens."""
    if tokens is None or head.shape != tokens.shape or not bool((head == tokens).all()):
        raise ValueError(f"state must have {HEAD} equal to {TOKENS}, got another")
