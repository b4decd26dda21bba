"""Right but different MMDiTs."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.dit import FlashKernel
from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.mmdit import Mmdit
from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.torch.mmdit import NORM_EPS


@right(batch_invariant=False)
class FunctionsOfTorch(Mmdit):
    """torch's linear, layer_norm, rms_norm, convolution and attention in float32."""

    def linear(self, state, name, inputs):
        return functional.linear(inputs, state[f"{name}.weight"].flatten(1), state[f"{name}.bias"])

    def patchify(self, latents, patch):
        self.patch = patch
        return functional.unfold(latents, patch, stride=patch).mT

    def norm(self, tokens, eps):
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=eps)

    def rms(self, heads, weight):
        return functional.rms_norm(heads, weight.shape, weight, NORM_EPS)

    def attend(self, query, key, value):
        return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@right()
class OperandsRounded(Mmdit):
    """What is multiplied is rounded to the dtype of the latents, as tensor cores want it; gradients are not."""

    def run(self, state, latents, *others):
        self.dtype = latents.dtype
        return super().run(state, latents, *others)

    def linear(self, state, name, inputs):
        return super().linear(state, name, rounded(inputs, self.dtype))

    def attend(self, *heads):
        return super().attend(*(rounded(each, self.dtype) for each in heads))


@right()
class TextFirstThroughout(Mmdit):
    """The text comes first, and its result is taken from there; queries are scaled, not scores."""

    def in_order(self, of_image, of_text):
        return [of_text, of_image]

    def joint_attention(self, state, tokens, text, config):
        first, second = super().joint_attention(state, tokens, text, config)
        attended = torch.cat([first, second], 1)
        return attended[:, text.shape[1] :], attended[:, : text.shape[1]]

    def attend(self, query, key, value):
        attended = (query / self.root(query, query.shape[1]) @ key.mT).softmax(-1) @ value
        return attended.transpose(1, 2).flatten(2)


@right()
class GeluWrittenOut(Mmdit):
    """x · sigmoid(2 u), which is x / 2 · (1 + tanh(u)); the heads' norm by a root and a division."""

    def gelu(self, inner):
        return inner * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))

    def rms(self, heads, weight):
        return heads / (heads.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * weight


@right()
class BlocksInFloat64(Mmdit):
    """Every product in float64, and what follows too, rounded once."""

    def linear(self, state, name, inputs):
        weight, bias = state[f"{name}.weight"].flatten(1), state[f"{name}.bias"]
        return inputs.double() @ weight.double().mT + bias.double()


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the latents, operation by operation."""

    def load(self, latents):
        return latents

    def linear(self, state, name, inputs):
        return super().linear(state, name, inputs.to(state[f"{name}.bias"].dtype))

    def attend(self, query, key, value):
        return ((query @ key.mT / self.root(query, 1)).softmax(-1) @ value).transpose(1, 2).flatten(2)


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class FlashAttention(EveryOperationRounded):
    """PyTorch in the dtype of the latents, attention by a flash kernel."""

    def attend(self, query, key, value):
        return FlashKernel.apply(query, key, value).transpose(1, 2).flatten(2)


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class AttentionOfTorch(EveryOperationRounded):
    """PyTorch in the dtype of the latents, with torch's own choice of attention."""

    def attend(self, query, key, value):
        return FunctionsOfTorch.attend(self, query, key, value)
