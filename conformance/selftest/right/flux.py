"""Right but different versions of Flux."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.flux import Flux
from gaugeblock.conformance.selftest.variant import right


@right(batch_invariant=False)
class FunctionsOfTorch(Flux):
    """torch's linear, layer_norm, rms_norm and attention in float32."""

    def linear(self, state, name, inputs):
        return functional.linear(inputs, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(self, tokens, eps):
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=eps)

    def rms_norm(self, heads, weight):
        return functional.rms_norm(heads, weight.shape, weight, eps=1e-6)

    def attend(self, query, key, value):
        return functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@right()
class ImageFirst(Flux):
    """The image's tokens come before those of the text, everywhere: attention knows no order."""

    def join(self, text, image):
        return torch.cat([image, text], -2)

    def split(self, tokens, num_text_tokens):
        num_image_tokens = tokens.shape[-2] - num_text_tokens
        return tokens[..., num_image_tokens:, :], tokens[..., :num_image_tokens, :]


@right()
class ComplexNumbersTurned(Flux):
    """Pairs are complex numbers, times exp(i angle)."""

    def turn(self, heads, angles):
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles).to(pairs.dtype)).flatten(-2)


@right()
class TwoProductsInsteadOfOne(Flux):
    """In a block with one stream, attention and feed-forward network each meet their own columns of the last matrix."""

    def beside(self, attended, inner):
        return attended, inner

    def linear(self, state, name, inputs):
        if isinstance(inputs, torch.Tensor):
            return super().linear(state, name, inputs)
        width = inputs[0].shape[-1]
        of_attention, of_inner = (
            {f"{name}.weight": weight, f"{name}.bias": state[f"{name}.bias"] / 2}
            for weight in state[f"{name}.weight"].tensor_split([width], 1)
        )
        return super().linear(of_attention, name, inputs[0]) + super().linear(of_inner, name, inputs[1])


@right()
class EverythingInFloat64(Flux):
    """Everything in float64, rounded once."""

    def parameter(self, tensor):
        return tensor.double()

    def load(self, latents):
        return latents.double()

    def linear(self, state, name, inputs):
        return inputs.double() @ state[f"{name}.weight"].mT + state[f"{name}.bias"]


@right()
class OperandsRounded(Flux):
    """What is multiplied is rounded to the dtype of the tokens, as tensor cores want it; gradients are not."""

    def load(self, latents):
        self.dtype = latents.dtype
        return super().load(latents)

    def linear(self, state, name, inputs):
        return super().linear(state, name, rounded(inputs, self.dtype))

    def attend(self, query, key, value):
        return super().attend(*(rounded(each, self.dtype) for each in (query, key, value)))


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the tokens, operation by operation, but for the angles."""

    def parameter(self, tensor):
        self.dtype = tensor.dtype
        return tensor

    def load(self, latents):
        return latents

    def linear(self, state, name, inputs):
        return super().linear(state, name, inputs.to(self.dtype))

    def turn(self, heads, angles):
        return super().turn(heads, angles).to(self.dtype)
