"""The upcycled GPT-2, simulated: one forward pass, of which each step can be overridden."""

from collections.abc import Mapping

import torch
from torch.nn import functional

from gaugeblock.reference import states, validation
from gaugeblock.reference.configs import UpcycledGPT2Config
from gaugeblock.reference.torch.upcycled_gpt2 import state_shapes

State = Mapping[str, torch.Tensor]
TOKENS, PLACES = "transformer.wte.weight", "transformer.wpe.weight"


class UpcycledGpt2:
    """`upcycled_gpt2.upcycled_gpt2`."""

    contract = "upcycled_gpt2.upcycled_gpt2"

    def __call__(
        self, state: State, input_ids: torch.Tensor, noise: torch.Tensor, *, training: bool, config: UpcycledGPT2Config
    ) -> tuple[torch.Tensor, ...]:
        validation.upcycled_gpt2(state, input_ids, noise, config, state_shapes(config))
        validation.gpt2_input_ids_in_range(input_ids, config)
        self.training, self.config = training, config
        dtype, parameters = state[TOKENS].dtype, self.parameters(state)
        hidden = self.embed(parameters, input_ids.long())
        said: list[list[torch.Tensor]] = []
        for index in range(config.num_hidden_layers):
            own = states.part(parameters, f"transformer.h.{index}")
            hidden = self.attention(own, hidden)
            if self.has_experts(index):
                out, *of_layer = self.layer(states.part(own, "mlp"), self.norm(own, "ln_2", hidden), noise[:, :, len(said)])
                hidden = hidden + out
                said.append(of_layer)
            else:
                hidden = hidden + self.mlp(states.part(own, "mlp"), self.norm(own, "ln_2", hidden))
        logits, probs, entropies, loads = zip(*said, strict=True)
        reported = torch.stack(logits, 2), torch.stack(probs, 2), torch.stack(entropies, 2), torch.stack(loads, 1)
        return self.head(parameters, hidden).to(dtype), *(each.float() for each in reported)

    def parameters(self, state: State) -> dict[str, torch.Tensor]:
        """float32."""
        return {name: tensor.float() for name, tensor in state.items()}

    def embed(self, state: State, ids: torch.Tensor) -> torch.Tensor:
        """Tokens and their places, `[B, S, D]`."""
        return state[TOKENS][ids] + state[PLACES][self.places(ids.shape[1])]

    def places(self, num_tokens: int) -> torch.Tensor:
        """`[S]`."""
        return torch.arange(num_tokens)

    def head(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        """The logits, `[B, S, V]`."""
        return self.product(self.norm(state, "transformer.ln_f", hidden), state[TOKENS].mT)

    def product(self, inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """With a matrix [in, out]."""
        return (inputs.double() @ matrix.double()).to(inputs.dtype)

    def norm(self, state: State, name: str, hidden: torch.Tensor) -> torch.Tensor:
        """LayerNorm."""
        centred = hidden - hidden.double().mean(-1, keepdim=True).to(hidden.dtype)
        variance = centred.double().square().mean(-1, keepdim=True)
        normalized = centred * (variance + self.eps()).rsqrt().to(hidden.dtype)
        return normalized * state[f"{name}.weight"] + state[f"{name}.bias"]

    def eps(self) -> float:
        """Of every LayerNorm."""
        return self.config.layer_norm_eps

    def gelu(self, inner: torch.Tensor) -> torch.Tensor:
        """By tanh."""
        return functional.gelu(inner, approximate="tanh")

    def mlp(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        """The feed-forward network, or one expert."""
        inner = self.gelu(self.product(hidden, state["c_fc.weight"]) + state["c_fc.bias"])
        return self.product(inner, state["c_proj.weight"]) + state["c_proj.bias"]

    def has_experts(self, index: int) -> bool:
        """Whether the block at that place has an MoE layer."""
        return index in self.config.moe_layers

    # ------------------------------------------------------------------------------------------------------ attention

    def attention(self, state: State, hidden: torch.Tensor) -> torch.Tensor:
        """With what it is added to."""
        qkv = self.product(self.norm(state, "ln_1", hidden), state["attn.c_attn.weight"]) + state["attn.c_attn.bias"]
        attended = self.attended(*self.heads(qkv)).transpose(1, 2).flatten(2)
        return hidden + self.product(attended, state["attn.c_proj.weight"]) + state["attn.c_proj.bias"]

    def heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, `[B, A, S, F]` each."""
        num_heads = self.config.num_attention_heads
        return tuple(each.unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in qkv.chunk(3, -1))

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Of each token to itself and those before it."""
        scores = query.double() @ key.double().mT * self.scale(query)
        return (scores.masked_fill(~self.may_look(query.shape[2]), -torch.inf).softmax(-1) @ value.double()).to(value.dtype)

    def scale(self, query: torch.Tensor) -> float:
        """Of scores."""
        return query.shape[-1] ** -0.5

    def may_look(self, num_tokens: int) -> torch.Tensor:
        """Whether a token sees another, `[S, S]`."""
        return torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()

    # -------------------------------------------------------------------------------------------------------- experts

    def layer(self, state: State, hidden: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the experts make of tokens, and logits, probabilities, entropy and load."""
        logits = self.product(hidden, state["router.gate.weight"].mT).float()
        clean = logits.double().softmax(-1)
        probs = self.noisy(logits.double(), noise.double()).softmax(-1) if self.training else clean
        weights, ids = self.choose(probs)
        out = torch.zeros_like(hidden)
        for expert in range(self.config.num_experts):
            own = {name.removeprefix("experts."): each[expert] for name, each in state.items() if "experts." in name}
            weight = torch.where(ids == expert, weights, 0).sum(-1)
            out = out + weight[..., None].to(hidden.dtype) * self.mlp(own, hidden)
        return out, logits, self.told(probs, clean), self.entropy(probs, clean), self.load(ids)

    def noisy(self, logits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """By which experts are chosen in training."""
        return logits + noise

    def choose(self, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids, `[B, S, K]`."""
        chosen, ids = probs.topk(self.config.top_k, dim=-1)
        if self.config.top_k > 1:
            return self.normalized(chosen, probs), ids
        return self.alone(chosen), ids

    def normalized(self, chosen: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        """Weights of several experts."""
        return chosen / (chosen.sum(-1, keepdim=True) + 1e-9)

    def alone(self, chosen: torch.Tensor) -> torch.Tensor:
        """The weight of one expert."""
        return 1 + (chosen - chosen.detach()) if self.training else torch.ones_like(chosen)

    def told(self, probs: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """The probabilities that are returned."""
        return probs

    def entropy(self, probs: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """Of those without noise."""
        return -(clean * torch.log(clean + 1e-9)).sum(-1)

    def load(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, E]`."""
        counts = functional.one_hot(ids, self.config.num_experts).sum((1, 2))
        return counts.double() / (ids.shape[1] * ids.shape[2])
