"""CLIP's text encoder, simulated: one forward pass, of which each step can be overridden."""

from collections.abc import Mapping

import torch
from torch.nn import functional

from gaugeblock.reference import validation
from gaugeblock.reference.configs import CLIPTextConfig
from gaugeblock.reference.torch.clip_text import state_shapes

State = Mapping[str, torch.Tensor]
LAST_NORM = "text_model.final_layer_norm"


class ClipText:
    """`clip_text.clip_text`."""

    contract = "clip_text.clip_text"

    def __call__(
        self, state: State, input_ids: torch.Tensor, attention_mask: torch.Tensor, *, config: CLIPTextConfig
    ) -> tuple[torch.Tensor, torch.Tensor]:
        validation.clip_text(state, input_ids, attention_mask, config, state_shapes(config))
        validation.clip_input_ids_in_range(input_ids, config)
        dtype = state[f"{LAST_NORM}.weight"].dtype
        parameters = self.parameters(state)
        hidden = [self.embed(parameters, input_ids.long())]
        may_look = self.may_look(attention_mask)
        for index in range(config.num_hidden_layers):
            hidden.append(self.layer(parameters, f"text_model.encoder.layers.{index}", hidden[-1], may_look, config))
        pooled = self.pool(self.last_norm(parameters, hidden[-1], config), input_ids.long(), config)
        if config.projection_dim is not None:
            pooled = self.linear(parameters, "text_projection", pooled)
        returned = self.returned(hidden, config)
        if self.is_normalized(config):
            returned = self.last_norm(parameters, returned, config)
        return returned.to(dtype), pooled.to(dtype)

    def parameters(self, state: State) -> dict[str, torch.Tensor]:
        """float32."""
        return {name: tensor.float() for name, tensor in state.items()}

    def embed(self, state: State, ids: torch.Tensor) -> torch.Tensor:
        """Tokens and their places, `[B, S, D]`."""
        tokens = state["text_model.embeddings.token_embedding.weight"][ids]
        return tokens + state["text_model.embeddings.position_embedding.weight"][self.places(ids)]

    def places(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, S]`."""
        return torch.arange(ids.shape[1]).expand(ids.shape)

    def may_look(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """Whether a token sees another, `[B, 1, S, S]`."""
        num_tokens = attention_mask.shape[1]
        ahead = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
        return attention_mask[:, None, None] & ~ahead

    def layer(
        self, state: State, name: str, hidden: torch.Tensor, may_look: torch.Tensor, config: CLIPTextConfig
    ) -> torch.Tensor:
        """Attention, then a feed-forward network."""
        normalized = self.norm(state, f"{name}.layer_norm1", hidden, config)
        hidden = hidden + self.attention(state, f"{name}.self_attn", normalized, may_look, config.num_attention_heads)
        normalized = self.norm(state, f"{name}.layer_norm2", hidden, config)
        inner = self.activation(self.linear(state, f"{name}.mlp.fc1", normalized), config)
        return hidden + self.linear(state, f"{name}.mlp.fc2", inner)

    def norm(self, state: State, name: str, hidden: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
        """LayerNorm."""
        centred = hidden - hidden.double().mean(-1, keepdim=True).float()
        variance = centred.double().square().mean(-1, keepdim=True)
        normalized = centred * (variance + self.eps(config)).rsqrt().float()
        return normalized * state[f"{name}.weight"] + state[f"{name}.bias"]

    def last_norm(self, state: State, hidden: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
        """The final LayerNorm."""
        return self.norm(state, LAST_NORM, hidden, config)

    def eps(self, config: CLIPTextConfig) -> float:
        """Of every LayerNorm."""
        return config.layer_norm_eps

    def linear(self, state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """A matrix product, and a bias if there is one."""
        product = (inputs.double() @ state[f"{name}.weight"].double().mT).float()
        return product + state[f"{name}.bias"] if f"{name}.bias" in state else product

    def heads(self, state: State, name: str, hidden: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, `[B, A, S, F]` each."""
        projected = (self.linear(state, f"{name}.{each}_proj", hidden) for each in ("q", "k", "v"))
        return tuple(each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in projected)

    def attention(self, state: State, name: str, hidden: torch.Tensor, may_look: torch.Tensor, num_heads: int) -> torch.Tensor:
        """The attention branch, `[B, S, D]`."""
        query, key, value = self.heads(state, name, hidden, num_heads)
        attended = self.attended(query, key, value, may_look)
        return self.linear(state, f"{name}.out_proj", attended.transpose(1, 2).flatten(2))

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, may_look: torch.Tensor) -> torch.Tensor:
        """0 for a token that sees none."""
        scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
        largest = scores.masked_fill(~may_look, -torch.inf).amax(-1, keepdim=True).detach().clamp(min=-1e300)
        weights = torch.exp((scores - largest).masked_fill(~may_look, -torch.inf))
        return (weights @ value.double() / weights.sum(-1, keepdim=True).clamp(min=1e-300)).float()

    def activation(self, inner: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
        """quick-GELU or the exact one."""
        return inner * torch.sigmoid(1.702 * inner) if config.hidden_act == "quick_gelu" else functional.gelu(inner)

    def pool(self, hidden: torch.Tensor, ids: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
        """What stands where the caption ends, `[B, D]`."""
        return hidden.take_along_dim(self.ends(ids, config)[:, None, None], 1)[:, 0]

    def ends(self, ids: torch.Tensor, config: CLIPTextConfig) -> torch.Tensor:
        """Places where captions end, `[B]`."""
        marks = ids == (ids.amax(1, keepdim=True) if config.eos_token_id == 2 else config.eos_token_id)
        places = torch.arange(ids.shape[1])
        return torch.where(marks, places, ids.shape[1]).amin(1)

    def returned(self, hidden: list[torch.Tensor], config: CLIPTextConfig) -> torch.Tensor:
        """Of the embeddings and all layers' results, those that are returned."""
        return hidden[config.returned_layer]

    def is_normalized(self, config: CLIPTextConfig) -> bool:
        """Whether these are."""
        return config.normalize_returned
