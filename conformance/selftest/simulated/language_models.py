"""SDAR, LLaDA and Dream, simulated: one forward pass, of which each step can be overridden."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional

from gaugeblock.reference import validation
from gaugeblock.reference.configs import DreamConfig, LanguageModelConfig, LLaDAConfig, SDARConfig, SDARMoEConfig

State = Mapping[str, torch.Tensor]
Tensors = tuple[torch.Tensor, ...]


class Decoder:
    """Layers and head; names of parameters are transformers'."""

    def parameters(self, state: State) -> dict[str, torch.Tensor]:
        """float32."""
        return {name: tensor.float() for name, tensor in state.items()}

    def decode(
        self,
        state: State,
        ids: torch.Tensor,
        places: torch.Tensor,
        may_look: torch.Tensor,
        config: LanguageModelConfig,
        past: Tensors | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Of tokens `[B, S]` under a mask `[B, S, T]`: logits, own keys and values, and of experts the routers' logits."""
        hidden, kept, routers = self.embed(state, ids), [], []
        for index in range(config.num_hidden_layers):
            name = f"model.layers.{index}"
            seen = None if past is None else (past[0][index], past[1][index])
            normalized = self.norm(state, f"{name}.input_layernorm", hidden, config)
            attended, own = self.attention(state, f"{name}.self_attn", normalized, places, may_look, seen, config)
            hidden = hidden + attended
            normalized = self.norm(state, f"{name}.post_attention_layernorm", hidden, config)
            if isinstance(config, SDARMoEConfig):
                inner, logits = self.experts(state, f"{name}.mlp", normalized, config)
                routers.append(logits)
            else:
                inner = self.feed_forward(state, f"{name}.mlp", normalized)
            hidden = hidden + inner
            kept.append(own)
        logits = self.linear(state, "lm_head", self.norm(state, "model.norm", hidden, config))
        keys, values = (torch.stack(each) for each in zip(*kept, strict=True))
        return logits, keys, values, routers

    def embed(self, state: State, ids: torch.Tensor) -> torch.Tensor:
        """`[B, S, D]`."""
        return state["model.embed_tokens.weight"][ids.long()]

    def norm(self, state: State, name: str, hidden: torch.Tensor, config: LanguageModelConfig) -> torch.Tensor:
        """RMSNorm."""
        mean_square = hidden.double().square().mean(-1, keepdim=True)
        return hidden * (mean_square + self.eps(config)).rsqrt().float() * state[f"{name}.weight"]

    def eps(self, config: LanguageModelConfig) -> float:
        """Of every RMSNorm."""
        return config.rms_norm_eps

    def theta(self, config: LanguageModelConfig) -> float:
        """Of the longest wave."""
        return config.rope_theta

    def linear(self, state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """A matrix product, and a bias if there is one."""
        product = (inputs.double() @ state[f"{name}.weight"].double().mT).float()
        return product + state[f"{name}.bias"] if f"{name}.bias" in state else product

    def attention(
        self,
        state: State,
        name: str,
        hidden: torch.Tensor,
        places: torch.Tensor,
        may_look: torch.Tensor,
        past: Tensors | None,
        config: LanguageModelConfig,
    ) -> tuple[torch.Tensor, Tensors]:
        """The attention branch `[B, S, D]`, and the keys and values of the tokens, `[B, K, S, F]` each."""
        query, key, value = self.heads(state, name, hidden, config)
        query, key = self.turned(state, name, query, key, places, config)
        own = key, value
        if past is not None:
            key, value = (torch.cat(each, 2) for each in zip(past, own, strict=True))
        key, value = (self.shared(each, config) for each in (key, value))
        attended = self.attended(query, key, value, may_look[:, None])
        return self.linear(state, f"{name}.o_proj", attended.transpose(1, 2).flatten(2)), own

    def heads(self, state: State, name: str, hidden: torch.Tensor, config: LanguageModelConfig) -> Tensors:
        """Queries, keys and values."""
        projected = (self.linear(state, f"{name}.{each}_proj", hidden) for each in ("q", "k", "v"))
        return tuple(each.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for each in projected)

    def turned(
        self,
        state: State,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        places: torch.Tensor,
        config: LanguageModelConfig,
    ) -> Tensors:
        """Queries and keys, normalized where the model does so, and turned."""
        if config.has_qk_norm:
            query, key = self.norm(state, f"{name}.q_norm", query, config), self.norm(state, f"{name}.k_norm", key, config)
        angles = self.angles(places, config)[:, None]
        return self.rotated(query, angles), self.rotated(key, angles)

    def angles(self, places: torch.Tensor, config: LanguageModelConfig) -> torch.Tensor:
        """`[B, S, F / 2]`, float64."""
        index = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
        return places[..., None].double() * self.theta(config) ** (-index / config.head_dim)

    def rotated(self, heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """Features i and i + F / 2 are a pair."""
        cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
        x, y = heads.chunk(2, -1)
        return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)

    def shared(self, heads: torch.Tensor, config: LanguageModelConfig) -> torch.Tensor:
        """Keys or values of each head of queries."""
        group = config.num_attention_heads // config.num_key_value_heads
        return heads[:, torch.arange(config.num_attention_heads) // group]

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, may_look: torch.Tensor) -> torch.Tensor:
        """0 for a token that sees none."""
        scores = self.scale(query) * (query.double() @ key.double().mT)
        largest = scores.masked_fill(~may_look, -torch.inf).amax(-1, keepdim=True).detach().clamp(min=-1e300)
        weights = torch.exp((scores - largest).masked_fill(~may_look, -torch.inf))
        return (weights @ value.double() / weights.sum(-1, keepdim=True).clamp(min=1e-300)).float()

    def scale(self, query: torch.Tensor) -> float:
        """Of scores."""
        return float(query.shape[-1] ** -0.5)

    def feed_forward(self, state: State, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """A gated network."""
        gate, up = (self.linear(state, f"{name}.{each}_proj", hidden) for each in ("gate", "up"))
        return self.linear(state, f"{name}.down_proj", self.gated(gate, up))

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SwiGLU."""
        return gate * torch.sigmoid(gate) * up

    def experts(self, state: State, name: str, hidden: torch.Tensor, config: SDARMoEConfig) -> Tensors:
        """All experts of all tokens, weighted; and the router's logits."""
        logits = self.linear(state, f"{name}.gate", hidden)
        weights = self.weights(logits, config)
        w13, w2 = state[f"{name}.experts.gate_up_proj"], state[f"{name}.experts.down_proj"]
        gate, up = self.products(hidden[:, :, None], w13).chunk(2, -1)
        outputs = self.products(self.gated(gate, up), w2)
        is_used = weights[..., None] != 0
        return torch.where(is_used, weights[..., None] * outputs, 0.0).sum(2), self.returned(logits)

    def products(self, inputs: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        """Of `[B, S, E or 1, in]` with an expert's matrix each, `[E, out, in]`."""
        return (inputs.double()[..., None, :] @ matrices.double().mT)[..., 0, :].float()

    def weights(self, logits: torch.Tensor, config: SDARMoEConfig) -> torch.Tensor:
        """Of each expert, `[B, S, E]`; 0 of those that are not chosen."""
        scores = self.scores(logits)
        chosen, ids = scores.topk(config.num_experts_per_tok, -1)
        if self.is_renormalized(config):
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(-1, ids, chosen)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Probabilities of experts."""
        return logits.softmax(-1)

    def is_renormalized(self, config: SDARMoEConfig) -> bool:
        """Whether weights of the chosen ones sum to 1."""
        return config.norm_topk_prob

    def returned(self, logits: torch.Tensor) -> torch.Tensor:
        """What is returned of a router."""
        return logits


class Llada(Decoder):
    """`llada.llada`."""

    contract = "llada.llada"
    NAMES: ClassVar[Mapping[str, str]] = {
        "wte": "model.embed_tokens", "ln_f": "model.norm", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm",
        "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
        "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
    }  # fmt: skip

    def __call__(
        self, state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, config: LLaDAConfig
    ) -> torch.Tensor:
        validation.llada(state, input_ids, attention_mask, config=config)
        dtype = next(iter(state.values())).dtype
        common = self.parameters(self.renamed(state))
        places = self.places(input_ids, attention_mask)
        return self.decode(common, input_ids, places, self.may_look(attention_mask), config)[0].to(dtype)

    def renamed(self, state: State) -> dict[str, torch.Tensor]:
        """By the names of transformers."""
        found = {}
        for name, tensor in state.items():
            *prefix, own, kind = name.removeprefix("model.transformer.").split(".")
            if prefix:
                found[f"model.layers.{prefix[1]}.{self.NAMES[own]}.{kind}"] = tensor
            else:
                found["lm_head.weight" if own == "ff_out" else f"{self.NAMES[own]}.{kind}"] = tensor
        return found

    def places(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`[B, S]`."""
        return torch.arange(ids.shape[1]).expand(ids.shape)

    def may_look(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """`[B, S, S]`."""
        return attention_mask[:, None].expand(-1, attention_mask.shape[1], -1)


class Dream(Decoder):
    """`dream.dream`."""

    contract = "dream.dream"

    def __call__(
        self, state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, config: DreamConfig
    ) -> torch.Tensor:
        validation.dream(state, input_ids, attention_mask, config=config)
        places, may_look = self.places(attention_mask), self.may_look(attention_mask)
        logits = self.decode(self.parameters(state), input_ids, places, may_look, config)[0]
        return self.shifted(logits).to(next(iter(state.values())).dtype)

    def places(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """`[B, S]`, padding left out."""
        return attention_mask.long().cumsum(1) - 1

    def may_look(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """`[B, S, S]`."""
        return attention_mask[:, None] & attention_mask[:, :, None]

    def shifted(self, logits: torch.Tensor) -> torch.Tensor:
        """Each row gets what the one before it says."""
        return logits[:, (torch.arange(logits.shape[1]) - 1).clamp(min=0)]


class BlockCausal(Decoder):
    """What the operations of SDAR have in common."""

    def blocks(self, places: torch.Tensor, config: SDARConfig | SDARMoEConfig) -> torch.Tensor:
        """The block of each place."""
        return places // config.block_length

    def may_look(self, num_tokens: int, past: int, config: SDARConfig | SDARMoEConfig) -> torch.Tensor:
        """`[S, past + S]`."""
        blocks = self.blocks(torch.arange(past + num_tokens), config)
        return blocks[past:, None] >= blocks[None]

    def places(self, ids: torch.Tensor, past: int) -> torch.Tensor:
        """`[B, S]`."""
        return torch.arange(past, past + ids.shape[1]).expand(ids.shape)


class Sdar(BlockCausal):
    """`sdar.sdar`."""

    contract = "sdar.sdar"
    check = staticmethod(validation.sdar)

    def __call__(self, state: State, input_ids: torch.Tensor, *, config: SDARConfig) -> torch.Tensor:
        return self.predicted(state, input_ids, config)[0].to(next(iter(state.values())).dtype)

    def predicted(self, state: State, ids: torch.Tensor, config: SDARConfig | SDARMoEConfig) -> tuple:
        """As `decode`, of whole sequences."""
        self.check(state, ids, config=config)
        may_look = self.may_look(ids.shape[1], 0, config).expand(len(ids), -1, -1)
        return self.decode(self.parameters(state), ids, self.places(ids, 0), may_look, config)


class SdarMoe(Sdar):
    """`sdar.sdar_moe`."""

    contract = "sdar.sdar_moe"
    check = staticmethod(validation.sdar_moe)

    def __call__(self, state: State, input_ids: torch.Tensor, *, config: SDARMoEConfig) -> Tensors:
        logits, _, _, routers = self.predicted(state, input_ids, config)
        return logits.to(next(iter(state.values())).dtype), torch.stack(routers).float()


class SdarCached(BlockCausal):
    """`sdar.sdar_cached`."""

    contract = "sdar.sdar_cached"

    def __call__(
        self,
        state: State,
        input_ids: torch.Tensor,
        past_keys: torch.Tensor,
        past_values: torch.Tensor,
        *,
        config: SDARConfig,
    ) -> Tensors:
        validation.sdar_cached(state, input_ids, past_keys, past_values, config=config)
        num_past = past_keys.shape[3]
        may_look = self.may_look(input_ids.shape[1], num_past, config).expand(len(input_ids), -1, -1)
        parameters = self.parameters(state)
        dtype = parameters["lm_head.weight"].dtype
        past, places = (past_keys.to(dtype), past_values.to(dtype)), self.places(input_ids, num_past)
        found = self.decode(parameters, input_ids, places, may_look, config, past)[:3]
        return tuple(each.to(past_keys.dtype) for each in found)


class SdarTraining(BlockCausal):
    """`sdar.sdar_training`."""

    contract = "sdar.sdar_training"

    def __call__(
        self,
        state: State,
        noisy_ids: torch.Tensor,
        clean_ids: torch.Tensor,
        sample_ids: torch.Tensor,
        *,
        config: SDARConfig,
    ) -> torch.Tensor:
        validation.sdar_training(state, noisy_ids, clean_ids, sample_ids, config=config)
        ids, num_tokens = torch.cat([noisy_ids.long(), clean_ids.long()], 1), noisy_ids.shape[1]
        places, may_look = self.both_places(sample_ids), self.both_look(sample_ids, config)
        logits = self.decode(self.parameters(state), ids, places, may_look, config)[0]
        return self.noisy(logits, num_tokens).to(next(iter(state.values())).dtype)

    def in_samples(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """`[B, S]`: places within samples."""
        if not sample_ids.numel():
            return sample_ids.long()
        index = sample_ids.long() - sample_ids.min()
        return functional.one_hot(index).cumsum(1).gather(2, index[..., None])[..., 0] - 1

    def both_places(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """`[B, 2 S]`."""
        return self.in_samples(sample_ids).repeat(1, 2)

    def together(self, sample_ids: torch.Tensor) -> torch.Tensor:
        """`[B, S, S]`: whether two tokens are of one sample, and no padding."""
        return (sample_ids[:, :, None] == sample_ids[:, None]) & (sample_ids[:, None] >= 0)

    def both_look(self, sample_ids: torch.Tensor, config: SDARConfig) -> torch.Tensor:
        """`[B, 2 S, 2 S]`."""
        block = self.blocks(self.in_samples(sample_ids), config)
        query, key, together = block[:, :, None], block[:, None], self.together(sample_ids)
        noisy = torch.cat([query == key, self.sees_clean(query, key)], 2)
        clean = torch.cat([self.clean_sees_noisy(query, key), query >= key], 2)
        return torch.cat([noisy, clean], 1) & together.repeat(1, 2, 2)

    def sees_clean(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Of a noisy token."""
        return query > key

    def clean_sees_noisy(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Never."""
        return torch.zeros_like(query == key)

    def noisy(self, logits: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Those that are returned."""
        return logits[:, :num_tokens]
