"""Bugs of trainers of masked and block diffusion language models."""

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.train_block_diffusion import BlockTrainer
from gaugeblock.reference import purposes
from gaugeblock.reference.torch import random


@fault(caught_by="accumulation", kind="structural", source="transformers' 2024 fix, of numbers of tokens")
class TokensOfTheMicrobatch(BlockTrainer):
    """Each microbatch's losses are divided by its own number of tokens, and the means averaged."""

    def number(self, microbatch):
        parts = len(self.microbatches(len(self.whole[0])))
        return parts * self.number_of(microbatch, microbatch[-1])


@fault(caught_by="parity", kind="structural", source="cross_entropy's mean over what is not ignored: the 1 / p counts twice")
class MeanOverWhatIsMasked(BlockTrainer):
    """The sum is divided by the number of masked tokens whatever is asked for."""

    def number_of(self, batch, step):
        return max(1, int(self.masked(batch[1], batch[2], batch[3], step)[0].sum()))


@fault(caught_by="parity", kind="structural", source="LLaDA's pretraining loss, / (batch * length), in fine-tuning")
class AllPlacesCounted(BlockTrainer):
    """Prompts and padding count among the tokens that the sum is divided by."""

    def number_of(self, batch, step):
        return batch[1].numel() if self.config.mean_over == "tokens" else super().number_of(batch, step)


@fault(caught_by="parity", kind="structural", source="answer_lengths of what is masked")
class ExamplesDividedByMasks(BlockTrainer):
    """Each example's sum is divided by the number of its masked tokens."""

    def own(self, masked, labels, samples):
        own = super().own(masked, labels, samples)
        return own if isinstance(own, int) else masked.sum(1, keepdim=True).clamp(min=1)


@fault(caught_by="parity", kind="structural", source="Dream-Coder's trainer: 0 / 0", smallest=1)
class NothingMaskedIsNaN(BlockTrainer):
    """The mean over no masked token is 0 / 0."""

    def number_of(self, batch, step):
        number = super().number_of(batch, step)
        is_none = not self.masked(batch[1], batch[2], batch[3], step)[0].any()
        return torch.tensor(0.0) if is_none and self.config.mean_over == "masked" else number


@fault(caught_by="parity", kind="structural", source="a masked language model's loss, as of BERT")
class WeightsForgotten(BlockTrainer):
    """Masked tokens count alike at all times."""

    def inverse(self, shares):
        return torch.ones_like(shares)


@fault(caught_by="parity", kind="boundary", source="loss / t, with eps in p_mask alone")
class WeightsByTheTime(BlockTrainer):
    """Weights are those of times, not of the probabilities that are made of them."""

    def inverse(self, shares):
        least, greatest = self.config.least_share, self.config.greatest_share
        return super().inverse((shares - least) / (greatest - least))


@fault(caught_by="parity", kind="boundary", source="t.clamp(min=eps) for (1 - eps) * t + eps")
class TimesCutOff(BlockTrainer):
    """Times below the least share are raised to it."""

    def shares(self, times):
        return (self.config.greatest_share * times).clamp(min=self.config.least_share)


@fault(caught_by="parity", kind="structural", source="alpha for 1 - alpha")
class MaskedAreKept(BlockTrainer):
    """Tokens are masked with the probability with which they should be kept."""

    def chosen(self, uniforms, shares):
        return uniforms >= shares


@fault(caught_by="parity", kind="structural", source="LLaDA's forward_process on packed rows")
class OneTimeForAllSamples(BlockTrainer):
    """All samples of a sequence have the time of the first."""

    def units(self, of_row):
        return [sample < 0 for sample in of_row] if self.config.times_of == "sample" else super().units(of_row)


@fault(caught_by="parity", kind="structural", source="SDAR: t per sample; a trainer of BD3-LM")
class OneTimeForAllBlocks(BlockTrainer):
    """All blocks of a sample have the time of the first."""

    def units(self, of_row):
        return list(of_row) if self.config.times_of == "block" else super().units(of_row)


@fault(caught_by="parity", kind="structural", source="t.repeat_interleave(block_size, dim=-1) on packed rows")
class BlocksOfTheRow(BlockTrainer):
    """Blocks are counted from the beginning of the sequence, not of the sample."""

    def place(self, of_row, place):
        return place


@fault(caught_by="parity", kind="boundary", source="antithetic sampling without % 1")
class SpreadTimesPileUp(BlockTrainer):
    """Spread times that pass 1 stay there."""

    def spread(self, first, index, count, row):
        return (first + index / count).clamp(max=1 - 2**-24)


@fault(caught_by="parity", kind="structural", source="kuleshov-group/bd3lms: (u + idx) / (batch * blocks)")
class SpreadOverTheBatch(BlockTrainer):
    """Antithetic times depend on the sequence's place in the batch."""

    def spread(self, first, index, count, row):
        return super().spread((first / 4 + row / 4) % 1, index, count, row)


@fault(caught_by="parity", kind="structural", source="one generator key for both")
class MasksByTheTimesNumbers(BlockTrainer):
    """Masks are drawn by the numbers of the times."""

    def uniforms(self, samples, key):
        return random.uniform((samples.shape[1],), **key, purpose=purposes.MASK_TIMES)


@fault(caught_by="permutation_equivariance", kind="structural", source="torch.rand(input_ids.shape)")
class MasksByPlace(BlockTrainer):
    """An example's masks depend on its place in the batch."""

    def key(self, examples, step):
        return super().key(torch.arange(len(examples)), step)


