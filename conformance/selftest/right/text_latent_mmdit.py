"""Right but different text-latent MMDiTs."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.hyper_connections import ConnectionsOfTorch, Logarithms
from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.text_latent_mmdit import TextLatentMmdit
from gaugeblock.conformance.selftest.variant import right


class FunctionsOfTorch(ConnectionsOfTorch, TextLatentMmdit):
    """torch's products, norms, normalize, embedding and attention."""

    def embed_text(self, state, ids):
        tokens = functional.embedding(ids, state["text_encoder.token_embed.weight"])
        return tokens + state["text_encoder.position_embed"][:, : ids.shape[1]]

    def layer_norm(self, tokens):
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)

    def attended(self, query, key, value, may_look):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=may_look)


@right(batch_invariant=False)
class TextLatentOfTorch(FunctionsOfTorch):
    """torch's products, norms, normalize, embedding and attention in float32."""


@right()
class GateFoldedIntoStrengths(Logarithms, TextLatentMmdit):
    """Sinkhorn's rounds are of logarithms; the gate is folded into what is written."""

    def write(self, written, branch, gate):
        mixed, strength = written
        return mixed + (strength[..., None] * gate[:, :, None]) * branch[:, :, None]


@right()
class LatentFirst(TextLatentMmdit):
    """The latent comes before the text, in keys and values, which changes nothing; a head after the other; additive mask."""

    def attended(self, query, key, value, may_look):
        num_tokens = key.shape[2] - 1
        key, value = (torch.cat([each[:, :, num_tokens:], each[:, :, :num_tokens]], 2) for each in (key, value))
        seen = torch.cat([may_look[..., num_tokens:], may_look[..., :num_tokens]], -1)
        bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, 0]
        heads = [
            (each_query / 8 @ each_key.mT + bias).softmax(-1) @ each_value
            for each_query, each_key, each_value in zip(query.unbind(1), key.unbind(1), value.unbind(1), strict=True)
        ]
        return torch.stack(heads, 1)

    def gelu(self, inner):
        return inner * torch.special.erfc(-inner / 2**0.5) / 2


@right(batch_invariant=False)
class TextLatentInFloat64(FunctionsOfTorch):
    """Everything in float64, rounded once."""

    def parameters(self, state):
        return {name: tensor.double() for name, tensor in state.items()}

    def wide(self, latents):
        return latents.double()


@right()
class OperandsRounded(TextLatentMmdit):
    """What is multiplied is rounded to the dtype of the state, as tensor cores want it; gradients are not."""

    def parameters(self, state):
        self.dtype = next(iter(state.values())).dtype
        return super().parameters(state)

    def linear(self, state, name, inputs):
        return super().linear(state, name, rounded(inputs, self.dtype))

    def heads(self, state, name, tokens):
        return tuple(rounded(each, self.dtype) for each in super().heads(state, name, tokens))


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the state, operation by operation; connections alone are float32, as in the library."""

    def parameters(self, state):
        return state

    def wide(self, latents):
        return latents

    def connection(self, state, streams):
        own = {each: tensor.float() for each, tensor in state.items()}
        read, mixed, strength = super().connection(own, streams.float())
        return read.to(streams.dtype), mixed.to(streams.dtype), strength.to(streams.dtype)

    def attended(self, query, key, value, may_look):
        scores = query @ key.mT / 8
        return scores.masked_fill(~may_look, -torch.inf).softmax(-1) @ value
