"""Right but different models of DiT-MoE: the right DiTs, with the simulated MoE layer for their second branch."""

from gaugeblock.conformance.selftest.right import dit as of_dit
from gaugeblock.conformance.selftest.simulated.dit_moe import DitMoeModel
from gaugeblock.conformance.selftest.variant import right


@right(batch_invariant=False)
class MoeFunctionsOfTorch(of_dit.FunctionsOfTorch, DitMoeModel):
    """torch's linear, layer_norm, convolution and attention in float32."""


@right()
class MoeOperandsRounded(of_dit.OperandsRounded, DitMoeModel):
    """What is multiplied outside of the layers is rounded to the dtype of the latents; gradients are not."""


@right()
class MoeSoftmaxScaledBefore(of_dit.SoftmaxScaledBefore, DitMoeModel):
    """Queries are scaled, not scores; attention in float32."""


@right()
class LossesFromTheLast(of_dit.GeluWrittenOut, DitMoeModel):
    """Losses are added up from the last layer's on; modulation by one fused multiply-add."""

    def total(self, losses):
        return super().total(losses[::-1])


@right()
class MoeBlocksInFloat64(of_dit.BlocksInFloat64, DitMoeModel):
    """Everything from the tokens on in float64 but for the layers, rounded once."""


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class MoeEveryOperationRounded(of_dit.EveryOperationRounded, DitMoeModel):
    """PyTorch in the dtype of the latents, operation by operation."""

    def __call__(self, state, latents, timesteps, class_labels, *, config):
        self.losses = []
        out = super().__call__(state, latents, timesteps, class_labels, config=config)
        return out, self.total(self.losses)


@right(dtypes=("float16", "bfloat16"), rounding="eager", batch_invariant=False)
class MoeFlashAttention(of_dit.FlashAttention, MoeEveryOperationRounded):
    """PyTorch in the dtype of the latents, attention by a flash kernel."""
