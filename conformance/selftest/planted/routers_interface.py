"""Bugs of routers at their edges: memory, state, batches, and calls that should be refused."""

from typing import Any

import torch

from gaugeblock.conformance.selftest.fault import fault
from gaugeblock.conformance.selftest.simulated.routers import GroupedRouter, SoftmaxRouter
from gaugeblock.reference import validation


@fault(caught_by="layout", kind="memory", source="moe-emergence review")
class ViewOfSlicedInput(SoftmaxRouter):
    """`.view()` where the caller may pass a slice."""

    def load(self, logits):
        return super().load(logits.view(-1).view(logits.shape))


@fault(caught_by="layout", kind="memory", source="moe-emergence review")
class StridesIgnored(SoftmaxRouter):
    """Rows are read as if they lay one behind the other."""

    def load(self, logits):
        return super().load(logits.as_strided(logits.shape, (logits.shape[1], 1)))


@fault(caught_by="gradient_layout", kind="gradient", source="fla-org/flash-linear-attention's habit of .contiguous()")
class StridesOfTheCotangentIgnored(SoftmaxRouter):
    """The backward pass reads the gradient of the weights as if its rows lay one behind the other."""

    def store(self, weights, ids, logits):
        return ContiguousCotangent.apply(weights), ids


class ContiguousCotangent(torch.autograd.Function):
    """The identity; backward takes it for granted that gradients are contiguous."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.as_strided(grad.shape, (grad.shape[1], 1)).clone()


@fault(caught_by="inputs_unchanged", kind="memory")
class LogitsOverwritten(SoftmaxRouter):
    """The maximum is subtracted in place."""

    def load(self, logits):
        logits.detach().sub_(logits.detach().amax(1, keepdim=True))
        return super().load(logits)


@fault(caught_by="fully_written", kind="memory")
class RowsUnwritten(SoftmaxRouter):
    """Weights of 0 are not stored, since memory is expected to hold zeros."""

    def store(self, weights, ids, logits):
        return torch.where(torch.arange(len(weights))[:, None] % 16 < 15, weights, torch.empty_like(weights)), ids


@fault(caught_by="out_of_bounds", kind="boundary", source="vllm#2453")
class LanesReadPastTheEnd(SoftmaxRouter):
    """Lanes behind the last expert read on: the next row's logits, and past the end of the last row."""

    def load(self, logits):
        rows, experts = logits.shape
        lanes = self.lanes(experts)
        reachable = logits.untyped_storage().nbytes() // logits.element_size() - logits.storage_offset()
        index = (torch.arange(rows)[:, None] * experts + torch.arange(lanes)).clamp(max=reachable - 1)
        flat = logits.as_strided((reachable,), (1,)).detach()[index]
        return torch.cat([logits.float(), flat[:, experts:].float()], 1)


@fault(caught_by="nan_containment", kind="structural")
class MaximumOfTheWholeBatch(SoftmaxRouter):
    """One maximum is subtracted from all tokens, so one token's NaN is everybody's."""

    def scores(self, logits):
        if not logits.numel():
            return super().scores(logits)
        exponentials = (logits - logits.detach().amax()).double().exp().float()
        return exponentials / self.sum(exponentials)


@fault(caught_by="empty_and_one", kind="boundary", source="flash-attention b46c5875: an empty batch")
class EmptyBatchRaises(SoftmaxRouter):
    """The number of programs is found by dividing by the number of tokens."""

    def lanes(self, experts):
        return super().lanes(experts)

    def load(self, logits):
        assert 1024 // len(logits)
        return super().load(logits)


@fault(caught_by="empty_and_one", kind="boundary")
class OneTokenSqueezed(SoftmaxRouter):
    """A batch of one token loses its batch dimension."""

    def store(self, weights, ids, logits):
        return (weights.squeeze(0), ids.squeeze(0)) if len(weights) == 1 else (weights, ids)


@fault(caught_by="batch_invariance", kind="state", source="vllm#36488")
class SumSplitByBatchSize(SoftmaxRouter):
    """Small batches split each row's sum over more threads: a token's bits depend on how many others there are."""

    def sum(self, values):
        parts = 4 if len(values) < 8 else 1
        sums = [part.cumsum(1)[:, -1:] for part in values.tensor_split(parts, 1) if part.shape[1]]
        return sum(sums[1:], sums[0])


