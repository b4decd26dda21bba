"""Bugs of losses and figures of a router's load."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.auxiliary_losses import BiasUpdate, Entropy, Load, SequenceLoss


@fault(caught_by="parity", kind="structural", source="feizc/DiT-MoE with seq_aux off")
class LossOfTheWholeBatch(SequenceLoss):
    """All sequences are one: an expert may be all of a sequence's, as long as others make up for it."""

    def __call__(self, router_logits, topk_ids, attention_mask, *, scores):
        self.validate(router_logits, topk_ids, attention_mask, scores)
        flat = (each.flatten(0, 1)[None] for each in (router_logits, topk_ids, attention_mask))
        return super().__call__(*flat, scores=scores)


@fault(caught_by="parity", kind="structural", source="DeepSeek-V2's loss for DeepSeek-V3's router")
class SoftmaxOfSigmoids(SequenceLoss):
    """Sigmoids are normalized by one more softmax, not by their sum."""

    def normalized(self, logits, scores):
        return scores.softmax(2)


@fault(caught_by="parity", kind="structural")
class SigmoidsNotNormalized(SequenceLoss):
    """Scores are probabilities as they are."""

    def normalized(self, logits, scores):
        return scores


@fault(caught_by="parity", kind="structural", source="top_k is a factor of the loss")
class LoadPerToken(SequenceLoss):
    """Assignments are divided by tokens: top_k times the loss."""

    def loads(self, counts, tokens, top_k):
        return super().loads(counts, tokens, 1)


@fault(caught_by="parity", kind="structural")
class LoadWithoutExperts(SequenceLoss):
    """The number of experts is no factor: the loss of an even load depends on it."""

    def loads(self, counts, tokens, top_k):
        return super().loads(counts, tokens, top_k) / counts.shape[1]


@fault(caught_by="parity", kind="structural")
class TokensOfTheLongest(SequenceLoss):
    """Every sequence is taken for as long as the longest."""

    def tokens(self, mask):
        return super().tokens(mask).amax(0, keepdim=True)


@fault(caught_by="parity", kind="structural")
class EmptySequencesInTheMean(SequenceLoss):
    """A sequence of padding alone counts as one of loss 0."""

    def mean(self, losses, mask):
        return losses.sum() / max(1, len(mask))


@fault(caught_by="parity", kind="structural")
class SumOverSequences(SequenceLoss):
    """A larger batch has a larger loss."""

    def mean(self, losses, mask):
        return losses.sum()


@fault(caught_by="gradients", kind="gradient", source="Megatron-LM#7197")
class ConstantScores(SequenceLoss):
    """The loss is a number for the log: nothing is trained by it."""

    def normalized(self, logits, scores):
        return super().normalized(logits, scores).detach()


@fault(caught_by="gradients", kind="gradient")
class SumOfScoresIsConstant(SequenceLoss):
    """The gradient does not pass the sum that scores are divided by."""

    def normalized(self, logits, scores):
        return scores / scores.detach().sum(2, keepdim=True)


@fault(caught_by="parity", kind="precision", source="Megatron-LM#7081")
class LoadsInBfloat16(SequenceLoss):
    """Above 256 tokens of one expert, one more does not count."""

    def counts(self, ids, mask, num_experts):
        return super().counts(ids, mask, num_experts).bfloat16().long()


@fault(caught_by="parity", kind="precision", source="moe-emergence, whose entropy has ln(p + 1e-9)")
class LogarithmOfASmallProbability(Entropy):
    """A small number is added inside of the logarithm: 1e-9 is nothing in float32, so it is 1e-6."""

    def entropy(self, logits):
        p = logits.softmax(1)
        return -(p * (p + 1e-6).log()).sum(1)


@fault(caught_by="parity", kind="boundary", source="0 * ln(0)")
class ImpossibleExpertIsNotANumber(Entropy):
    """A probability of 0 times its logarithm."""

    def entropy(self, logits):
        return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


@fault(caught_by="gradients", kind="gradient", source="torch.special.entr at 0")
class GradientOfTheImpossible(Entropy):
    """0 * ln(0) is 0, and its gradient NaN."""

    def entropy(self, logits):
        return torch.special.entr(logits.softmax(1)).sum(1)


@fault(caught_by="parity", kind="structural")
class EntropyInBits(Entropy):
    """The logarithm is that of 2."""

    def entropy(self, logits):
        return super().entropy(logits) / 0.6931471805599453


@fault(caught_by="parity", kind="structural", source="moe-emergence's entropy of the mean probabilities, under the same name")
class EntropyOfTheMean(Entropy):
    """Probabilities are averaged over the tokens first."""

    def mean(self, entropy, mask):
        return super().entropy(self.logits.softmax(1)[mask].mean(0, keepdim=True).log())[0] + 0 * entropy.sum()

    def masked(self, logits, mask):
        self.logits = super().masked(logits, mask)
        return self.logits


