"""Bugs of quantization: scales of other groups, another format, other roundings."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.quantization import TokenGroups
from gaugeblock.reference.configs import E4M3_MAX


@fault(caught_by="parity", kind="structural", source="sglang#38573")
class ScalesOfTheFirstGroup(TokenGroups):
    """All groups of a token are divided by the scale of its first."""

    def used(self, scales, group):
        return scales[:, 0]


@fault(caught_by="parity", kind="structural", source="vllm#57016")
class ScaleOfTheBatch(TokenGroups):
    """The largest element is that of all tokens."""

    def largest(self, group):
        return group.abs().amax().expand(len(group)) if group.numel() else super().largest(group)


@fault(caught_by="batch_invariance", kind="state", source="vllm#57016")
class ScaleOfNeighbours(TokenGroups):
    """Two tokens share a scale."""

    def largest(self, group):
        largest = super().largest(group)
        return torch.maximum(largest, largest[torch.arange(len(group)) ^ 1 if len(group) % 2 == 0 else slice(None)])


@fault(caught_by="parity", kind="structural", source="vllm#49596")
class GroupsOf128(TokenGroups):
    """The scale is that of the group of 128 columns that this one lies in."""

    def scale(self, hidden, columns):
        start = columns.start // 128 * 128
        return super().scale(hidden, slice(start, start + 128))


@fault(caught_by="parity", kind="boundary", source="kernels that loop over whole groups")
class LastGroupForgotten(TokenGroups):
    """Columns behind the last whole group do not count for its scale."""

    def scale(self, hidden, columns):
        whole = columns.stop <= hidden.shape[1]
        return super().scale(hidden, columns) if whole else torch.ones(len(hidden))


@fault(caught_by="parity", kind="structural", source="float8_e4m3fnuz, whose largest number is 240")
class LargestOfAnotherFormat(TokenGroups):
    """The largest element becomes 240."""

    def scale(self, hidden, columns):
        return self.largest(hidden[:, columns]) / 240


@fault(caught_by="parity", kind="structural", source="maxima of signed numbers")
class NegativeElementsIgnored(TokenGroups):
    """The largest element is the largest positive one."""

    def largest(self, group):
        return group.amax(1).clamp(min=0)

    def rounded(self, quotients):
        return super().rounded(quotients.clamp(-E4M3_MAX, E4M3_MAX))


@fault(caught_by="parity", kind="precision", source="vLLM's eps of 1e-10")
class LeastScale(TokenGroups):
    """The largest element counts as 10^-10 at least."""

    def largest(self, group):
        return super().largest(group).clamp(min=1e-10)


@fault(caught_by="parity", kind="precision", source="scales of e8m0 where float32 is due")
class ScalesOfPowersOfTwo(TokenGroups):
    """Scales are rounded up to powers of two."""

    def scale(self, hidden, columns):
        return torch.exp2(super().scale(hidden, columns).log2().ceil())


@fault(caught_by="parity", kind="precision", source="triton#11217")
class Truncated(TokenGroups):
    """Quotients are cut, not rounded."""

    def rounded(self, quotients):
        nearest = super().rounded(quotients).float()
        ulp = torch.exp2(torch.floor(quotients.abs().clamp(min=2.0**-6).log2()) - 3)
        return super().rounded(torch.where(nearest.abs() > quotients.abs(), nearest - quotients.sign() * ulp, nearest))


@fault(caught_by="parity", kind="precision", source="bit tricks that add half an ulp and cut")
class TiesAwayFromZero(TokenGroups):
    """A quotient between two numbers goes to the larger one."""

    def rounded(self, quotients):
        return super().rounded((quotients.view(torch.int32) + 1).view(torch.float32))


@fault(caught_by="parity", kind="precision", source="conversions without subnormal numbers")
class SubnormalsFlushed(TokenGroups):
    """What is below the smallest normal number of e4m3 becomes 0."""

    def rounded(self, quotients):
        return super().rounded(torch.where(quotients.abs() < 2.0**-6, 0.0, quotients))


@fault(caught_by="parity", kind="precision", source="scales stored in the model's dtype")
class ScalesInBfloat16(TokenGroups):
    """Scales pass through bfloat16."""

    def scale(self, hidden, columns):
        return super().scale(hidden, columns).bfloat16().float()


@fault(caught_by="parity", kind="precision", source="conversions by way of float16")
class QuotientsThroughFloat16(TokenGroups):
    """Quotients are rounded to float16 on their way to e4m3, hence twice."""

    def rounded(self, quotients):
        return super().rounded(quotients.half().float())


@fault(caught_by="parity", kind="boundary")
class ZerosOverZero(TokenGroups):
    """A group of zeros is divided by its scale of 0."""

    def quantize(self, group, scales):
        return self.rounded(self.quotient(group, scales[:, None]))
