"""The UNets, simulated: the model as one forward pass, of which each step can be overridden."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import silu

from gaugeblock.reference import validation
from gaugeblock.reference.configs import UNetConfig
from gaugeblock.reference.unet_states import state_shapes

State = Mapping[str, torch.Tensor]


class Unet:
    """`unet.unet`; a parameter is found by the whole name of its module."""

    contract = "unet.unet"

    def __call__(
        self,
        state: State,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        *,
        config: UNetConfig,
    ) -> torch.Tensor:
        mask = encoder_attention_mask
        validation.unet(state, latents, timesteps, encoder_hidden_states, mask, config, state_shapes(config))
        return self.predict(self.parameters(state), latents, timesteps, encoder_hidden_states, mask, config)

    def predict(
        self,
        state: State,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        mask: torch.Tensor | None,
        config: UNetConfig,
        added: Any = 0,
    ) -> torch.Tensor:
        """The result, of what steers beside the time."""
        images, text = self.load(latents), self.load(text)
        time = self.mlp(state, "time_embedding", self.times(timesteps, config).to(images.dtype)) + added
        return self.image(state, images, self.steer(time), (text, mask), config).to(latents.dtype)

    def parameters(self, state: State) -> dict[str, torch.Tensor]:
        """float32."""
        return {name: tensor.float() for name, tensor in state.items()}

    def load(self, inputs: torch.Tensor) -> torch.Tensor:
        """float32."""
        return inputs.float()

    def times(self, timesteps: torch.Tensor, config: UNetConfig) -> torch.Tensor:
        """Waves of times."""
        return self.waves(timesteps, config.block_out_channels[0])

    def waves(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """Cosines, then sines, `[..., width]` float32."""
        half = width // 2
        frequencies = 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = values.double()[..., None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1).float()

    def mlp(self, state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """Two linear layers."""
        return self.linear(state, f"{name}.linear_2", silu(self.linear(state, f"{name}.linear_1", inputs)))

    def steer(self, time: torch.Tensor) -> torch.Tensor:
        """What ResNet blocks read."""
        return silu(time)

    def image(self, state: State, images: torch.Tensor, time: torch.Tensor, text: Any, config: UNetConfig) -> torch.Tensor:
        """Down and up."""
        last, kept = config.num_levels - 1, [self.conv(state, "conv_in", images)]
        for level in range(last + 1):
            for layer in range(config.layers_per_block):
                kept.append(self.layer(state, f"down_blocks.{level}", layer, kept[-1], time, text, level, config))
            if level < last:
                kept.append(self.halve(state, f"down_blocks.{level}.downsamplers.0.conv", kept[-1]))
        images = self.resnet(state, "mid_block.resnets.0", kept[-1], time, config)
        images = self.transformer(state, "mid_block.attentions.0", images, text, last, config)
        images = self.resnet(state, "mid_block.resnets.1", images, time, config)
        for block in range(last + 1):
            of_level = [kept.pop() for _ in range(config.layers_per_block + 1)]
            for layer, skip in enumerate(self.order(of_level)):
                both = self.join(images, skip)
                images = self.layer(state, f"up_blocks.{block}", layer, both, time, text, last - block, config)
            if block < last:
                doubled = self.double(images, kept[-1].shape[2:])
                images = self.conv(state, f"up_blocks.{block}.upsamplers.0.conv", doubled)
        normalized = self.norm(state, "conv_norm_out", images, config.norm_num_groups, config.norm_eps)
        return self.conv(state, "conv_out", silu(normalized))

    def order(self, skips: list[torch.Tensor]) -> list[torch.Tensor]:
        """Of what was kept, the last first."""
        return skips

    def join(self, images: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Images first."""
        return torch.cat([images, skip], 1)

    def halve(self, state: State, name: str, images: torch.Tensor) -> torch.Tensor:
        """Half the height and width, rounded up."""
        return self.conv(state, name, images, stride=2)

    def double(self, images: torch.Tensor, extents: Any) -> torch.Tensor:
        """The nearest pixel of each, in so many rows and columns."""
        return functional.interpolate(images, size=tuple(extents))

    def conv(self, state: State, name: str, images: torch.Tensor, stride: int = 1) -> torch.Tensor:
        """A convolution that keeps the size, divided by `stride`."""
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        rest = weight.shape[-1] // 2
        columns = functional.unfold(images.double(), weight.shape[-1], padding=rest, stride=stride)
        out = (weight.double().flatten(1) @ columns).float() + bias[:, None]
        return out.unflatten(2, tuple(-(-size // stride) for size in images.shape[2:]))

    def norm(self, state: State, name: str, images: torch.Tensor, num_groups: int, eps: float) -> torch.Tensor:
        """GroupNorm."""
        groups = self.groups(images, num_groups)
        normalized = self.standard(groups.flatten(2), eps).view(groups.shape)
        weight, bias = (state[f"{name}.{each}"][:, None, None] for each in ("weight", "bias"))
        return self.ungroup(normalized) * weight + bias

    def groups(self, images: torch.Tensor, num_groups: int) -> torch.Tensor:
        """`[B, G, C / G, H, W]`."""
        return images.unflatten(1, (num_groups, -1))

    def ungroup(self, groups: torch.Tensor) -> torch.Tensor:
        """Back."""
        return groups.flatten(1, 2)

    def standard(self, values: torch.Tensor, eps: float) -> torch.Tensor:
        """Of mean 0 and variance 1 along the last axis."""
        centred = values - values.double().mean(-1, keepdim=True).float()
        return centred * (centred.double().square().mean(-1, keepdim=True) + eps).rsqrt().float()

    def layer(
        self, state: State, block: str, layer: int, images: torch.Tensor, time: Any, text: Any, level: int, config: UNetConfig
    ) -> torch.Tensor:
        """A ResNet block, and a transformer where there is one."""
        images = self.resnet(state, f"{block}.resnets.{layer}", images, time, config)
        if f"{block}.attentions.{layer}.norm.weight" not in state:
            return images
        return self.transformer(state, f"{block}.attentions.{layer}", images, text, level, config)

    def resnet(self, state: State, name: str, images: torch.Tensor, time: torch.Tensor, config: UNetConfig) -> torch.Tensor:
        """Two convolutions, the time between them."""
        norm = config.norm_num_groups, config.norm_eps
        hidden = self.conv(state, f"{name}.conv1", silu(self.norm(state, f"{name}.norm1", images, *norm)))
        hidden = self.with_time(hidden, self.linear(state, f"{name}.time_emb_proj", time)[:, :, None, None])
        hidden = self.conv(state, f"{name}.conv2", silu(self.norm(state, f"{name}.norm2", hidden, *norm)))
        return self.shortcut(state, name, images) + hidden

    def with_time(self, hidden: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Their sum."""
        return hidden + time

    def shortcut(self, state: State, name: str, images: torch.Tensor) -> torch.Tensor:
        """What the branch is added to."""
        has_one = f"{name}.conv_shortcut.weight" in state
        return self.conv(state, f"{name}.conv_shortcut", images) if has_one else images

    def transformer(
        self, state: State, name: str, images: torch.Tensor, text: Any, level: int, config: UNetConfig
    ) -> torch.Tensor:
        """Blocks of attention on pixels."""
        normalized = self.norm(state, f"{name}.norm", images, config.norm_num_groups, self.transformer_eps(config))
        tokens = self.linear(state, f"{name}.proj_in", self.tokens(normalized))
        for index in range(config.transformer_layers_per_block[level]):
            tokens = self.block(state, f"{name}.transformer_blocks.{index}", tokens, text, self.heads(level, config))
        return images + self.untokens(self.linear(state, f"{name}.proj_out", tokens), images)

    def transformer_eps(self, config: UNetConfig) -> float:
        """Of the GroupNorm before a transformer."""
        return 1e-6

    def tokens(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, S, C]`."""
        return images.flatten(2).mT

    def untokens(self, tokens: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]`."""
        return tokens.mT.unflatten(2, images.shape[2:])

    def heads(self, level: int, config: UNetConfig) -> int:
        """Of a level."""
        return config.attention_head_dim[level]

    def block(self, state: State, name: str, tokens: torch.Tensor, text: Any, heads: int) -> torch.Tensor:
        """Attention to pixels, to the text, and a feed-forward network."""
        words, mask = text
        seen = self.layer_norm(state, f"{name}.norm1", tokens)
        tokens = tokens + self.attention(state, f"{name}.attn1", seen, seen, None, heads)
        seen = self.layer_norm(state, f"{name}.norm2", tokens)
        tokens = tokens + self.attention(state, f"{name}.attn2", seen, words, mask, heads)
        first, second = self.linear(state, f"{name}.ff.net.0.proj", self.layer_norm(state, f"{name}.norm3", tokens)).chunk(2, -1)
        return tokens + self.linear(state, f"{name}.ff.net.2", self.gated(first, second))

    def gated(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """GEGLU."""
        return first * self.gelu(second)

    def gelu(self, gate: torch.Tensor) -> torch.Tensor:
        """The exact one."""
        return functional.gelu(gate)

    def layer_norm(self, state: State, name: str, tokens: torch.Tensor) -> torch.Tensor:
        """LayerNorm."""
        return self.standard(tokens, 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(
        self, state: State, name: str, tokens: torch.Tensor, asked: torch.Tensor, mask: Any, heads: int
    ) -> torch.Tensor:
        """Of tokens to others."""
        parts = (("to_q", tokens), ("to_k", asked), ("to_v", asked))
        query, key, value = (self.split(self.linear(state, f"{name}.{each}", inputs), heads) for each, inputs in parts)
        attended = self.attended(query, key, value, mask)
        return self.linear(state, f"{name}.to_out.0", attended.transpose(1, 2).flatten(2))

    def split(self, tokens: torch.Tensor, heads: int) -> torch.Tensor:
        """`[B, A, S, F]`."""
        return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attended(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`[B, A, S, F]`; 0 where there is nothing to look at."""
        scores = query.double() @ key.double().mT / math.sqrt(query.shape[-1])
        if mask is None:
            return (scores.softmax(-1) @ value.double()).float()
        hidden = ~mask[:, None, None]
        chosen = self.hide(scores, hidden).softmax(-1).masked_fill(self.nothing(hidden), 0)
        return (chosen @ value.double()).float()

    def hide(self, scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """As low as can be where there is no text, which leaves a row without any finite."""
        return scores.masked_fill(hidden, -1e30)

    def nothing(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows without any text."""
        return hidden.all(-1, keepdim=True)

    def linear(self, state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """A matrix product, and a bias if there is one."""
        out = (inputs.double() @ state[f"{name}.weight"].double().flatten(1).mT).float()
        return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


class UnetTextTime(Unet):
    """`unet.unet_text_time`."""

    contract = "unet.unet_text_time"

    def __call__(  # the call of another contract
        self,
        state: State,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        *,
        config: UNetConfig,
    ) -> torch.Tensor:
        text, mask = encoder_hidden_states, encoder_attention_mask
        validation.unet_text_time(state, latents, timesteps, text, text_embeds, time_ids, mask, config, state_shapes(config))
        state = self.parameters(state)
        waves = self.numbers(time_ids, config.addition_time_embed_dim)
        together = self.together(self.load(text_embeds), waves.flatten(1).to(self.load(latents).dtype))
        added = self.mlp(state, "add_embedding", together)
        return self.predict(state, latents, timesteps, text, mask, config, added)

    def numbers(self, time_ids: torch.Tensor, width: int) -> torch.Tensor:
        """Waves of each, `[B, N, width]`."""
        return self.waves(time_ids, width)

    def together(self, text: torch.Tensor, waves: torch.Tensor) -> torch.Tensor:
        """The text first."""
        return torch.cat([text, waves], 1)
