"""Bugs of rotary embeddings."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.rotary import QkNormRotary, Rotate


@fault(caught_by="parity", kind="structural", source="Flux ports by apply_rotary_emb's other form")
class HalvesForNeighbours(Rotate):
    """Features i and i + F / 2 are pairs, whatever is asked for."""

    def turn(self, heads, cos, sin, pairs):
        return super().turn(heads, cos, sin, "half-split")


@fault(caught_by="parity", kind="structural", source="Llama weights of Meta, not permuted for transformers")
class NeighboursForHalves(Rotate):
    """Features 2 i and 2 i + 1 are pairs, whatever is asked for."""

    def turn(self, heads, cos, sin, pairs):
        return super().turn(heads, cos, sin, "interleaved")


@fault(caught_by="parity", kind="structural")
class TurnedBack(Rotate):
    """The sine's sign is the other one."""

    def rotated(self, x, y, cos, sin):
        return super().rotated(x, y, cos, -sin)


@fault(caught_by="parity", kind="structural", source="in-place kernels")
class FirstOverwritten(Rotate):
    """The second features are computed from the first ones after these were turned."""

    def rotated(self, x, y, cos, sin):
        x, _ = super().rotated(x, y, cos, sin)
        return x, y * cos + x * sin


@fault(caught_by="parity", kind="precision", source="tables in the model's dtype", dtypes=("bfloat16",))
class AnglesRounded(Rotate):
    """Cosines and sines are rounded to bfloat16."""

    def rotated(self, x, y, cos, sin):
        return super().rotated(x, y, cos.bfloat16().float(), sin.bfloat16().float())


@fault(caught_by="parity", kind="precision", source="apply_rotary_emb in the dtype of the heads", dtypes=("bfloat16",))
class ProductsRounded(Rotate):
    """Each product is rounded to bfloat16 before the sum."""

    def rotated(self, x, y, cos, sin):
        products = [each.bfloat16().float() for each in (x * cos, y * sin, y * cos, x * sin)]
        return products[0] - products[1], products[2] + products[3]


@fault(caught_by="parity", kind="structural", source="decoding with a cache whose offset is forgotten", smallest=4)
class AnglesOfTheFirstBlock(Rotate):
    """Each block of tokens is turned by the angles of the first."""

    block_tokens = 4

    def turn_blocks(self, heads, cos, sin, pairs):
        places = torch.arange(heads.shape[-2]) % self.block_tokens
        return super().turn_blocks(heads, cos[places], sin[places], pairs)


@fault(caught_by="parity", kind="boundary", smallest=34)
class LastTokensUnturned(Rotate):
    """Tokens behind the last full block stay as they are."""

    def turn_blocks(self, heads, cos, sin, pairs):
        full = heads.shape[-2] // self.block_tokens * self.block_tokens
        turned = [super().turn_blocks(heads[..., :full, :], cos[:full], sin[:full], pairs)] if full else []
        return torch.cat([*turned, heads[..., full:, :]], -2)


@fault(caught_by="layout", kind="memory", source="queries and keys as slices of one product")
class StridesOfSlicesIgnored(Rotate):
    """Cosines are addressed as if they were contiguous."""

    def __call__(self, heads, cos, sin, *, pairs):
        self.validate(heads, cos, sin, pairs)
        flat = cos.as_strided(cos.shape, (cos.shape[1], 1))
        return self.store(self.turn_blocks(heads.float(), flat, sin, pairs), heads)


@fault(caught_by="inputs_unchanged", kind="memory", source="vLLM's rotary kernels, which work in place")
class TurnedInPlace(Rotate):
    """The result is written over the heads."""

    def store(self, result, heads):
        out = super().store(result, heads)
        heads.detach().copy_(out.detach())
        return out


@fault(caught_by="gradients", kind="gradient", source="backward by the forward kernel")
class GradientTurnedForward(Rotate):
    """The gradient is turned by the angle, not back."""

    def rotated(self, x, y, cos, sin):
        back = x * cos + y * sin, y * cos - x * sin
        return tuple(other + (value - other).detach() for value, other in zip(super().rotated(x, y, cos, sin), back, strict=True))


