"""Right but different rotary embeddings."""

import torch
from torch.nn.functional import rms_norm

from gaugeblock.conformance.selftest.simulated.rotary import QkNormRotary, Rotate
from gaugeblock.conformance.selftest.variant import right


def complex_product(x, y, cos, sin):
    """A pair is a complex number, which an angle multiplies."""
    product = torch.complex(x, y) * torch.complex(cos, sin)
    return product.real, product.imag


def rotated_halves(heads, cos, sin):
    """x cos + rotate_half(x) sin over whole heads, as transformers writes it, for halves."""
    first, second = heads.chunk(2, -1)
    return heads * torch.cat([cos, cos], -1) + torch.cat([-second, first], -1) * torch.cat([sin, sin], -1)


@right()
class ComplexProducts(Rotate):
    """Pairs are complex numbers."""

    def rotated(self, x, y, cos, sin):
        return complex_product(x, y, cos, sin)


@right()
class OneTokenAtATime(Rotate):
    """Blocks of one token."""

    block_tokens = 1


@right()
class FusedMultiplyAdds(Rotate):
    """A product and a sum are rounded together."""

    def rotated(self, x, y, cos, sin):
        return torch.addcmul(x * cos, y, sin, value=-1), torch.addcmul(y * cos, x, sin)


@right()
class RotationMatrices(Rotate):
    """A matrix of two by two for each pair, as in Flux."""

    def turn(self, heads, cos, sin, pairs):
        vectors = torch.stack(self.split(heads, pairs), -1)
        matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        x, y = (matrices * vectors[..., None, :]).sum(-1).unbind(-1)
        return self.join(x, y, pairs)


@right()
class WholeHeadsInFloat64(Rotate):
    """Everything in float64, rounded once."""

    def __call__(self, heads, cos, sin, *, pairs):
        self.validate(heads, cos, sin, pairs)
        return self.store(self.turn_blocks(heads.double(), cos.double(), sin.double(), pairs), heads)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class EveryOperationRounded(Rotate):
    """PyTorch in the dtype of the heads, operation by operation, by angles of float32."""

    def __call__(self, heads, cos, sin, *, pairs):
        x, y = self.split(heads, pairs)
        turned = ((x * cos).to(x) - (y * sin).to(x), (y * cos).to(x) + (x * sin).to(x))
        return self.join(*turned, pairs)


@right()
class NormOfTorch(QkNormRotary):
    """torch's rms_norm in float32, and complex products."""

    def normalize(self, heads, eps):
        return rms_norm(heads, heads.shape[-1:], eps=eps)

    def rotated(self, x, y, cos, sin):
        return complex_product(x, y, cos, sin)


@right()
class RotatedHalves(QkNormRotary):
    """Neighbours are sorted into halves, turned as a whole, and put back."""

    def turn(self, heads, cos, sin, pairs):
        halves = torch.cat(self.split(heads, pairs), -1)
        x, y = rotated_halves(halves, cos, sin).chunk(2, -1)
        return self.join(x, y, pairs)


@right()
class FeatureByFeature(QkNormRotary):
    """Squares are added one after the other, from the last feature to the first, and the root divides."""

    def normalize(self, heads, eps):
        total = torch.zeros_like(heads[..., :1])
        for feature in heads.flip(-1).split(1, -1):
            total = total + feature * feature
        return heads / (total / heads.shape[-1] + eps).sqrt()


@right()
class WeightBesideTheRoot(QkNormRotary):
    """The weight is multiplied by one over the root first."""

    def of_heads(self, heads, weight, cos, sin, eps, pairs):
        wide = heads.float()
        factors = self.rstd(self.mean_square(wide), eps) * weight.float()
        return self.store(self.turn_blocks(wide * factors, cos, sin, pairs), heads)


@right()
class NormAndHeadsInFloat64(QkNormRotary):
    """Everything in float64, rounded once."""

    def of_heads(self, heads, weight, cos, sin, eps, pairs):
        normalized = rms_norm(heads.double(), heads.shape[-1:], weight.double(), eps=eps)
        return self.store(self.turn_blocks(normalized, cos.double(), sin.double(), pairs), heads)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class NormAndRotationRounded(QkNormRotary):
    """The norm's result is rounded before the weight, as in Llama, then the product, then each step of the rotation."""

    def of_heads(self, heads, weight, cos, sin, eps, pairs):
        x, y = self.split(weight * self.normalize(heads.float(), eps).to(heads), pairs)
        turned = ((x * cos).to(x) - (y * sin).to(x), (y * cos).to(x) + (x * sin).to(x))
        return self.join(*turned, pairs)