@fault(caught_by="permutation_equivariance", kind="structural", source="Switch Transformers' capacity, not asked for")
class OverflowingTokensDropped(SoftmaxRouter):
    """Of more than four tokens that put one expert first, later ones get weight 0 for it."""

    def store(self, weights, ids, logits):
        turn = torch.nn.functional.one_hot(ids[:, 0], logits.shape[1]).cumsum(0).gather(1, ids[:, :1])
        return weights.masked_fill(turn > 4, 0.0), ids


@fault(caught_by="expert_relabelling", kind="structural", source="expert maps of expert-parallel ranks")
class FirstExpertIsASentinel(GroupedRouter):
    """Id 0 marks padding, so the first expert gets weight 0."""

    def weigh_groups(self, scores, biased, ids, renormalize, factor):
        return super().weigh_groups(scores, biased, ids, renormalize, factor).masked_fill(ids == 0, 0.0)


@fault(caught_by="determinism", kind="state", source="moe-emergence review")
class NoiseInEval(SoftmaxRouter):
    """The noise of the training router stays on."""

    def load(self, logits):
        return super().load(logits + 1e-3 * torch.randn(logits.shape))


@fault(caught_by="process_settings", kind="state")
class RandomStateAdvanced(SoftmaxRouter):
    """A number is drawn from the global generator and not used."""

    def load(self, logits):
        torch.rand(1)
        return super().load(logits)


@fault(caught_by="process_settings", kind="state")
class DefaultDtypeLeftChanged(SoftmaxRouter):
    """The default dtype is set for the computation and not put back."""

    def load(self, logits):
        torch.set_default_dtype(torch.float64)
        return super().load(logits)


@fault(caught_by="grad_modes", kind="state", source="separate inference paths")
class InferencePathForgetsToRenormalize(SoftmaxRouter):
    """Without gradients a shorter path is taken, which leaves out the renormalization."""

    def weigh(self, scores, ids, renormalize):
        return super().weigh(scores, ids, renormalize and torch.is_grad_enabled())


@fault(caught_by="hidden_state", kind="state", source="static output buffers for CUDA graphs")
class OutputBufferReused(GroupedRouter):
    """Every call of the same size returns the same memory, so a result changes when the next call is made."""

    def __init__(self):
        self.buffers = {}

    def store(self, weights, ids, logits):
        if weights.requires_grad:
            return weights, ids
        buffer = self.buffers.setdefault(weights.shape[1], weights.new_empty(4096, weights.shape[1]))[: len(weights)]
        return buffer.copy_(weights), ids


@fault(caught_by="same_pointer_new_data", kind="state", source="KernelBench exploits")
class CachedByShape(SoftmaxRouter):
    """The result of the first call is returned to every call of its shape."""

    def __init__(self):
        self.cache = {}

    def __call__(self, router_logits, *, top_k, renormalize):
        key = (router_logits.shape, top_k, renormalize)
        if key not in self.cache:
            self.cache[key] = super().__call__(router_logits, top_k=top_k, renormalize=renormalize)
        return self.cache[key]


@fault(caught_by="parity", kind="structural", dtypes=("float16",))
class WeightsInTheDtypeOfTheLogits(SoftmaxRouter):
    """Weights are rounded to the dtype of the logits, where float32 is due."""

    def store(self, weights, ids, logits):
        return weights.to(logits.dtype), ids


@fault(caught_by="parity", kind="structural")
class IdsAreFloats(SoftmaxRouter):
    """Ids come out of a floating kernel and are returned as they are."""

    def store(self, weights, ids, logits):
        return weights, ids.float()


@fault(caught_by="rejections", kind="error-contract")
class NothingValidated(SoftmaxRouter):
    """A top_k above the number of experts is taken."""

    def validate(self, router_logits, top_k):
        pass


@fault(caught_by="rejections", kind="error-contract", source="black-forest-labs/flux's habit")
class AssertsWhatTheCallerDidWrong(SoftmaxRouter):
    """A bad call raises AssertionError."""

    def validate(self, router_logits, top_k):
        try:
            validation.softmax_topk(router_logits, top_k)
        except (ValueError, TypeError) as error:
            raise AssertionError(str(error)) from None


@fault(caught_by="rejections", kind="error-contract")
class ErrorNamesNoArgument(SoftmaxRouter):
    """A bad call raises ValueError: invalid argument."""

    def validate(self, router_logits, top_k):
        try:
            validation.softmax_topk(router_logits, top_k)
        except (ValueError, TypeError):
            raise ValueError("invalid argument") from None
