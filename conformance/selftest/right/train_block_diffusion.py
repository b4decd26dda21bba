"""Right but different trainers of block diffusion language models."""

import torch

from gaugeblock.conformance.selftest.simulated.train_block_diffusion import BlockTrainer
from gaugeblock.conformance.selftest.variant import right


@right(dtypes=("float32",))
class SequenceBySequence(BlockTrainer):
    """Every sequence is a microbatch, from the last to the first."""

    def microbatches(self, batch_size):
        return list(torch.arange(batch_size).flip(0).split(1))


@right(dtypes=("float32",))
class CrossEntropyOfTorch(BlockTrainer):
    """torch's cross_entropy, of which a label of -100 is ignored."""

    def surprise(self, logits, labels):
        if self.config.excludes_mask_token:
            logits = self.without_mask(logits)
        return torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)


@right(dtypes=("float32",))
class MaskTokenCutOff(BlockTrainer):
    """The mask token's logit is minus infinity, and probabilities are those of the others."""

    def without_mask(self, logits):
        is_mask = torch.arange(logits.shape[-1]) == self.model.mask_token_id
        return logits.masked_fill(is_mask, -torch.inf)


@right(dtypes=("float32",))
class SumsInFloat64(BlockTrainer):
    """Cross-entropies are computed and added up in float64."""

    def surprise(self, logits, labels):
        return super().surprise(logits.double(), labels)

    def share(self, losses, batch_size):
        return super().share(losses, batch_size).float()
