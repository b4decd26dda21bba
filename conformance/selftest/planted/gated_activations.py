"""Bugs of gated activations."""

import torch
from torch.nn.functional import gelu, silu

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.gated_activations import GeGlu, SwiGlu


@fault(caught_by="parity", kind="structural", source="diffusers' GEGLU has up first, Llama's product gate")
class GateAndUpSwapped(SwiGlu):
    """up is activated."""

    def of_blocks(self, gate, up):
        return super().of_blocks(up, gate)


@fault(caught_by="parity", kind="structural")
class BothActivated(SwiGlu):
    """up is activated, too."""

    def multiply(self, activated, up):
        return super().multiply(activated, silu(up))


@fault(caught_by="parity", kind="structural", source="GLU for SwiGLU")
class SigmoidAlone(SwiGlu):
    """The gate is the sigmoid, without its argument."""

    def activate(self, gate):
        return torch.sigmoid(gate)


@fault(caught_by="parity", kind="structural", source="quick GELU's factor left in")
class SteeperSigmoid(SwiGlu):
    """The sigmoid's argument is multiplied by 1.702."""

    def activate(self, gate):
        return gate * torch.sigmoid(1.702 * gate)


@fault(caught_by="parity", kind="precision", source="silu of a 16-bit product", dtypes=("bfloat16",))
class ActivationRounded(SwiGlu):
    """The activation is rounded to bfloat16 before the product."""

    def multiply(self, activated, up):
        return super().multiply(activated.bfloat16().float(), up)


@fault(caught_by="parity", kind="boundary", smallest=65)
class LastBlockOfColumnsZero(SwiGlu):
    """Columns behind the last full block, of two or more, are 0."""

    def of_blocks(self, gate, up):
        full = max(1, gate.shape[-1] // self.columns) * self.columns
        mask = torch.arange(gate.shape[-1]) < full
        return super().of_blocks(gate, up) * mask


@fault(caught_by="layout", kind="memory", source="kernels that take halves of one product for contiguous")
class HalvesTakenForContiguous(SwiGlu):
    """Rows of up are taken to lie one after the other."""

    def __call__(self, gate, up):
        _, num_tokens, width = up.shape
        flat = up.as_strided(up.shape, (num_tokens * width, width, 1)) if up.numel() else up
        return super().__call__(gate, flat)


@fault(caught_by="inputs_unchanged", kind="memory", source="Liger's backward writes gradients over gate and up")
class WrittenOverTheGate(SwiGlu):
    """The result is written over the gate."""

    def store(self, result, gate):
        out = super().store(result, gate)
        gate.detach().copy_(out.detach())
        return out


@fault(caught_by="gradients", kind="gradient", source="backward of the sigmoid alone")
class SlopeOfTheSigmoidForgotten(SwiGlu):
    """The gradient of the gate is that through its factor, not through the sigmoid."""

    def activate(self, gate):
        return gate * torch.sigmoid(gate).detach()


@fault(caught_by="gradients", kind="gradient")
class UpConstant(SwiGlu):
    """up gets no gradient."""

    def multiply(self, activated, up):
        return super().multiply(activated, up.detach() + 0 * up)


@fault(caught_by="parity", kind="structural", source="approximate='none' ignored")
class AlwaysTanh(GeGlu):
    """The GELU is the tanh's, whatever is asked for."""

    def activate(self, gate):
        return gelu(gate, approximate="tanh")


@fault(caught_by="parity", kind="structural", source="approximate='tanh' ignored")
class AlwaysErf(GeGlu):
    """The GELU is the exact one, whatever is asked for."""

    def activate(self, gate):
        return gelu(gate)


@fault(caught_by="parity", kind="structural", source="OpenAI's quick GELU")
class QuickGelu(GeGlu):
    """The GELU is x sigmoid(1.702 x)."""

    def activate(self, gate):
        return gate * torch.sigmoid(1.702 * gate)


@fault(caught_by="parity", kind="structural", source="ports by hand")
class RootForgotten(GeGlu):
    """The argument of erf is not divided by sqrt(2)."""

    def activate(self, gate):
        return super().activate(gate) if self.approximation == "tanh" else gate / 2 * (1 + torch.erf(gate))


@fault(caught_by="parity", kind="precision", source="0.044 for 0.044715")
class CubeOfFewerDigits(GeGlu):
    """The factor of the cube has two digits."""

    def activate(self, gate):
        if self.approximation == "none":
            return super().activate(gate)
        return gate / 2 * (1 + torch.tanh(0.7978845608028654 * (gate + 0.044 * gate**3)))


@fault(caught_by="gradients", kind="gradient", source="the exact GELU's derivative for both")
class SlopeOfTheOtherGelu(GeGlu):
    """The gradient is that of the exact GELU."""

    def activate(self, gate):
        value, other = super().activate(gate), gelu(gate)
        return other + (value - other).detach()
