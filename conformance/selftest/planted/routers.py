"""Bugs of routers: which experts are chosen, in which order, with what weights and gradients."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.routers import GroupedRouter, SoftmaxRouter


@fault(caught_by="parity", kind="boundary", source="vllm#2453", smallest=3)
class PaddedLanesSelectable(SoftmaxRouter):
    """Lanes behind the last expert hold logits of 0 and can be chosen."""

    def load(self, logits):
        return super().load(logits).nan_to_num(neginf=0.0)

    def choosable(self, scores, experts):
        return scores.detach()


@fault(caught_by="parity", kind="boundary", source="vllm#2453")
class PaddedLanesInTheSum(SoftmaxRouter):
    """Lanes behind the last expert hold logits of 0 and count in the softmax's denominator."""

    def load(self, logits):
        lanes = self.lanes(logits.shape[1])
        return torch.nn.functional.pad(logits.float(), (0, lanes - logits.shape[1]))


@fault(caught_by="parity", kind="boundary", smallest=2)
class LastTokensDropped(SoftmaxRouter):
    """Tokens behind the last full tile of 16 are not computed."""

    def store(self, weights, ids, logits):
        tokens = torch.arange(len(weights))[:, None]
        return weights.where(tokens < max(1, len(weights) // 16 * 16), 0.0), ids


@fault(caught_by="parity", kind="boundary", source="kekzl/imp#2056", smallest=257)
class IdsInUint8(SoftmaxRouter):
    """Experts above 255 are never chosen, since ids are stored in 8 bits."""

    def store(self, weights, ids, logits):
        return weights, ids.to(torch.uint8)


@fault(caught_by="parity", kind="structural", source="Mixtral and OLMoE mixed up", smallest=2)
class AlwaysRenormalized(SoftmaxRouter):
    """Weights are divided by their sum although that is not asked for."""

    def weigh(self, scores, ids, renormalize):
        return super().weigh(scores, ids, True)


@fault(caught_by="parity", kind="structural")
class WeightsNotAlignedWithIds(SoftmaxRouter):
    """Ids are in order of their scores, weights in order of their ids."""

    def weigh(self, scores, ids, renormalize):
        return super().weigh(scores, ids.sort(1).values, renormalize)


@fault(caught_by="parity", kind="structural", source="torch.topk(sorted=False)")
class Unsorted(SoftmaxRouter):
    """Experts come in the order of their ids, with the right weights."""

    def select(self, scores, top_k):
        return super().select(scores, top_k).sort(1).values


@fault(caught_by="parity", kind="structural", source="vllm#52679", smallest=4)
class ExpertChosenTwiceOnTies(SoftmaxRouter):
    """The best scores are found first, and then the first lane that has each."""

    def select(self, scores, top_k):
        values = scores.topk(top_k).values
        return torch.cat([(scores == values[:, each, None]).int().argmax(1, keepdim=True) for each in range(top_k)], 1)


@fault(caught_by="parity", kind="structural", source="vllm#52679")
class NanRowGivesMinusOne(SoftmaxRouter):
    """No score compares greater in a row with NaN, so the ids keep their initial -1."""

    unset = -1

    def select(self, scores, top_k):
        return super().select(scores, top_k).masked_fill(scores.isnan().any(1, keepdim=True), self.unset)

    def weigh(self, scores, ids, renormalize):
        return super().weigh(scores, ids.clamp(0, scores.shape[1] - 1), renormalize)


@fault(caught_by="parity", kind="structural", source="intel-xpu-backend-for-triton#7575")
class NanRowGivesNumExperts(NanRowGivesMinusOne):
    """In a row with NaN the argmax is the number of lanes, one past the last."""

    def select(self, scores, top_k):
        self.unset = scores.shape[1]
        return super().select(scores, top_k)


@fault(caught_by="parity", kind="structural", source="sglang#31768")
class TieBreakTermAdded(SoftmaxRouter):
    """A term that grows with the lane is added to the scores so that no two are equal; it also changes which are best."""

    def choosable(self, scores, experts):
        return super().choosable(scores - 1e-5 * torch.arange(scores.shape[1]), experts)


@fault(caught_by="parity", kind="precision", source="gpt-oss ports", dtypes=("float16",))
class SoftmaxInLowPrecision(SoftmaxRouter):
    """The softmax is taken in the dtype of the logits."""

    def scores(self, logits):
        return logits.half().softmax(1).float()


@fault(caught_by="parity", kind="precision")
class MaximumNotSubtracted(SoftmaxRouter):
    """The exponential of a large logit overflows."""

    def scores(self, logits):
        exponentials = logits.exp()
        return exponentials / self.sum(exponentials)


@fault(caught_by="parity", kind="precision", source="Diffulex#37")
class RenormalizedWithEpsilon(SoftmaxRouter):
    """A millionth is added to the sum that the weights are divided by."""

    def weigh(self, scores, ids, renormalize):
        weights = super().weigh(scores, ids, False)
        return weights / (self.sum(weights) + 1e-6) if renormalize else weights


@fault(caught_by="parity", kind="precision", source="fast exp2 approximations")
class CoarseExponential(SoftmaxRouter):
    """The exponential is right to 16 bits only."""

    def scores(self, logits):
        exponentials = (logits - logits.detach().amax(1, keepdim=True)).exp()
        exponentials = exponentials * (1 + 2.0**-17 * torch.sin(1e4 * logits.detach().nan_to_num(0, 0, 0)))
        return exponentials / self.sum(exponentials)


@fault(caught_by="gradients", kind="gradient")
class RenormalizationWithoutGradient(SoftmaxRouter):
    """The sum that weights are divided by is taken for a constant."""

    def weigh(self, scores, ids, renormalize):
        weights = super().weigh(scores, ids, False)
        return weights / self.sum(weights).detach() if renormalize else weights


@fault(caught_by="gradients", kind="gradient")
class SoftmaxDenominatorWithoutGradient(SoftmaxRouter):
    """The gradient reaches only the chosen logits, as if each probability depended on its own logit alone."""

    def sum(self, values):
        return super().sum(values).detach()


@fault(caught_by="gradients", kind="gradient", source="moe-emergence review")
class WeightsWithoutGradient(SoftmaxRouter):
    """The weights are detached, so the router never learns."""

    def weigh(self, scores, ids, renormalize):
        return super().weigh(scores.detach(), ids, renormalize)


@fault(caught_by="parity", kind="structural", source="ports of DeepSeek-V3")
class BiasInTheWeights(GroupedRouter):
    """The correction bias enters the weights, not only the choice."""

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        return super().weigh_groups(biased, biased, ids, renormalize, factor)


@fault(caught_by="parity", kind="structural", source="DeepSeek-V2 and V3 mixed up")
class GroupScoreIsTheMaximum(GroupedRouter):
    """A group's score is its best expert's, where the sum of the best two is due."""

    def group_scores(self, biased):
        return biased.amax(2)


@fault(caught_by="parity", kind="structural", source="ports of DeepSeek-V3")
class DroppedGroupsFilledWithZero(GroupedRouter):
    """Dropped experts score 0, which is more than a negative biased score."""

    def masked(self, biased, kept):
        return biased.masked_fill(~kept, 0.0)


@fault(caught_by="parity", kind="structural")
class GroupsInterleaved(GroupedRouter):
    """Expert e is taken for a member of group e modulo num_groups."""

    def kept(self, biased, num_groups, topk_groups):
        members = biased.shape[1] // num_groups
        regrouped = biased.unflatten(1, (members, num_groups)).mT.flatten(1)
        return super().kept(regrouped, num_groups, topk_groups).unflatten(1, (num_groups, members)).mT.flatten(1)


@fault(caught_by="parity", kind="structural")
class IdsWithinTheKeptGroups(GroupedRouter):
    """Ids count the experts of the kept groups and are not mapped back."""

    def select(self, scores, top_k):
        ids = super().select(scores, top_k)
        dropped = (scores == -torch.inf).cumsum(1)
        return ids - dropped.gather(1, ids)


@fault(caught_by="parity", kind="structural")
class ScoresComparedAsIntegers(GroupedRouter):
    """Scores are compared by their bits, which reverses the order of negative ones."""

    def select(self, scores, top_k):
        return super().select(scores.view(torch.int32).double(), top_k)


@fault(caught_by="parity", kind="structural")
class ScaledBeforeRenormalization(GroupedRouter):
    """The weights are multiplied by the factor first, and the division takes it out again."""

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        weights = scores.gather(1, ids) * factor
        return weights / (self.sum(weights) + self.epsilon) if renormalize else weights


@fault(caught_by="parity", kind="structural")
class ScaledOnlyIfRenormalized(GroupedRouter):
    """The factor is part of the renormalization."""

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        return super().weigh_groups(scores, biased, ids, renormalize, factor if renormalize else 1.0)


@fault(caught_by="parity", kind="precision", source="Diffulex#37")
class RenormalizedWithoutEpsilon(GroupedRouter):
    """The weights are divided by their bare sum, which is infinite or NaN where that is 0."""

    epsilon = 0.0


@fault(caught_by="parity", kind="precision", source="Diffulex#37")
class RenormalizedWithLargeEpsilon(GroupedRouter):
    """10^-12 is added to the sum, where 10^-20 is due: visible beside tiny sigmoids alone."""

    epsilon = 1e-12


@fault(caught_by="parity", kind="precision", source="ports of DeepSeek-V3", dtypes=("bfloat16",))
class SigmoidInLowPrecision(GroupedRouter):
    """The sigmoid is taken in the dtype of the logits."""

    def scores(self, logits):
        return logits.bfloat16().sigmoid().float()


@fault(caught_by="parity", kind="precision", source="kernels with a fast tanh")
class SigmoidByTanh(GroupedRouter):
    """(1 + tanh(x / 2)) / 2, which has no digits left where the sigmoid is small."""

    def scores(self, logits):
        return 0.5 + 0.5 * (0.5 * logits).tanh()


@fault(caught_by="gradients", kind="gradient")
class FactorWithoutGradient(GroupedRouter):
    """The gradient of the weights is not multiplied by the factor."""

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        weights = super().weigh_groups(scores, biased, ids, renormalize, 1.0)
        return weights + weights.detach() * (factor - 1)


@fault(caught_by="gradients", kind="gradient")
class SigmoidDerivativeIsOne(GroupedRouter):
    """The derivative of the sigmoid is left out."""

    def scores(self, logits):
        return super().scores(logits).detach() + logits - logits.detach()


@fault(caught_by="parity", kind="precision", source="flashinfer#3875")
class BiasTakenOffAgain(GroupedRouter):
    """Weights are the biased scores less the bias: of a small score nothing is left."""

    def biased(self, scores, bias):
        self.bias = bias.float().expand_as(scores)
        return super().biased(scores, bias)

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        recovered = scores + ((biased - self.bias) - scores).detach()
        return super().weigh_groups(recovered, biased, ids, renormalize, factor)
