"""Right but different gated activations."""

import math

import torch
from torch.nn.functional import gelu, silu

from gaugeblock.conformance.selftest.simulated.gated_activations import GeGlu, SwiGlu
from gaugeblock.conformance.selftest.variant import right


@right()
class SiluOfTorch(SwiGlu):
    """torch's silu."""

    def activate(self, gate):
        return silu(gate)


@right()
class SigmoidAsWritten(SwiGlu):
    """x / (1 + exp(-x)), operation by operation in float32."""

    def activate(self, gate):
        return gate / (1 + torch.exp(-gate))


@right()
class GateMultipliedLast(SwiGlu):
    """up meets the sigmoid first."""

    def of_blocks(self, gate, up):
        return torch.sigmoid(gate) * up * gate


@right()
class SwiGluInFloat64(SwiGlu):
    """Everything in float64, rounded once."""

    def __call__(self, gate, up):
        self.validate(gate, up)
        return self.store(silu(gate.double()) * up.double(), gate)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class SwiGluRounded(SwiGlu):
    """PyTorch in the dtype of the gate, operation by operation."""

    def __call__(self, gate, up):
        return silu(gate) * up


@right()
class GeluByTheComplement(GeGlu):
    """The normal distribution by erfc, or by a sigmoid in place of a tanh: both keep the digits of what is almost 0."""

    def activate(self, gate):
        if self.approximation == "none":
            return gate * torch.erfc(-gate / math.sqrt(2)) / 2
        return gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))


@right()
class GeluAsWritten(GeGlu):
    """The formulas, operation by operation in float32."""

    def activate(self, gate):
        if self.approximation == "none":
            return 0.5 * gate * (1 + torch.erf(gate * 0.7071067811865476))
        return 0.5 * gate * (1 + torch.tanh(0.7978845608028654 * gate * (1 + 0.044715 * gate * gate)))


@right()
class GeGluInFloat64(GeGlu):
    """Everything in float64, rounded once."""

    def __call__(self, gate, up, *, approximation):
        return self.store(gelu(gate.double(), approximate=approximation) * up.double(), gate)


@right(dtypes=("float16", "bfloat16"), rounding="eager")
class GeGluRounded(GeGlu):
    """PyTorch in the dtype of the gate, operation by operation."""

    def __call__(self, gate, up, *, approximation):
        return gelu(gate, approximate=approximation) * up