@fault(caught_by="parity", kind="structural")
class PaddingIsUndecided(Entropy):
    """Padding counts as a token whose logits are 0."""

    def mean(self, entropy, mask):
        return super().mean(entropy, torch.ones_like(mask))


@fault(caught_by="gradients", kind="gradient")
class ProbabilitiesAreConstant(Entropy):
    """The gradient reaches the logarithms, where it is 0, and not the probabilities."""

    def entropy(self, logits):
        logs = logits.log_softmax(1)
        return -(logs.detach().exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(1)


@fault(caught_by="parity", kind="structural", source="Triton-distributed#181", dtypes=("float32",))
class PaddingIsOfTheFirstExpert(Load):
    """Lanes of padding count as expert 0."""

    def count(self, ids, mask, num_experts):
        return super().count(ids * mask[:, None], torch.ones_like(mask), num_experts)


@fault(caught_by="parity", kind="boundary", source="sglang#15250", dtypes=("float32",))
class LastExpertLost(Load):
    """The histogram has one bin less."""

    def count(self, ids, mask, num_experts):
        return super().count(ids, mask, num_experts) * (torch.arange(num_experts) < max(1, num_experts - 1))


@fault(caught_by="parity", kind="boundary", source="mirage#664", dtypes=("float32",))
class LastPartialBlockLost(Load):
    """Assignments behind the last full block of 64 are not counted."""

    def count(self, ids, mask, num_experts):
        whole = ids.numel() // 64 * 64
        kept = (torch.arange(ids.numel()) < whole).view(ids.shape) & mask[:, None]
        return ids[kept].long().bincount(minlength=num_experts) if whole else super().count(ids, mask, num_experts)


@fault(caught_by="parity", kind="precision", source="Megatron-LM#7081", dtypes=("float32",))
class CountsInBfloat16(Load):
    """Counts above 256 are rounded."""

    def count(self, ids, mask, num_experts):
        return super().count(ids, mask, num_experts).bfloat16().long()


@fault(caught_by="parity", kind="structural", dtypes=("float32",))
class TokensOfEachExpert(Load):
    """An id given twice in a row counts once."""

    def count(self, ids, mask, num_experts):
        hits = torch.zeros(len(ids), num_experts, dtype=torch.int64).scatter(1, ids.long(), 1)
        return (hits * mask[:, None]).sum(0)


@fault(caught_by="parity", kind="boundary", dtypes=("float32",))
class IdsOfEightBits(Load):
    """Ids above 255 wrap."""

    def count(self, ids, mask, num_experts):
        return super().count(ids.to(torch.uint8), mask, num_experts)


@fault(caught_by="parity", kind="structural", dtypes=("float32",))
class UpdateOfTheOtherSign(BiasUpdate):
    """Experts of more than the mean load get still more."""

    def step(self, loads):
        return -super().step(loads)


@fault(caught_by="parity", kind="structural", source="arXiv:2408.15664, table 3, its variant without sign", dtypes=("float32",))
class StepOfTheDifference(BiasUpdate):
    """The step is as large as the difference is, in units of the mean."""

    def step(self, loads):
        mean = loads.double().mean()
        return ((mean - loads) / mean.clamp(min=1)).float()


@fault(caught_by="parity", kind="boundary", dtypes=("float32",))
class NeverAtRest(BiasUpdate):
    """An expert of just the mean load loses."""

    def step(self, loads):
        step = super().step(loads)
        return torch.where(step > 0, 1, -1)


@fault(caught_by="parity", kind="boundary", source="integer division", dtypes=("float32",))
class MeanRoundedDown(BiasUpdate):
    """The mean is an integer: a load just below it is taken for the mean."""

    def step(self, loads):
        return (loads.sum() // len(loads) - loads).sign()


@fault(caught_by="parity", kind="precision", dtypes=("float32",))
class MeanOfFloat32(BiasUpdate):
    """Loads of millions are all the mean."""

    def step(self, loads):
        return (loads.float().mean() - loads.float()).sign()


@fault(caught_by="parity", kind="precision", source="sglang#37133", dtypes=("float32",))
class BiasesOfBfloat16(BiasUpdate):
    """Biases are kept in bfloat16, where a rate of 0.001 is lost."""

    def update(self, bias, step, rate):
        return super().update(bias.bfloat16(), step, rate).float()


@fault(caught_by="inputs_unchanged", kind="state", source="biases as a buffer", dtypes=("float32",))
class UpdatedInPlace(BiasUpdate):
    """The biases that were given are changed too."""

    def update(self, bias, step, rate):
        return bias.add_(rate * step)