@fault(caught_by="parity", kind="state", source="masks of a data collator that is run once")
class MaskedOnce(BlockTrainer):
    """Masks are those of the first step in all steps."""

    def key(self, examples, step):
        return super().key(examples, 0)


@fault(caught_by="parity", kind="structural", source="JetAstra/SDAR: redraws until a row has a mask, then forces one")
class OneTokenIsForced(BlockTrainer):
    """Where nothing is masked, the first token with a label is."""

    def masked(self, labels, samples, examples, step):
        masked, shares = super().masked(labels, samples, examples, step)
        may = self.has_label(labels, samples)
        is_first = may & (may.cumsum(1) == 1)
        return masked | (is_first & ~masked.any(1, keepdim=True)), shares


@fault(caught_by="parity", kind="structural", source="a collator that masks the prompt too, and drops its losses")
class PromptsAreMasked(BlockTrainer):
    """Tokens of prompts are masked, though they have no loss."""

    def has_label(self, labels, samples):
        return samples >= 0

    def kept(self, losses, noisy, labels, samples):
        return torch.where(labels >= 0, losses, 0)

    def number_of(self, batch, step):
        may = super().has_label(batch[1], batch[2])
        match self.config.mean_over:
            case "tokens":
                return max(1, int(may.sum()))
            case "masked":
                return max(1, int((may & self.masked(batch[1], batch[2], batch[3], step)[0]).sum()))
        return len(may)


@fault(caught_by="parity", kind="structural", source="pad_token_id = eos_token_id, padding trained")
class PaddingIsTrained(BlockTrainer):
    """Padding that has labels is masked and learned."""

    def has_label(self, labels, samples):
        return labels >= 0


@fault(caught_by="parity", kind="structural", source="a causal trainer's labels[1:] against logits[:-1]")
class LabelsOfTheNextToken(BlockTrainer):
    """The logits of each place are compared with the next token."""

    def surprise(self, logits, labels):
        return super().surprise(logits.roll(1, dims=1), labels)


@fault(caught_by="parity", kind="structural", source="Dream's logits shifted in the model and in the loss")
class ShiftedTwice(BlockTrainer):
    """Dream's logits are shifted once more."""

    def shifted(self, logits):
        return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


@fault(caught_by="parity", kind="structural", source="Dream trained as LLaDA")
class NotShifted(BlockTrainer):
    """Dream's logits are those of the place itself."""

    def shifted(self, logits):
        return torch.cat([logits[:, 1:], logits[:, -1:]], dim=1)


@fault(caught_by="parity", kind="structural", source="torch.cat([x_t, x_t])")
class CleanCopyIsNoisy(BlockTrainer):
    """Blocks are predicted from noisy copies of those before."""

    def clean(self, ids, noisy):
        return noisy


@fault(caught_by="parity", kind="structural", source="packing without a block-diagonal mask")
class SamplesSeeEachOther(BlockTrainer):
    """Packed samples are one to the model."""

    def packed(self, samples):
        return samples.clamp(max=0)


@fault(caught_by="parity", kind="structural", source="copies of LLaDA's first model file ignore attention_mask")
class PaddingIsSeen(BlockTrainer):
    """LLaDA and Dream look at padding."""

    def seen(self, samples):
        return torch.ones_like(samples, dtype=torch.bool)


@fault(caught_by="parity", kind="structural", source="SUBS forgotten")
class MaskTokenIsPredicted(BlockTrainer):
    """The mask token keeps its probability."""

    def without_mask(self, logits):
        return logits


@fault(caught_by="parity", kind="structural", source="logits[..., mask] = 0")
class MaskTokenIsZero(BlockTrainer):
    """The mask token's logit is 0, whose exponential is 1."""

    def without_mask(self, logits):
        return logits * (torch.arange(logits.shape[-1]) != self.model.mask_token_id)


@fault(caught_by="parity", kind="structural", source="t for 1 - t")
class LinearTheOtherWay(BlockTrainer):
    """Weights rise with what is masked."""

    def linear(self, shares):
        return shares


@fault(caught_by="parity", kind="structural", source="mask for ~mask in context_adaptive_reweight's product")
class NearMasksCount(BlockTrainer):
    """Masked neighbours count, seen ones do not."""

    def is_near(self, one, other, of_row, masked):
        return super().is_near(one, other, of_row, ~masked)


@fault(caught_by="parity", kind="structural", source="Dream-Coder: distances over a packed row")
class OtherSamplesAreNear(BlockTrainer):
    """Tokens of other samples, and padding, count as near."""

    def is_near(self, one, other, of_row, masked):
        return super().is_near(one, other, [0] * len(of_row), masked)


@fault(caught_by="parity", kind="boundary", source="k.abs() for k.abs() - 1")
class DistancesFromZero(BlockTrainer):
    """The geometric distribution begins at 0."""

    def near(self, distance):
        return super().near(distance + 1)


@fault(caught_by="parity", kind="gradient", source="loss weights from a tensor with gradients detached with it")
class HeadAloneIsTrained(BlockTrainer):
    """Logits' gradients stop before the layers."""

    def logits(self, parameters, noisy, clean, samples):
        whole = {name: each if "lm_head" in name or name.endswith("transformer.ff_out.weight") else each.detach()
                 for name, each in parameters.items()}  # fmt: skip
        return super().logits(whole, noisy, clean, samples)
