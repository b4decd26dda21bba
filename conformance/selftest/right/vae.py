"""Right but different autoencoders."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.vae import Decoder, Encoder, Layers
from gaugeblock.conformance.selftest.variant import right
from gaugeblock.reference.torch.vae import NORM_EPS


class FunctionsOfTorch(Layers):
    """torch's convolution, group_norm and attention."""

    def conv(self, state, name, images, stride=1):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        padded = self.pad(images, weight.shape[-1] // 2, stride)
        return functional.conv2d(padded, weight, bias, stride=stride)

    def norm(self, state, name, images, num_groups):
        return functional.group_norm(images, num_groups, state[f"{name}.weight"], state[f"{name}.bias"], NORM_EPS)

    def linear(self, state, name, tokens):
        return functional.linear(tokens, state[f"{name}.weight"], state[f"{name}.bias"])

    def attended(self, query, key, value):
        return functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


@right(batch_invariant=False)
class EncoderOfTorch(FunctionsOfTorch, Encoder):
    """torch's functions in float32."""


@right(batch_invariant=False)
class DecoderOfTorch(FunctionsOfTorch, Decoder):
    """torch's functions in float32."""


class ChannelsLast(Layers):
    """Convolutions as sums over the places of their kernels, of products with the channels last; silu by tanh."""

    def conv(self, state, name, images, stride=1):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        padded = self.pad(images, weight.shape[-1] // 2, stride).movedim(1, -1)
        height, width = ((size - weight.shape[-1]) // stride + 1 for size in padded.shape[1:3])
        rows, columns = (slice(0, stride * (size - 1) + 1, stride) for size in (height, width))
        out = bias
        for row in reversed(range(weight.shape[-1])):
            for column in range(weight.shape[-1]):
                seen = padded[:, row:, column:][:, rows, columns]
                out = out + seen @ weight[:, :, row, column].mT
        return out.movedim(-1, 1)

    def active(self, images):
        return images / 2 * (1 + torch.tanh(images / 2))


@right()
class EncoderChannelsLast(ChannelsLast, Encoder):
    """Sums of products with the channels last."""


@right()
class DecoderChannelsLast(ChannelsLast, Decoder):
    """Sums of products with the channels last; the doubled image is put together of its four parts."""

    def double(self, images):
        rows = torch.stack([images, images], 3).flatten(2, 3)
        return torch.stack([rows, rows], 4).flatten(3, 4)


class InFloat64(FunctionsOfTorch):
    """Everything in float64, rounded once."""

    def load(self, inputs):
        return inputs.double()

    def parameters(self, state):
        return {name: tensor.double() for name, tensor in state.items()}


@right(batch_invariant=False)
class EncoderInFloat64(InFloat64, Encoder):
    """Everything in float64, rounded once."""


@right(batch_invariant=False)
class DecoderInFloat64(InFloat64, Decoder):
    """Everything in float64, rounded once."""


class OperandsRounded(Layers):
    """What is multiplied is rounded to the dtype of the inputs, as tensor cores want it; gradients are not."""

    def load(self, inputs):
        self.dtype = inputs.dtype
        return super().load(inputs)

    def conv(self, state, name, images, stride=1):
        return super().conv(state, name, rounded(images, self.dtype), stride)

    def linear(self, state, name, tokens):
        return super().linear(state, name, rounded(tokens, self.dtype))


@right()
class EncoderOfRoundedOperands(OperandsRounded, Encoder):
    """What is multiplied is rounded."""


@right()
class DecoderOfRoundedOperands(OperandsRounded, Decoder):
    """What is multiplied is rounded."""


class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the inputs, operation by operation."""

    def load(self, inputs):
        return inputs

    def parameters(self, state):
        return state


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class EncoderRoundedThroughout(EveryOperationRounded, Encoder):
    """PyTorch in the dtype of the images, operation by operation."""


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class DecoderRoundedThroughout(EveryOperationRounded, Decoder):
    """PyTorch in the dtype of the latents, operation by operation."""
