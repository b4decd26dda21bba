"""Bugs of experts beside SwiGLU."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.biased_experts import GatedSharedExpert, GegluExperts, GeluMlpExperts, OaiExperts
from gaugeblock.conformance.selftest.simulated.biased_experts import SharedExpert as Shared


@fault(caught_by="parity", kind="structural")
class TanhForErf(GegluExperts):
    """The approximation is taken for the GELU, whatever is asked for."""

    def gelu(self, gate):
        return torch.nn.functional.gelu(gate, approximate="tanh")


@fault(caught_by="parity", kind="structural")
class GeluOfUp(GegluExperts):
    """The second half of w13 is taken for the gate."""

    def activate(self, gate, up):
        return super().activate(up, gate)


@fault(caught_by="parity", kind="precision", dtypes=("bfloat16",))
class GeluInLowPrecision(GegluExperts):
    """Gates are rounded before the GELU."""

    def gelu(self, gate):
        return super().gelu(gate.bfloat16().float())


@fault(caught_by="parity", kind="structural")
class ErfForTanh(GeluMlpExperts):
    """The GELU is taken for its approximation, whatever is asked for."""

    def activate(self, inner):
        return torch.nn.functional.gelu(inner)


@fault(caught_by="parity", kind="structural")
class BiasNotWeighted(GeluMlpExperts):
    """The second bias is added behind the combine, once for each choice."""

    def __call__(self, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, **options):
        out = super().__call__(hidden_states, w1, b1, w2, 0 * b2, topk_weights, topk_ids, **options)
        return (out.float() + b2.float()[topk_ids].sum(1)).to(hidden_states.dtype)


@fault(caught_by="parity", kind="precision", dtypes=("float32",))
class BiasInFloat16(GeluMlpExperts):
    """The first bias is kept in half precision."""

    def __call__(self, hidden_states, w1, b1, w2, b2, topk_weights, topk_ids, **options):
        return super().__call__(hidden_states, w1, b1.half().to(b1.dtype), w2, b2, topk_weights, topk_ids, **options)


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class InterleavedReadAsHalves(OaiExperts):
    """Gate and up are taken from the halves of w13."""

    def split(self, gate_up):
        return gate_up.chunk(2, 1)


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class UpBeforeGate(OaiExperts):
    """Even rows are taken for up."""

    def split(self, gate_up):
        return super().split(gate_up)[::-1]


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class ClampMissing(OaiExperts):
    """Nothing is clamped."""

    def clamp(self, gate, up, limit):
        return gate, up


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class ClampAfterTheActivation(OaiExperts):
    """What the sigmoid was multiplied by is clamped afterwards."""

    def activate(self, gate, up):
        limit = self.options["limit"]
        return (gate * torch.sigmoid(self.options["alpha"] * gate)).clamp(max=limit) * (up.clamp(-limit, limit) + 1)


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class GateClampedFromBelow(OaiExperts):
    """The gate is clamped on either side, as up is."""

    def clamp(self, gate, up, limit):
        return gate.clamp(-limit, limit), up.clamp(-limit, limit)


@fault(caught_by="parity", kind="structural")
class UpClampedFromAboveAlone(OaiExperts):
    """Up has no lower limit, as the gate has none."""

    def clamp(self, gate, up, limit):
        return gate.clamp(max=limit), up.clamp(max=limit)


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class OneForgotten(OaiExperts):
    """The gate is multiplied by up, not by up + 1."""

    def activate(self, gate, up):
        gate, up = self.clamp(gate, up, self.options["limit"])
        return gate * torch.sigmoid(self.options["alpha"] * gate) * up


@fault(caught_by="parity", kind="structural", source="gpt-oss ports")
class AlphaForgotten(OaiExperts):
    """The gate passes a SiLU."""

    def activate(self, gate, up):
        gate, up = self.clamp(gate, up, self.options["limit"])
        return torch.nn.functional.silu(gate) * (up + 1)


@fault(caught_by="parity", kind="structural")
class LimitOfSeven(OaiExperts):
    """The limit is gpt-oss', whatever is asked for."""

    def clamp(self, gate, up, limit):
        return super().clamp(gate, up, 7.0)


@fault(caught_by="parity", kind="structural")
class NanClampedAway(OaiExperts):
    """A clamp by comparisons that NaN fails: it becomes the limit."""

    def clamp(self, gate, up, limit):
        return torch.where(gate < limit, gate, limit), torch.where(up < limit, up, limit).clamp(min=-limit)


@fault(caught_by="gradients", kind="gradient")
class GradientPassesTheClamp(OaiExperts):
    """What is clamped gets a gradient as if it were not."""

    def clamp(self, gate, up, limit):
        clamped = super().clamp(gate, up, limit)
        return tuple(each + (value - each).detach() for each, value in zip((gate, up), clamped, strict=True))


@fault(caught_by="parity", kind="structural")
class SharedGateAndUpSwapped(Shared):
    """The first half of w13 is taken for up."""

    def activate(self, gate, up):
        return super().activate(up, gate)


@fault(caught_by="parity", kind="structural", source="sglang#28237")
class SharedExpertScaled(Shared):
    """The shared expert is divided by the factor that routed experts are multiplied by."""

    def combine(self, outs, topk_weights):
        return super().combine(outs, topk_weights / 2.5)


@fault(caught_by="parity", kind="structural")
class GateForgotten(GatedSharedExpert):
    """The shared expert is added as a whole."""

    def open(self, logits):
        return torch.ones_like(logits)


@fault(caught_by="parity", kind="structural")
class GateScalesTheInput(GatedSharedExpert):
    """The gate is multiplied with the tokens; SwiGLU is not linear."""

    def weighted(self, hidden_states, w13, w2, weights):
        scaled = (hidden_states.float() * weights).to(hidden_states.dtype)
        return super().weighted(scaled, w13, w2, torch.ones_like(weights))


@fault(caught_by="parity", kind="precision", dtypes=("float32",))
class GateInLowPrecision(GatedSharedExpert):
    """The gate is kept in bfloat16, whatever the tokens are in."""

    def open(self, logits):
        return super().open(logits).bfloat16().float()