@fault(caught_by="rejections", kind="error-contract")
class OddHeadsTaken(Rotate):
    """The last feature of a head of odd size is left out."""

    def validate(self, heads, cos, sin, pairs):
        super().validate(heads[..., : heads.shape[-1] // 2 * 2], cos, sin, pairs)

    def split(self, heads, pairs):
        return super().split(heads[..., : heads.shape[-1] // 2 * 2], pairs)


@fault(caught_by="parity", kind="structural", source="block order of early QK-norm models")
class NormAfterTheRotation(QkNormRotary):
    """Heads are turned first, so that the weights meet other features."""

    def of_heads(self, heads, weight, cos, sin, eps, pairs):
        turned = self.turn_blocks(heads.float(), cos, sin, pairs)
        return self.store(self.scale(self.normalize(turned, eps), weight.float()), heads)


@fault(caught_by="parity", kind="structural", source="OLMo 2's norm over all heads")
class NormOverAllHeads(QkNormRotary):
    """The root mean square is that of all heads of a token."""

    def mean_square(self, heads):
        return super().mean_square(heads).mean(1, keepdim=True).expand_as(heads[..., :1])


@fault(caught_by="parity", kind="structural")
class KeysByTheQueriesWeight(QkNormRotary):
    """Keys are scaled by the queries' weight."""

    def __call__(self, query, key, query_weight, key_weight, cos, sin, *, eps, pairs):
        return super().__call__(query, key, query_weight, query_weight + 0 * key_weight, cos, sin, eps=eps, pairs=pairs)


@fault(caught_by="parity", kind="structural", source="Gemma's norm")
class WeightFromOneOn(QkNormRotary):
    """The weight counts from 1 on."""

    def scale(self, normalized, weight):
        return super().scale(normalized, 1 + weight)


@fault(caught_by="parity", kind="precision", source="configs whose eps is not passed on")
class EpsOfAnotherModel(QkNormRotary):
    """eps is 1e-5, whatever is asked for."""

    def rstd(self, mean_square, eps):
        return super().rstd(mean_square, 1e-5)


@fault(caught_by="parity", kind="precision", source="hand-written RMSNorms")
class EpsOutsideTheRoot(QkNormRotary):
    """eps is added to the root."""

    def rstd(self, mean_square, eps):
        return 1 / (mean_square.sqrt() + eps)


@fault(caught_by="parity", kind="boundary")
class MeanOverThePaddedHead(QkNormRotary):
    """The sum of squares is divided by the number of lanes, a power of two."""

    def mean_square(self, heads):
        size = heads.shape[-1]
        return super().mean_square(heads) * (size / (1 << (size - 1).bit_length()))


@fault(caught_by="parity", kind="precision", source="norm and rotation in two kernels", dtypes=("bfloat16",))
class NormRounded(QkNormRotary):
    """The rotation reads the norm after it was rounded to bfloat16."""

    def kept(self, normalized, heads):
        return normalized.bfloat16().float()


@fault(caught_by="gradients", kind="gradient", source="statistics saved without their graph")
class RootConstant(QkNormRotary):
    """Backward takes the root mean square for a constant."""

    def mean_square(self, heads):
        return super().mean_square(heads).detach()


@fault(caught_by="gradients", kind="gradient", smallest=34)
class WeightGradientOfOneBlock(QkNormRotary):
    """The gradient of a weight is that of the first 16 tokens."""

    def scale(self, normalized, weight):
        first, rest = normalized[..., :16, :], normalized[..., 16:, :]
        return torch.cat([super().scale(first, weight), super().scale(rest, weight.detach())], -2)


@fault(caught_by="gradients", kind="gradient")
class WeightGradientOfTheFirstHead(QkNormRotary):
    """The gradient of a weight is that of one head."""

    def scale(self, normalized, weight):
        first, rest = normalized[:, :1], normalized[:, 1:]
        return torch.cat([super().scale(first, weight), super().scale(rest, weight.detach())], 1)
