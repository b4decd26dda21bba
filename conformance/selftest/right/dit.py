"""Right but different DiTs."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.dit import Dit
from gaugeblock.conformance.selftest.variant import right


@right(batch_invariant=False)
class FunctionsOfTorch(Dit):
    """torch's linear, layer_norm, convolution and attention in float32."""

    def linear(self, state, name, inputs):
        return functional.linear(inputs, state[f"{name}.weight"], state[f"{name}.bias"])

    def embed(self, state, latents, config):
        weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
        tokens = functional.conv2d(latents, weight, bias, stride=config.patch_size).flatten(2).mT
        return tokens + self.places(config).float()

    def norm(self, tokens, eps):
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=eps)

    def attention(self, state, tokens, num_heads):
        query, key, value = self.heads(self.linear(state, "attn.qkv", tokens), num_heads)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.linear(state, "attn.proj", attended.transpose(1, 2).flatten(2))


@right()
class OperandsRounded(Dit):
    """What is multiplied is rounded to the dtype of the latents, as tensor cores want it; gradients are not."""

    def load(self, latents):
        self.dtype = latents.dtype
        return super().load(latents)

    def linear(self, state, name, inputs):
        return super().linear(state, name, rounded(inputs, self.dtype))

    def heads(self, qkv, num_heads):
        return tuple(rounded(each, self.dtype) for each in super().heads(qkv, num_heads))


@right()
class SoftmaxScaledBefore(Dit):
    """Queries are scaled, not scores; attention in float32."""

    def attention(self, state, tokens, num_heads):
        query, key, value = self.heads(self.linear(state, "attn.qkv", tokens), num_heads)
        query = query / self.root(query, num_heads)
        attended = (query @ key.mT).softmax(-1) @ value
        return self.linear(state, "attn.proj", attended.transpose(1, 2).flatten(2))


@right()
class GeluWrittenOut(Dit):
    """x · sigmoid(2 u), which is x / 2 · (1 + tanh(u)); and modulation by one fused multiply-add."""

    def gelu(self, inner):
        return inner * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))

    def modulate(self, normalized, shift, scale):
        return torch.addcmul(shift, normalized, 1 + scale)


@right()
class BlocksInFloat64(Dit):
    """Everything from the tokens on in float64, rounded once."""

    def linear(self, state, name, inputs):
        weight, bias = state[f"{name}.weight"].flatten(1), state[f"{name}.bias"]
        return inputs.double() @ weight.double().mT + bias.double()


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the latents, operation by operation."""

    def __call__(self, state, latents, timesteps, class_labels, *, config):
        tokens = self.embed(state, latents, config)
        conditioning = self.conditions(state, timesteps, class_labels, config)
        for index in range(config.depth):
            prefix = f"blocks.{index}."
            own = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
            tokens = self.block(own, tokens, conditioning, config)
        return self.unpatchify(self.last(state, tokens, conditioning), config)

    def linear(self, state, name, inputs):
        return super().linear(state, name, inputs.to(state[f"{name}.bias"].dtype))

    def embed(self, state, latents, config):
        return super().embed(state, latents, config).to(latents.dtype)

    def attention(self, state, tokens, num_heads):
        query, key, value = self.heads(self.linear(state, "attn.qkv", tokens), num_heads)
        attended = (query @ key.mT / self.root(query, num_heads)).softmax(-1) @ value
        return self.linear(state, "attn.proj", attended.transpose(1, 2).flatten(2))


class FlashKernel(torch.autograd.Function):
    """Attention as torch's flash kernel has it: products of rounded operands, float32 between them, the result rounded.

    The backward pass takes delta from the rounded result.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        probabilities = (query.float() @ key.float().mT / query.shape[-1] ** 0.5).softmax(-1)
        attended = (probabilities.to(value.dtype).float() @ value.float()).to(value.dtype)
        ctx.save_for_backward(query, key, value, probabilities, attended)
        return attended

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, probabilities, attended = ctx.saved_tensors
        dtype, gradient = query.dtype, gradient.float()
        delta = (gradient * attended.float()).sum(-1, keepdim=True)
        of_scores = (probabilities * (gradient @ value.float().mT - delta)).to(dtype).float() / query.shape[-1] ** 0.5
        products = of_scores @ key.float(), of_scores.mT @ query.float(), probabilities.to(dtype).float().mT @ gradient
        return tuple(each.to(dtype) for each in products)


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class FlashAttention(EveryOperationRounded):
    """PyTorch in the dtype of the latents, attention by a flash kernel."""

    def attention(self, state, tokens, num_heads):
        heads = self.heads(self.linear(state, "attn.qkv", tokens), num_heads)
        return self.linear(state, "attn.proj", FlashKernel.apply(*heads).transpose(1, 2).flatten(2))


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class AttentionOfTorch(EveryOperationRounded):
    """PyTorch in the dtype of the latents, with torch's own choice of attention."""

    def attention(self, state, tokens, num_heads):
        return FunctionsOfTorch.attention(self, state, tokens, num_heads)
