"""Right but different UNets."""

import torch
from torch.nn import functional

from gaugeblock.conformance.selftest.right.of_models import rounded
from gaugeblock.conformance.selftest.simulated.unet import Unet, UnetTextTime
from gaugeblock.conformance.selftest.variant import right


class FunctionsOfTorch(Unet):
    """torch's convolution, norms, linear and attention."""

    def conv(self, state, name, images, stride=1):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.conv2d(images, weight, bias, stride=stride, padding=weight.shape[-1] // 2)

    def norm(self, state, name, images, num_groups, eps):
        return functional.group_norm(images, num_groups, state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def layer_norm(self, state, name, tokens):
        return functional.layer_norm(tokens, tokens.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(self, state, name, inputs):
        return functional.linear(inputs, state[f"{name}.weight"].flatten(1), state.get(f"{name}.bias"))

    def attended(self, query, key, value, mask):
        return functional.scaled_dot_product_attention(query, key, value, None if mask is None else mask[:, None, None])


@right(batch_invariant=False)
class UnetOfTorch(FunctionsOfTorch, Unet):
    """torch's functions in float32."""


@right(batch_invariant=False)
class UnetTextTimeOfTorch(FunctionsOfTorch, UnetTextTime):
    """torch's functions in float32."""


class OtherOrders(Unet):
    """Each convolution as the sum of two; doubling by stacks; exact GELU by erfc; queries scaled, not scores."""

    def double(self, images, extents):
        rows = torch.stack([images, images], 3).flatten(2, 3)
        return torch.stack([rows, rows], 4).flatten(3, 4)[:, :, : extents[0], : extents[1]]

    def gelu(self, gate):
        return gate * torch.erfc(-gate * 2**-0.5) / 2

    def attended(self, query, key, value, mask):
        scores = (query * query.shape[-1] ** -0.5) @ key.mT
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -1e30)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        if mask is not None:
            weights = weights * mask[:, None, None]
        return weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-30)

    def conv(self, state, name, images, stride=1):
        half = images.shape[1] // 2
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if half == 0:
            return super().conv(state, name, images, stride)
        zero = torch.zeros_like(bias)
        first = super().conv({"a.weight": weight[:, :half], "a.bias": zero}, "a", images[:, :half], stride)
        return first + super().conv({"a.weight": weight[:, half:], "a.bias": bias}, "a", images[:, half:], stride)


@right()
class UnetInOtherOrders(OtherOrders, Unet):
    """Each convolution as the sum of two, attention without softmax, exact GELU by erfc."""


@right()
class UnetTextTimeInOtherOrders(OtherOrders, UnetTextTime):
    """Each convolution as the sum of two, attention without softmax, exact GELU by erfc."""


class InFloat64(FunctionsOfTorch):
    """Everything in float64, rounded once."""

    def load(self, inputs):
        return inputs.double()

    def parameters(self, state):
        return {name: tensor.double() for name, tensor in state.items()}


@right(batch_invariant=False)
class UnetInFloat64(InFloat64, Unet):
    """Everything in float64, rounded once."""


@right(batch_invariant=False)
class UnetTextTimeInFloat64(InFloat64, UnetTextTime):
    """Everything in float64, rounded once."""


class OperandsRounded(Unet):
    """What is multiplied is rounded to the dtype of the latents, as tensor cores want it; gradients are not."""

    dtype = torch.float32

    def load(self, inputs):
        self.dtype = inputs.dtype
        return super().load(inputs)

    def conv(self, state, name, images, stride=1):
        return super().conv(state, name, rounded(images, self.dtype), stride)

    def linear(self, state, name, inputs):
        return super().linear(state, name, rounded(inputs, self.dtype))


@right()
class UnetOfRoundedOperands(OperandsRounded, Unet):
    """What is multiplied is rounded."""


@right()
class UnetTextTimeOfRoundedOperands(OperandsRounded, UnetTextTime):
    """What is multiplied is rounded."""


class EveryOperationRounded(FunctionsOfTorch):
    """PyTorch in the dtype of the latents, operation by operation."""

    def load(self, inputs):
        return inputs

    def parameters(self, state):
        return dict(state)

    def attended(self, query, key, value, mask):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if mask is None:
            return scores.softmax(-1) @ value
        hidden = ~mask[:, None, None]
        chosen = scores.masked_fill(hidden, -1e4).softmax(-1).masked_fill(hidden, 0)
        return chosen @ value


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class UnetRoundedThroughout(EveryOperationRounded, Unet):
    """PyTorch in the dtype of the latents, operation by operation."""


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class UnetTextTimeRoundedThroughout(EveryOperationRounded, UnetTextTime):
    """PyTorch in the dtype of the latents, operation by operation."""
